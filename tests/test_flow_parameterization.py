"""Laws of the prediction types: conversions undo each other, and all types say the same velocity of one straight line."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.flow.parameterization import DIFFUSION, JUMPS, Parameterization, convert, ddim_jump, flow_velocity
from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.flow.windows import Window, at_start, chord, interpolate, locate

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


@pytest.mark.parametrize("source, target", list(itertools.product(DIFFUSION, repeat=2)))
def test_conversions_round_trip(source, target):
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(0, 1001) / 1000)
        z, out = (jax.random.normal(jax.random.key(i), (1001, 6)) for i in (0, 1))
        there = convert(source, target, SD, z, out, t)
        assert _relative(convert(target, source, SD, z, there, t), out) < 1e-12
        assert source == target or _relative(there, out) > 1e-3


def test_conversions_agree_with_the_definitions():
    with jax.enable_x64(True):
        t = jnp.asarray([0.0, 0.3, 1.0])
        x0, eps = (jax.random.normal(jax.random.key(i), (3, 6)) for i in (0, 1))
        a, s = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}
        for source, target in itertools.product(DIFFUSION, repeat=2):
            got = convert(source, target, SD, a * x0 + s * eps, out[source], t)
            np.testing.assert_allclose(got, out[target], atol=1e-12)


@pytest.mark.parametrize("n", COUNTS)
def test_the_three_types_agree_at_every_grid_time(n):
    """Each type's own constant output, from the pair's ends alone, gives back the chord's velocity everywhere."""
    ends = at_start(np.arange(n - 1), n)  # the inner bounds once more, as the end of the window before
    w = Window(*map(jnp.concatenate, zip(locate(GRID_TIMES, n), ends._replace(t=ends.t_e), strict=True)))
    z_s, z_e = _normal(0, len(w.t), 16), _normal(1, len(w.t), 16)

    v = chord(z_s, z_e, w.t_s, w.t_e)
    z = interpolate("linear", SD, z_s, z_e, w)
    a_s, a_e, s_s, s_e = (np.asarray(f(u), np.float64)[:, None] for f in (SD.alpha, SD.sigma) for u in (w.t_s, w.t_e))
    ends = [np.asarray(x, np.float64) for x in (z_s, z_e)]
    g = a_s / a_e
    outs = {
        "velocity": v,
        "ddim_eps": (ends[1] - a_e / a_s * ends[0]) / (s_e - a_e / a_s * s_s),
        "diff_eps": (ends[0] - g * ends[1]) / np.sqrt(1 - g**2),
    }
    for name, out in outs.items():
        out = jnp.asarray(out, jnp.float32)
        assert _relative(Parameterization(name, n).to_velocity(SD, z, out, w), v) < 1e-5, name
        assert _relative(Parameterization(name, n).from_velocity(SD, z, v, w), out) < 1e-5, name


@pytest.mark.parametrize("prediction, path", PAIRED)
def test_from_velocity_undoes_to_velocity(prediction, path):
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(2, 1001) / 1000)
        student, w = Parameterization(prediction, 4, path), locate(t, 4)
        z, out = (jax.random.normal(jax.random.key(i), (999, 6)) for i in (0, 1))
        v = student.to_velocity(SD, z, out, w)
        assert _relative(student.from_velocity(SD, z, v, w), out) < 1e-8


@pytest.mark.parametrize("n", [*COUNTS, 1000])
@pytest.mark.parametrize("prediction, path", PAIRED)
def test_both_directions_are_finite_everywhere(prediction, path, n):
    student, w = Parameterization(prediction, n, path), locate(GRID_TIMES, n)
    z, x = _normal(0, 1001, 4), _normal(1, 1001, 4)
    for t in (GRID_TIMES, w.t_s, w.t_e, (w.t_s + 2 * w.t_e) / 3):
        assert np.all(np.isfinite(student.to_velocity(SD, z, x, w._replace(t=t))))
        back = lambda v: student.from_velocity(SD, z, v, w._replace(t=t))  # noqa: B023, E731
        out, pull = jax.vjp(back, x)
        assert np.all(np.isfinite(out)) and np.all(np.isfinite(pull(jnp.ones_like(out))[0]))


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("path", ["linear", "first_order"])
def test_an_epsilon_model_is_already_a_ddim_eps_student(path, n):
    """The step-0 identity: advance over each whole window equals the chain of N DDIM steps of the same model."""
    student = Parameterization("ddim_eps", n, path)
    model = lambda z, t: jnp.tanh(z + t[:, None])  # noqa: E731
    ours = theirs = _normal(0, 3, 8)
    for k in range(n):
        w = at_start(jnp.full(3, k), n)
        ours = student.advance(SD, ours, model(ours, w.t), w, w.t_e)
        theirs = ddim_jump(SD, theirs, model(theirs, w.t_s), w.t_s, w.t_e)
        assert _relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("path", ["linear", "first_order"])
