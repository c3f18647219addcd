"""Laws of the solvers: their order against an exact flow, straight flows in one step, guidance in one call."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import softmax
from tiny import quick_jit

from proreflow_jax.flow import solvers
from proreflow_jax.flow.schedule import make_schedule, per_example
from proreflow_jax.flow.windows import nodes

SD = make_schedule("scaled_linear", 0.00085, 0.012)
MEANS = np.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
WIDTH = 0.5


def mixture_eps(z, a, s, soft=softmax, xp=np):
    """The exact epsilon -s grad log p(z) of data drawn from a Gaussian mixture, noised to a x0 + s eps."""
    variance = (a * WIDTH) ** 2 + s**2
    away = z[:, None, :] - (a * xp.ones(()))[..., None, None] * MEANS.astype(z.dtype)
    part = soft(np.log(WEIGHTS).astype(z.dtype) - (away**2).sum(-1) / (2 * variance[..., None]), axis=1)
    return (s / variance)[..., None] * (part[..., None] * away).sum(1)


def predict_eps(z, t):
    return mixture_eps(z, SD.alpha(t), SD.sigma(t), jax.nn.softmax, jnp)


def drawn(seed):
    """16 states."""
    return np.random.default_rng(seed).normal(size=(16, 2))


@cache
def exact(seed, t, u):
    """The probability flow of `drawn(seed)` from t to u, once for all solvers.

    By DOP853 in the coordinates y = z/a, r = s/a, where dy/dr = eps.
    """
    z = drawn(seed)
    table = lambda w: SD.alphas_cumprod[max(round(1000 * w) - 1, 0)]  # noqa: E731
    r = [np.sqrt(1 / table(w) - 1) for w in (t, u)]

    def slope(r, y):
        a = 1 / np.sqrt(1 + r**2)
        return mixture_eps(a * y.reshape(z.shape), np.full(len(z), a), np.full(len(z), a * r)).ravel()

    y = solve_ivp(slope, r, (z / np.sqrt(table(t))).ravel(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return np.sqrt(table(u)) * y.reshape(z.shape)


@cache
def walk(name):
    """Every state of a solver at given nodes: where nodes are filled up to one shape, one program serves many walks."""
    step = solvers.make_solver_step(name, SD, predict_eps)
    return quick_jit(lambda z, times: solvers.solve(step, z, times, keep=True)[1])


def filled(times, count):
    """`count` nodes and the first: what is missing stands at the last."""
    times = np.asarray(times)
    return np.concatenate([times, np.repeat(times[-1:], count + 1 - len(times), axis=0)])


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_order_is_the_slope_of_the_error(name, order):
    """In the first three of four windows, crossed side by side; the table has a steep end in the last."""
    starts, counts = np.array([1.0, 0.75, 0.5]), [25, 50, 125]
    z = drawn(0)
    truth = np.stack([exact(0, t, t - 0.25) for t in starts])
    with jax.enable_x64(True):
        t_s, z = jnp.asarray(np.repeat(starts, 16)), np.tile(z, (3, 1))
        ends = [np.asarray(walk(name)(z, filled(nodes(t_s, t_s - 0.25, k), 125))[k]).reshape(truth.shape) for k in counts]
    errors = np.sqrt(np.mean((np.stack(ends) - truth) ** 2, axis=(2, 3)))
    slopes = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert np.all(np.abs(slopes - order) < 0.1), (slopes, errors)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize("t_s, t_e, steps", [(0.25, 0.0, 8), (1.0, 0.0, 20), (0.002, 0.0, 2)])
def test_the_last_window_is_finite_and_near_the_truth(name, t_s, t_e, steps):
    out = np.asarray(walk(name)(drawn(1).astype(np.float32), filled(nodes(t_s, t_e, steps), 20))[steps])
    assert np.sqrt(np.mean((out - exact(1, t_s, t_e)) ** 2)) < 0.1


def test_dpmpp_starts_and_ends_as_ddim():
    z, times = jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([0.25, 0.0])
    both = [walk(name)(z, times)[-1] for name in ("ddim", "dpmpp_2m")]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-6)


def test_dpmpp_2m_is_the_stock_multistep_scheduler():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    stock.set_timesteps(10)
    z = jax.random.normal(jax.random.key(0), (4, 2))
    theirs = torch.from_numpy(np.array(z))
    predict = quick_jit(predict_eps)
    for timestep in stock.timesteps:
        eps = predict(jnp.asarray(theirs.numpy()), (jnp.full(4, int(timestep), jnp.float32) + 1) / 1000)
        theirs = stock.step(torch.from_numpy(np.array(eps)), timestep, theirs).prev_sample
    ours = walk("dpmpp_2m")(z, nodes(1.0, 0.0, 10))[-1]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("move", [solvers.euler_step, solvers.heun_step])
def test_a_straight_flow_is_solved_exactly_by_one_step(move):
    z, v = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    t, u = jnp.array([1.0, 0.5, 0.25]), jnp.array([0.5, 0.375, 0.0])
    flow = lambda x, t: v + 0 * x  # noqa: E731
    np.testing.assert_allclose(move(SD, flow, z, t, u), z + per_example(u - t, z) * v, rtol=1e-6, atol=1e-6)


def test_solve_keeps_every_state_and_takes_nodes_per_example():
    z = jax.random.normal(jax.random.key(0), (2, 2))
    step = solvers.make_solver_step("ddim", SD, predict_eps)
    per = nodes(jnp.array([1.0, 0.5]), jnp.array([0.75, 0.25]), 5)
    last, states = quick_jit(partial(solvers.solve, step, keep=True))(z, per)
    assert states.shape == (6, 2, 2)
    np.testing.assert_array_equal(states[0], z)
    np.testing.assert_array_equal(states[-1], last)
    solve = quick_jit(partial(solvers.solve, step))
    for i in range(2):
        alone = solve(z[i : i + 1], per[:, i])
        np.testing.assert_allclose(alone[0], last[i], rtol=1e-5, atol=1e-6)


def test_solve_hands_the_carry_from_step_to_step_and_keeps_the_dtype():
    z = jnp.zeros((2, 3), jnp.bfloat16)
    count = lambda z, t, u, n: (z + n, n + 1.0)  # noqa: E731
    out = solvers.solve(count, z, jnp.linspace(1, 0, 5), carry=jnp.float32(0))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 0 + 1 + 2 + 3)


def test_an_unknown_solver_is_refused_with_its_flag():
    with pytest.raises(ValueError, match=r"rk4.*--config\.pairs\.solver"):
        solvers.make_solver_step("rk4", SD, predict_eps)


X, T = jax.random.normal(jax.random.key(2), (3, 4)), jnp.array([0.9, 0.5, 0.1])
COND = {"text": jax.random.normal(jax.random.key(3), (3, 5, 4))}
NONE = {"text": jax.random.normal(jax.random.key(4), (1, 5, 4))}


def counted():
    """A predict(x, t, context) in which every input matters, and the list of the batch sizes it was called with."""
    calls = []

    def predict(x, t, context):
        calls.append(x.shape[0])
        return jnp.sin(x + t[:, None]) * context["text"].mean(1)

    return predict, calls


@pytest.mark.parametrize("one", [1.0, 1, np.float64(1)])
def test_guidance_one_is_the_conditional_model_in_one_call(one):
    predict, calls = counted()
    np.testing.assert_array_equal(solvers.guided(predict, COND, NONE, one)(X, T), predict(X, T, COND))
    assert calls == [3, 3]


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.5])
def test_guidance_in_one_doubled_call_equals_two_calls(scale):
    predict, calls = counted()
    together = solvers.guided(predict, COND, NONE, scale)(X, T)
    assert calls == [6]
    free, bound = predict(X, T, {"text": jnp.repeat(NONE["text"], 3, 0)}), predict(X, T, COND)
    np.testing.assert_allclose(together, free + scale * (bound - free), rtol=1e-5, atol=1e-6)


def test_the_guidance_scale_may_be_traced():
    predict, _ = counted()
    run = jax.jit(lambda scale: solvers.guided(predict, COND, NONE, scale)(X, T))
    np.testing.assert_allclose(run(3.0), solvers.guided(predict, COND, NONE, 3.0)(X, T), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(1.0), predict(X, T, COND), rtol=1e-5, atol=1e-6)
