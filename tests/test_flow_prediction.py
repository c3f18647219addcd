"""Laws of the readings: every conversion undoes itself, every reading of one straight line is the same velocity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.flow import prediction as pre
from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.flow.windows import bounds, chord, interpolate, locate

SD = make_schedule("scaled_linear", 0.00085, 0.012)
GRID_TIMES = (np.arange(1001) / 1000).astype(np.float32)
COUNTS = [2, 4, 8, 5]
CONSTANT = [("velocity", "linear"), ("ddim_eps", "linear"), ("diff_eps", "linear"), ("ddim_eps", "first_order")]  # in a window
PAIRED = [*CONSTANT, ("ddim_v", "linear"), ("ddim_v", "first_order")]


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _relative(x, y):
    """Largest error of any example, relative to that example's own size."""
    x, y = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x, y))
    return (np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)).max()


@pytest.mark.parametrize("source, target", list(itertools.product(pre.OUTPUTS, repeat=2)))
def test_conversions_round_trip(source, target):
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(0, 1001) / 1000)
        z, out = (jax.random.normal(jax.random.key(i), (1001, 6)) for i in (0, 1))
        there = pre.convert(source, target, SD, z, out, t)
        assert _relative(pre.convert(target, source, SD, z, there, t), out) < 1e-12
        assert source == target or _relative(there, out) > 1e-3


def test_conversions_agree_with_the_definitions():
    with jax.enable_x64(True):
        t = jnp.asarray([0.0, 0.3, 1.0])
        x0, eps = (jax.random.normal(jax.random.key(i), (3, 6)) for i in (0, 1))
        a, s = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}
        for source, target in itertools.product(pre.OUTPUTS, repeat=2):
            got = pre.convert(source, target, SD, a * x0 + s * eps, out[source], t)
            np.testing.assert_allclose(got, out[target], atol=1e-12)


@pytest.mark.parametrize("n", COUNTS)
def test_the_three_readings_agree_at_every_grid_time(n):
    """Each reading's own constant output, from the pair's ends alone, gives back the chord's velocity everywhere."""
    _, t_s, t_e = locate(GRID_TIMES, n)
    last = np.asarray(bounds(n)[1:-1], np.float32)  # the inner bounds once more, as the end of the window before
    t = np.concatenate([GRID_TIMES, last])
    t_s, t_e = np.concatenate([t_s, last + np.float32(1 / n)]), np.concatenate([t_e, last])
    t_s = np.float32(np.round(t_s * 1000) / 1000)
    z_s, z_e = _normal(0, len(t), 16), _normal(1, len(t), 16)

    v = chord(z_s, z_e, t_s, t_e)
    z = interpolate("linear", SD, z_s, z_e, t_s, t_e, t)
    a_s, a_e, s_s, s_e = (np.asarray(f(u), np.float64)[:, None] for f in (SD.alpha, SD.sigma) for u in (t_s, t_e))
    ends = [np.asarray(x, np.float64) for x in (z_s, z_e)]
    g = a_s / a_e
    outs = {
        "velocity": v,
        "ddim_eps": (ends[1] - a_e / a_s * ends[0]) / (s_e - a_e / a_s * s_s),
        "diff_eps": (ends[0] - g * ends[1]) / np.sqrt(1 - g**2),
    }
    for name, out in outs.items():
        out = jnp.asarray(out, jnp.float32)
        assert _relative(pre.to_velocity(name, "linear", SD, z, out, t, t_s, t_e), v) < 1e-5, name
        assert _relative(pre.from_velocity(name, "linear", SD, z, v, t, t_s, t_e), out) < 1e-5, name


@pytest.mark.parametrize("prediction, path", PAIRED)
def test_from_velocity_undoes_to_velocity(prediction, path):
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(2, 1001) / 1000)
        _, t_s, t_e = locate(t, 4)
        z, out = (jax.random.normal(jax.random.key(i), (999, 6)) for i in (0, 1))
        v = pre.to_velocity(prediction, path, SD, z, out, t, t_s, t_e)
        assert _relative(pre.from_velocity(prediction, path, SD, z, v, t, t_s, t_e), out) < 1e-8


@pytest.mark.parametrize("n", [*COUNTS, 1000])
@pytest.mark.parametrize("prediction, path", PAIRED)
def test_both_directions_are_finite_everywhere(prediction, path, n):
    _, t_s, t_e = locate(GRID_TIMES, n)
    z, x = _normal(0, 1001, 4), _normal(1, 1001, 4)
    for t in (GRID_TIMES, t_s, t_e, (t_s + 2 * t_e) / 3):
        assert np.all(np.isfinite(pre.to_velocity(prediction, path, SD, z, x, t, t_s, t_e)))
        back = lambda v: pre.from_velocity(prediction, path, SD, z, v, t, t_s, t_e)  # noqa: B023, E731
        out, pull = jax.vjp(back, x)
        assert np.all(np.isfinite(out)) and np.all(np.isfinite(pull(jnp.ones_like(out))[0]))


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("path", ["linear", "first_order"])
def test_an_epsilon_model_is_already_a_ddim_eps_student(path, n):
    """The step-0 identity: advance over each whole window equals the chain of N DDIM steps of the same model."""
    b = np.float32(bounds(n))
    model = lambda z, t: jnp.tanh(z + t[:, None])  # noqa: E731
    ours = theirs = _normal(0, 3, 8)
    for s, e in zip(b[:-1], b[1:], strict=True):
        t_s, t_e = jnp.full(3, s), jnp.full(3, e)
        ours = pre.advance("ddim_eps", path, SD, ours, model(ours, t_s), t_s, t_e, t_s, t_e)
        theirs = pre.ddim_jump(SD, theirs, model(theirs, t_s), t_s, t_e)
        assert _relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("path", ["linear", "first_order"])
