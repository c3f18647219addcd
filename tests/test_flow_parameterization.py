"""Laws of the prediction types: conversions undo each other, and all types say the same velocity of one straight line."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_jit

from proreflow_jax.flow.parameterization import DIFFUSION, JUMPS, Parameterization, convert, ddim_jump, flow_velocity
from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.flow.windows import Window, at_start, chord, interpolate, locate

SD = make_schedule("scaled_linear", 0.00085, 0.012)
GRID_TIMES = (np.arange(1001) / 1000).astype(np.float32)
COUNTS = [2, 4, 8, 5]
CONSTANT = [("velocity", "linear"), ("ddim_eps", "linear"), ("diff_eps", "linear"), ("ddim_eps", "first_order")]  # in a window
PAIRED = [*CONSTANT, ("ddim_v", "linear"), ("ddim_v", "first_order")]


flow_of = quick_jit(flow_velocity, static_argnums=0)  # (schedule, z, eps, t)


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
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}
        for source, target in itertools.product(DIFFUSION, repeat=2):
            got = convert(source, target, SD, a * x0 + s * eps, out[source], t)
            np.testing.assert_allclose(got, out[target], atol=1e-12)


@quick_jit
def said_back(n, w, z, v, outs):
    """{type: (the velocity its output means, the output that means v)}: one program for every number of windows."""
    students = {name: Parameterization(name, n) for name in outs}
    return {name: (s.to_velocity(SD, z, outs[name], w), s.from_velocity(SD, z, v, w)) for name, s in students.items()}


@pytest.mark.parametrize("n", COUNTS)
def test_the_three_types_agree_at_every_grid_time(n):
    """Each type's own constant output, from the pair's ends alone, gives back the chord's velocity everywhere."""
    inner = np.resize(np.arange(n - 1), max(COUNTS) - 1)  # as many for every n: arrays of one shape are compiled for once
    ends = at_start(inner, n)  # the inner bounds once more, as the end of the window before
    w = Window(*map(jnp.concatenate, zip(locate(GRID_TIMES, n), ends._replace(t=ends.t_e), strict=True)))
    z_s, z_e = _normal(0, len(w.t), 16), _normal(1, len(w.t), 16)

    v = chord(SD, z_s, z_e, w.t_s, w.t_e)
    z = interpolate("linear", SD, z_s, z_e, w)
    a_s, a_e, s_s, s_e = (np.asarray(f(u), np.float64)[:, None] for f in (SD.alpha, SD.sigma) for u in (w.t_s, w.t_e))
    ends = [np.asarray(x, np.float64) for x in (z_s, z_e)]
    g = a_s / a_e
    outs = {
        "velocity": v,
        "ddim_eps": (ends[1] - a_e / a_s * ends[0]) / (s_e - a_e / a_s * s_s),
        "diff_eps": (ends[0] - g * ends[1]) / np.sqrt(1 - g**2),
    }
    outs = {name: jnp.asarray(out, jnp.float32) for name, out in outs.items()}
    for name, (velocity, output) in said_back(n, w, z, v, outs).items():
        assert _relative(velocity, v) < 1e-5, name
        assert _relative(output, outs[name]) < 1e-5, name


@pytest.mark.parametrize("prediction, path", PAIRED)
def test_from_velocity_undoes_to_velocity(prediction, path):
    with jax.enable_x64(True):
        t = jnp.asarray(np.arange(2, 1001) / 1000)
        student, w = Parameterization(prediction, 4, path), locate(t, 4)
        z, out = (jax.random.normal(jax.random.key(i), (999, 6)) for i in (0, 1))
        v = student.to_velocity(SD, z, out, w)
        assert _relative(student.from_velocity(SD, z, v, w), out) < 1e-8


@cache
def both_directions(prediction, path):
    """(velocity, output, pull-back of ones) of (number of windows, window, z, x): one program for every number of windows."""

    def both(n, w, z, x):
        student = Parameterization(prediction, n, path)
        out, pull = jax.vjp(lambda v: student.from_velocity(SD, z, v, w), x)
        return student.to_velocity(SD, z, x, w), out, pull(jnp.ones_like(out))[0]

    return quick_jit(both)


@pytest.mark.parametrize("n", [*COUNTS, 1000])
@pytest.mark.parametrize("prediction, path", PAIRED)
def test_both_directions_are_finite_everywhere(prediction, path, n):
    w = locate(GRID_TIMES, n)
    z, x = _normal(0, 1001, 4), _normal(1, 1001, 4)
    for t in (GRID_TIMES, w.t_s, w.t_e, (w.t_s + 2 * w.t_e) / 3):
        assert all(np.all(np.isfinite(v)) for v in both_directions(prediction, path)(n, w._replace(t=t), z, x))


@cache
def both_crossed(path):
    """The student's and DDIM's state at the end of a window, by one model: one program for every number of windows."""
    model = lambda z, t: jnp.tanh(z + t[:, None])

    def both(n, ours, theirs, w):
        student = Parameterization("ddim_eps", n, path)
        jump = ddim_jump(SD, theirs, model(theirs, w.t_s), w.t_s, w.t_e)
        return student.advance(SD, ours, model(ours, w.t), w, w.t_e), jump

    return quick_jit(both)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("path", ["linear", "first_order"])
def test_an_epsilon_model_is_already_a_ddim_eps_student(path, n):
    """The step-0 identity: advance over each whole window equals the chain of N DDIM steps of the same model."""
    ours = theirs = _normal(0, 3, 8)
    for k in range(n):
        ours, theirs = both_crossed(path)(n, ours, theirs, at_start(jnp.full(3, k), n))
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
        at = quick_jit(lambda t: student.to_velocity(SD, z, eps, w._replace(t=t)))
        np.testing.assert_allclose(at(w.t_e), flow_of(SD, z, eps, w.t_e), rtol=1e-12)
        np.testing.assert_allclose(at(w.t_e), at(w.t_e + 1e-6), rtol=1e-4)


def test_the_flow_velocity_is_the_derivative_of_a_ddim_jump():
    with jax.enable_x64(True):
        t, h = jnp.array([0.9, 0.5, 0.02]), 1e-7
        z, eps = (jax.random.normal(jax.random.key(i), (3, 6)) for i in (0, 1))
        jump = quick_jit(lambda u: ddim_jump(SD, z, eps, t, u))
        slope = (jump(t + h) - jump(t - h)) / (2 * h)
        np.testing.assert_allclose(flow_of(SD, z, eps, t), slope, rtol=1e-4, atol=1e-6)


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


@quick_jit
def students_velocity(z, eps, t):
    """At a time alone, and in the window that holds it."""
    student = Parameterization("ddim_eps", 4)
    return student.velocity(SD, z, eps, t), student.to_velocity(SD, z, eps, locate(t, 4))


@pytest.mark.parametrize("prediction", DIFFUSION)
def test_every_network_has_a_velocity_at_a_time(prediction):
    """A diffusion model's is the probability flow of its epsilon, a student's that of the window which holds the time."""
    t, (z, eps) = jnp.array([0.9, 0.5, 0.02]), (_normal(i, 3, 6) for i in (0, 1))
    through = lambda z, eps, t: Parameterization(prediction).velocity(SD, z, convert("epsilon", prediction, SD, z, eps, t), t)
    np.testing.assert_allclose(quick_jit(through)(z, eps, t), flow_of(SD, z, eps, t), rtol=1e-3)
    np.testing.assert_array_equal(*students_velocity(z, eps, t))