def test_a_v_student_is_an_epsilon_student_in_other_words(path):
    """At every t of a window: an epsilon and the same output as a v mean the same velocity and the same step."""
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(2, 1001) / 1000)
        w = locate(t, 4)
        z, eps = (jax.random.normal(jax.random.key(i), (999, 6)) for i in (0, 1))
        v = convert("epsilon", "v_prediction", SD, z, eps, t)
        ours, theirs = (Parameterization(name, 4, path) for name in ("ddim_v", "ddim_eps"))
        same = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        same(ours.to_velocity(SD, z, v, w), theirs.to_velocity(SD, z, eps, w))
        same(ours.advance(SD, z, v, w, w.t_e), theirs.advance(SD, z, eps, w, w.t_e))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("prediction, kind", JUMPS.items())
def test_that_chain_is_the_stock_ddim_scheduler(n, prediction, kind):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        set_alpha_to_one=False, clip_sample=False, prediction_type=kind,
    )  # fmt: skip
    stock.set_timesteps(n)
    z = np.asarray(_normal(0, 2, 8))
    theirs, ours = torch.from_numpy(z.copy()), jnp.asarray(z)
    for k in range(n):
        out, w = np.asarray(_normal(k + 1, 2, 8)), at_start(jnp.full(2, k), n)
        theirs = stock.step(torch.from_numpy(out.copy()), stock.timesteps[k], theirs).prev_sample
        ours = Parameterization(prediction, n).advance(SD, ours, jnp.asarray(out), w, w.t_e)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("prediction, path", CONSTANT)
def test_advance_in_any_sub_steps_ends_at_the_same_state(prediction, path):
    with jax.enable_x64(True):
        student, w = Parameterization(prediction, 4, path), at_start(jnp.arange(4), 4)
        z_s, out = (jax.random.normal(jax.random.key(i), (4, 6)) for i in (0, 1))
        z, whole = z_s, student.advance(SD, z_s, out, w, w.t_e)
        for part in (0.2, 0.7, 1.0):
            u = (1 - part) * w.t_s + part * w.t_e
            z, w = student.advance(SD, z, out, w, u), w._replace(t=u)
            np.testing.assert_allclose(z, interpolate(path, SD, z_s, whole, w), atol=1e-9)


def test_the_first_order_velocity_has_its_derivative_as_limit():
    with jax.enable_x64(True):
        student, w = Parameterization("ddim_eps", 4, "first_order"), at_start(jnp.array([0, 2]), 4)
        z, eps = (jax.random.normal(jax.random.key(i), (2, 6)) for i in (0, 1))
        at = lambda t: student.to_velocity(SD, z, eps, w._replace(t=t))  # noqa: E731
        np.testing.assert_allclose(at(w.t_e), flow_velocity(SD, z, eps, w.t_e), rtol=1e-12)
        np.testing.assert_allclose(at(w.t_e), at(w.t_e + 1e-6), rtol=1e-4)


def test_the_flow_velocity_is_the_derivative_of_a_ddim_jump():
    with jax.enable_x64(True):
        t, h = jnp.array([0.9, 0.5, 0.02]), 1e-7
        z, eps = (jax.random.normal(jax.random.key(i), (3, 6)) for i in (0, 1))
        slope = (ddim_jump(SD, z, eps, t, t + h) - ddim_jump(SD, z, eps, t, t - h)) / (2 * h)
        np.testing.assert_allclose(flow_velocity(SD, z, eps, t), slope, rtol=1e-4, atol=1e-6)


def test_wrong_names_are_refused_with_their_flag():
    w, z = at_start(jnp.array([1]), 2), jnp.ones((1, 1))
    with pytest.raises(ValueError, match=r"diff_eps.*--config\.student\.path"):
        Parameterization("diff_eps", 2, "first_order").affine(SD, w)
    with pytest.raises(ValueError, match=r"velocity.*--config\.student\.path"):
        Parameterization("velocity", 2, "first_order").advance(SD, z, z, w, w.t_e)
    with pytest.raises(ValueError, match=r"noise.*--config\.student\.prediction"):
        Parameterization("noise", 2).affine(SD, w)
    with pytest.raises(ValueError, match=r"noise.*--config\.model"):
        convert("epsilon", "noise", SD, z, z, w.t)


@pytest.mark.parametrize("prediction", DIFFUSION)
def test_every_network_has_a_velocity_at_a_time(prediction):
    """A diffusion model's is the probability flow of its epsilon, a student's that of the window which holds the time."""
    t, (z, eps) = jnp.array([0.9, 0.5, 0.02]), (_normal(i, 3, 6) for i in (0, 1))
    out = convert("epsilon", prediction, SD, z, eps, t)
    np.testing.assert_allclose(Parameterization(prediction).velocity(SD, z, out, t), flow_velocity(SD, z, eps, t), rtol=1e-3)
    student = Parameterization("ddim_eps", 4)
    np.testing.assert_array_equal(student.velocity(SD, z, eps, t), student.to_velocity(SD, z, eps, locate(t, 4)))