def test_a_v_student_is_an_epsilon_student_in_other_words(path):
    """At every t of a window: the v of the state it was given, read as epsilon, means the same velocity and the same step."""
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(2, 1001) / 1000)
        _, t_s, t_e = locate(t, 4)
        z, eps = (jax.random.normal(jax.random.key(i), (999, 6)) for i in (0, 1))
        v = pre.convert("epsilon", "v_prediction", SD, z, eps, t)
        for move in (pre.to_velocity, lambda *x: pre.advance(*x[:6], t_e, *x[6:])):
            ours, theirs = move("ddim_v", path, SD, z, v, t, t_s, t_e), move("ddim_eps", path, SD, z, eps, t, t_s, t_e)
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("reading, kind", pre.JUMPS.items())
def test_that_chain_is_the_stock_ddim_scheduler(n, reading, kind):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        set_alpha_to_one=False, clip_sample=False, prediction_type=kind,
    )  # fmt: skip
    stock.set_timesteps(n)
    z = np.asarray(_normal(0, 2, 8))
    theirs, ours = torch.from_numpy(z.copy()), jnp.asarray(z)
    for i, (s, e) in enumerate(zip(bounds(n)[:-1], bounds(n)[1:], strict=True)):
        out, t_s, t_e = np.asarray(_normal(i + 1, 2, 8)), jnp.full(2, s), jnp.full(2, e)
        theirs = stock.step(torch.from_numpy(out.copy()), stock.timesteps[i], theirs).prev_sample
        ours = pre.advance(reading, "linear", SD, ours, jnp.asarray(out), t_s, t_e, t_s, t_e)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("prediction, path", CONSTANT)
def test_advance_in_any_sub_steps_ends_at_the_same_state(prediction, path):
    with jax.enable_x64(True):
        b = jnp.asarray(bounds(4))
        t_s, t_e = b[:-1], b[1:]
        z_s, out = (jax.random.normal(jax.random.key(i), (4, 6)) for i in (0, 1))
        whole = pre.advance(prediction, path, SD, z_s, out, t_s, t_e, t_s, t_e)
        z, t = z_s, t_s
        for part in (0.2, 0.7, 1.0):
            u = (1 - part) * t_s + part * t_e
            z = pre.advance(prediction, path, SD, z, out, t, u, t_s, t_e)
            t = u
            np.testing.assert_allclose(z, interpolate(path, SD, z_s, whole, t_s, t_e, t), atol=1e-9)


def test_the_first_order_velocity_has_its_derivative_as_limit():
    with jax.enable_x64(True):
        t_s, t_e = jnp.array([1.0, 0.5]), jnp.array([0.5, 0.25])
        z, eps = (jax.random.normal(jax.random.key(i), (2, 6)) for i in (0, 1))
        at = lambda t: pre.to_velocity("ddim_eps", "first_order", SD, z, eps, t, t_s, t_e)  # noqa: E731
        np.testing.assert_allclose(at(t_e), pre.flow_velocity(SD, z, eps, t_e), rtol=1e-12)
        np.testing.assert_allclose(at(t_e), at(t_e + 1e-6), rtol=1e-4)


def test_the_flow_velocity_is_the_derivative_of_a_ddim_jump():
    with jax.enable_x64(True):
        t, h = jnp.array([0.9, 0.5, 0.02]), 1e-7
        z, eps = (jax.random.normal(jax.random.key(i), (3, 6)) for i in (0, 1))
        slope = (pre.ddim_jump(SD, z, eps, t, t + h) - pre.ddim_jump(SD, z, eps, t, t - h)) / (2 * h)
        np.testing.assert_allclose(pre.flow_velocity(SD, z, eps, t), slope, rtol=1e-4, atol=1e-6)


def test_wrong_names_are_refused_with_their_flag():
    t = jnp.array([0.5])
    with pytest.raises(ValueError, match=r"diff_eps.*--config\.student\.path"):
        pre.affine("diff_eps", "first_order", SD, t, t + 0.5, t)
    with pytest.raises(ValueError, match=r"velocity.*--config\.student\.path"):
        pre.advance("velocity", "first_order", SD, t[:, None], t[:, None], t, t, t + 0.5, t)
    with pytest.raises(ValueError, match=r"noise.*--config\.student\.prediction"):
        pre.affine("noise", "linear", SD, t, t + 0.5, t)
    with pytest.raises(ValueError, match=r"noise.*--config\.model"):
        pre.convert("epsilon", "noise", SD, t[:, None], t[:, None], t)
