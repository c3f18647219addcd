"""Laws of a rectified flow: exact ends, straight lines in sigma, orders of its solvers, the step-0 identity."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from tiny import quick_jit

from proreflow_jax.evaluation import trajectory
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import DIFFUSION, Parameterization, check_prediction, convert, ddim_jump, flow_velocity
from proreflow_jax.flow.schedule import RectifiedFlow, from_config, make_schedule, same_levels

FLOW = RectifiedFlow(3.0)
CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
GRID_TIMES = np.arange(1001) / 1000
SHIFTS = [0.3, 1.0, 1.15, 3.0, 3.1582, 17.3]
COUNTS = [1, 2, 4, 8]


def _normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# The schedule


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_levels_sum_to_one_and_their_ends_are_exact(shift):
    flow = RectifiedFlow(shift)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            t = jnp.asarray(GRID_TIMES)
            a, s = flow.alpha(t), flow.sigma(t)
            np.testing.assert_allclose(a + s, 1, rtol=1e-15 if x64 else 2e-7)
            assert (a[0], s[0], a[-1], s[-1]) == (1, 0, 0, 1)
            assert np.all(np.diff(s) > 0) and np.all(np.diff(a) < 0)
            inner = flow.log_snr(t)[1:-1]
            np.testing.assert_allclose(inner, 2 * np.log(np.asarray(a / s, np.float64)[1:-1]), rtol=1e-5, atol=1e-5)
            assert np.all(np.isfinite(flow.log_snr(t))) and np.all(np.diff(flow.log_snr(t)) < 0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_grid_times_are_the_stock_schedulers_training_times(shift):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    t = GRID_TIMES[:0:-1]
    np.testing.assert_allclose(RectifiedFlow(shift).sigma(t), theirs.sigmas.numpy(), rtol=2e-7)
    np.testing.assert_allclose(RectifiedFlow(shift).timestep(t), theirs.timesteps.numpy(), rtol=2e-7)
    assert FLOW.timestep(jnp.asarray(0.5, jnp.bfloat16)).dtype == jnp.float32


def test_rates_are_derivatives_on_the_clock():
    with jax.enable_x64(True):
        t, h = jnp.linspace(0.001, 0.999, 99), 1e-6
        span = FLOW.clock(t + h) - FLOW.clock(t - h)
        for level, rate in zip((FLOW.alpha, FLOW.sigma), FLOW.rates(t), strict=True):
            np.testing.assert_allclose(rate, (level(t + h) - level(t - h)) / span, rtol=1e-7)


def test_a_rectified_flow_is_equal_by_its_shift_and_lives_as_a_static():
    assert FLOW == RectifiedFlow(3.0) != RectifiedFlow(1.0) and hash(FLOW) == hash(RectifiedFlow(3.0))
    table, other = make_schedule("linear", 1e-4, 0.02), make_schedule("linear", 1e-4, 0.021)
    assert same_levels(FLOW, from_config(CONFIG)) and same_levels(table, make_schedule("linear", 1e-4, 0.02))
    assert not any(same_levels(*two) for two in ((FLOW, RectifiedFlow(2.0)), (FLOW, table), (table, FLOW), (table, other)))
    assert jax.jit(lambda s, t: s.alpha(t), static_argnums=0)(FLOW, 1.0) == 0


def test_from_config_reads_the_shift():
    assert from_config(CONFIG | {"base_shift": 0.5, "use_karras_sigmas": False, "shift_terminal": None}) == FLOW
    assert from_config({"_class_name": CONFIG["_class_name"]}) == RectifiedFlow(1.0)


FLAGS = ["use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"]


@pytest.mark.parametrize(
    "change",
    [
        *({name: True} for name in [*FLAGS, "stochastic_sampling"]),
        *({"shift": value} for value in (0.0, "3", True, float("nan"))),
        *({"shift_terminal": value} for value in (0.02, 0.5, "x", 2.0)),
        {"num_train_timesteps": 500},
    ],
)
def test_other_ways_to_move_are_refused_in_one_line(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}.*--config.model.path") as error:
        from_config(CONFIG | change)
    assert "\n" not in str(error.value)


# Prediction types


@pytest.mark.parametrize("source, target", list(itertools.product(DIFFUSION, repeat=2)))
def test_conversions_say_what_the_definitions_say_and_round_trip(source, target):
    with jax.enable_x64(True):
        t = jnp.asarray(GRID_TIMES[1:-1])
        x0, eps = (_normal(999, 6, seed=seed) for seed in (0, 1))
        a, s = FLOW.alpha(t)[:, None], FLOW.sigma(t)[:, None]
        outs, z = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}, a * x0 + s * eps
        there = convert(source, target, FLOW, z, outs[source], t)
        np.testing.assert_allclose(there, outs[target], atol=1e-11)
        np.testing.assert_allclose(convert(target, source, FLOW, z, there, t), outs[source], atol=1e-10)


def test_all_of_it_is_finite_at_both_ends():
    t, z, out = jnp.array([1.0, 0.0, 1.0, 0.0]), _normal(4, 3), _normal(4, 3, seed=1)
    made = [convert(source, target, FLOW, z, out, t) for source, target in itertools.product(DIFFUSION, repeat=2)]
    made += [ddim_jump(FLOW, z, out, t, u) for u in (t, jnp.array([0.0, 1.0, 0.5, 0.5]))]
    made += [flow_velocity(FLOW, z, out, t), FLOW.log_snr(t), *FLOW.rates(t)]
    for n in COUNTS:
        student, w = Parameterization("velocity", n), windows.locate(t, n)
        made += [f(FLOW, z, out, w) for f in (student.to_velocity, student.from_velocity)]
        made += [student.advance(FLOW, z, out, w, w.t_e), student.velocity(FLOW, z, out, t)]
    for name in solvers.SOLVERS:
        step = solvers.make_step(Parameterization("flow"), FLOW, lambda z, t: z, name)
        made += [solvers.solve(step, z, jnp.array([1.0, 0.6, 0.3, 0.0, 0.0]))]
        made += [step(z, t, u, (out, before))[0] for u in (t, t / 2) for before in (t, jnp.ones(4))]
    assert all(np.all(np.isfinite(each)) for each in made)


def test_a_models_output_is_its_velocity_at_every_time():
    z, out, t = _normal(1001, 3), _normal(1001, 3, seed=1), jnp.asarray(GRID_TIMES)
    np.testing.assert_array_equal(Parameterization("flow").velocity(FLOW, z, out, t), out)
    np.testing.assert_array_equal(Parameterization("velocity", 4).velocity(FLOW, z, out, t), out)
    eps = convert("flow", "epsilon", FLOW, z, out, t)
    np.testing.assert_allclose(flow_velocity(FLOW, z, eps, t)[1:-1], out[1:-1], atol=1e-2)  # digits are lost near t = 1


@pytest.mark.parametrize("name", ["ddim_eps", "diff_eps", "ddim_v"])
def test_what_has_no_meaning_on_a_rectified_flow_is_refused_in_one_line(name):
    w, z = windows.at_start(jnp.array([1]), 2), jnp.ones((1, 1))
    check_prediction(name, "linear")
    asks = [
        (rf"{name}.*velocity.*--config\.student\.prediction", lambda: Parameterization(name, 2).affine(FLOW, w)),
        (rf"{name}.*velocity.*--config\.student\.prediction", lambda: Parameterization(name, 2).advance(FLOW, z, z, w, w.t_e)),
        (r"first_order.*linear.*--config\.student\.path", lambda: check_prediction("velocity", "first_order", FLOW)),
        (r"first_order.*linear.*--config\.student\.path", lambda: windows.interpolate("first_order", FLOW, z, z, w)),
        (
            r"epsilon.*must be flow.*--config\.model",
            lambda: solvers.make_step(Parameterization("epsilon"), FLOW, lambda z, t: z),
        ),
    ]
    for words, ask in asks:
        with pytest.raises(ValueError, match=words) as error:
            ask()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'flow'.*must be one of epsilon, v_prediction, sample$"):
        solvers.make_step(Parameterization("flow"), make_schedule("linear", 1e-4, 0.02), lambda z, t: z)


# Windows


@pytest.mark.parametrize("n", [1, 2, 8, 1000])
def test_the_linear_path_is_straight_in_sigma_and_meets_both_ends(n):
    z_s, z_e, w = _normal(1000, 4), _normal(1000, 4, seed=1), windows.at_start(np.resize(np.arange(n), 1000), n)
    between = quick_jit(partial(windows.interpolate, "linear", FLOW))
    np.testing.assert_array_equal(between(z_s, z_e, w), z_s)
    np.testing.assert_allclose(between(z_s, z_e, w._replace(t=w.t_e)), z_e, rtol=1e-6)
    w = w._replace(t=0.3 * w.t_s + 0.7 * w.t_e)
    v = windows.chord(FLOW, z_s, z_e, w.t_s, w.t_e)
    moved = z_s + (FLOW.sigma(w.t) - FLOW.sigma(w.t_s))[:, None] * v
    np.testing.assert_allclose(between(z_s, z_e, w), moved, atol=2e-4 if n == 1000 else 1e-5)


def test_one_window_from_noise_to_data_is_the_training_path():
    x0, eps, t = _normal(1001, 4), _normal(1001, 4, seed=1), jnp.asarray(GRID_TIMES)
    z = FLOW.alpha(t)[:, None] * x0 + FLOW.sigma(t)[:, None] * eps
    np.testing.assert_allclose(windows.interpolate("linear", FLOW, eps, x0, windows.locate(t, 1)), z, atol=2e-6)
    np.testing.assert_allclose(windows.chord(FLOW, eps, x0, jnp.ones(1001), jnp.zeros(1001)), eps - x0, rtol=1e-6)


def test_advance_in_any_sub_steps_ends_at_the_same_state():
    student, w = Parameterization("velocity", 4), windows.at_start(jnp.arange(4), 4)
    z, v = _normal(4, 6), _normal(4, 6, seed=1)
    whole = student.advance(FLOW, z, v, w, w.t_e)
    np.testing.assert_allclose(windows.chord(FLOW, z, whole, w.t_s, w.t_e), v, rtol=1e-5, atol=1e-5)
    for part in (0.2, 0.7, 1.0):
        u = (1 - part) * w.t_s + part * w.t_e
        z, w = student.advance(FLOW, z, v, w, u), w._replace(t=u)
    np.testing.assert_allclose(z, whole, atol=1e-6)


def test_a_straight_flow_measures_straight():
    v, nodes = _normal(3, 2), windows.sampling_nodes(20, 4)
    walk = trajectory.trajectory(Parameterization("flow"), FLOW, lambda z, t: v, _normal(3, 2, seed=1), nodes)
    assert np.max(trajectory.straightness(FLOW, *walk, nodes, 4)[1]) < 1e-9
    relative, cosine = trajectory.velocity_error(lambda z, t: v, FLOW, "linear", walk[0][::5], trajectory.window_times(4, 3))
    assert np.max(relative) < 1e-5 and np.min(cosine) > 1 - 1e-5
    bent = trajectory.trajectory(Parameterization("flow"), FLOW, lambda z, t: z, _normal(3, 2, seed=1), nodes)
    s, c = np.asarray(FLOW.sigma(nodes), np.float64), np.asarray(bent[0], np.float64)
    chord = (c[-1] - c[0]) / (s[-1] - s[0])
    by_hand = np.sum(((c[:-1] - chord) ** 2).mean(-1) * -np.diff(s)[:, None], axis=0)
    np.testing.assert_allclose(trajectory.straightness(FLOW, *bent, nodes, 1)[0][:, 0], by_hand, rtol=1e-4)


# Solvers, on data drawn from a Gaussian mixture

MEANS, WEIGHTS, WIDTH = np.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]]), np.array([0.5, 0.3, 0.2]), 0.5


def mixture_flow(z, s):
    """The exact eps - x0 of the mixture, noised to (1 - s) x0 + s eps; s: (b,)."""
    a, s = 1 - s[:, None], s[:, None]
    variance = (a * WIDTH) ** 2 + s**2
    away = z[:, None, :] - a[..., None] * MEANS
    part = jax.nn.softmax(jnp.log(WEIGHTS) - (away**2).sum(-1) / (2 * variance), axis=1)[..., None]
    x0 = (part * (MEANS + (a * WIDTH**2 / variance)[..., None] * away)).sum(1)
    return s / variance * (part * away).sum(1) - x0


@cache
def exact(t, u):
    """The flow of `drawn` from t to u, by DOP853 in sigma."""
    with jax.enable_x64(True):
        slope = quick_jit(lambda s, z: mixture_flow(z.reshape(16, 2), jnp.full(16, s)).ravel())
        ends = [float(FLOW.sigma(time)) for time in (t, u)]
        solved = solve_ivp(lambda s, z: np.asarray(slope(s, z)), ends, drawn().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return solved.y[:, -1].reshape(16, 2)


def drawn():
    """16 states."""
    return np.random.default_rng(0).normal(size=(16, 2))


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_order_is_the_slope_of_the_error_in_every_window(name, order):
    """log(a/s), in which dpmpp_2m draws its line, is infinite at both ends: its order is reached from below there."""
    starts, counts = np.array([1.0, 0.75, 0.5, 0.25]), [25, 50, 125]
    step = solvers.make_step(Parameterization("flow"), FLOW, lambda z, t: mixture_flow(z, FLOW.sigma(t)), name)
    with jax.enable_x64(True):
        walk = quick_jit(lambda z, times: solvers.solve(step, z, times, keep=True)[1])
        t_s, z = jnp.asarray(np.repeat(starts, 16)), np.tile(drawn(), (4, 1))
        ends = []
        for count in counts:
            times = np.asarray(windows.nodes(t_s, t_s - 0.25, count))
            ends.append(walk(z, np.concatenate([times, np.repeat(times[-1:], 125 - count, axis=0)]))[count].reshape(4, 16, 2))
    truth = np.stack([exact(t, t - 0.25) for t in starts])
    errors = np.sqrt(np.mean((np.stack(ends) - truth) ** 2, axis=(2, 3)))
    slopes = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    slack = np.array([0.2, 0.1, 0.1, 0.6]) if name == "dpmpp_2m" else 0.15
    assert np.all(np.abs(slopes - order) < slack), (slopes, errors)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_straight_flow_is_solved_exactly_in_any_steps(name):
    """To one x0 from every noise: then eps, x0 and the velocity stay the same along the line."""
    x0, eps = _normal(3, 4), _normal(3, 4, seed=1)
    toward = lambda z, t: jnp.where(t[:, None] > 0, (z - x0) / jnp.where(t > 0, FLOW.sigma(t), 1.0)[:, None], 0.0)
    step = solvers.make_step(Parameterization("flow"), FLOW, toward, name)
    for steps in (1, 3):
        np.testing.assert_allclose(solvers.solve(step, eps, windows.sampling_nodes(steps, 1)), x0, atol=2e-6)


def test_ddim_of_both_ends_is_eulers_step_in_sigma():
    z, v = _normal(1001, 4), _normal(1001, 4, seed=1)
    t, u = jnp.asarray(GRID_TIMES), jnp.asarray(np.random.default_rng(2).permutation(GRID_TIMES))
    euler = solvers.euler_step(FLOW, lambda z, t: v, z, t, u)
    x0, eps = (convert("flow", target, FLOW, z, v, t) for target in ("sample", "epsilon"))
    np.testing.assert_allclose(FLOW.alpha(u)[:, None] * x0 + FLOW.sigma(u)[:, None] * eps, euler, atol=2e-6)
    with jax.enable_x64(True):
        z, v, t, u = (jnp.asarray(x, jnp.float64)[:1000] for x in (z, v, GRID_TIMES, u))
        jump = ddim_jump(FLOW, z, convert("flow", "epsilon", FLOW, z, v, t), t, u)
        np.testing.assert_allclose(jump, solvers.euler_step(FLOW, lambda z, t: v, z, t, u), atol=1e-11)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_an_untrained_student_is_n_euler_steps_of_its_teacher_bit_for_bit(n, solver):
    """The step-0 identity: one network, read as the teacher's flow and as the velocity of n windows."""
    model, z, times = lambda z, t: jnp.tanh(z + t[:, None]), _normal(5, 7), windows.bounds(n).astype(np.float32)
    teacher = solvers.make_step(Parameterization("flow"), FLOW, model, solver)
    student = solvers.make_step(Parameterization("velocity", n), FLOW, model)
    for run in (lambda step: solvers.solve(step, z, times), lambda step: jax.jit(partial(solvers.solve, step))(z, times)):
        np.testing.assert_array_equal(run(student), run(teacher))
