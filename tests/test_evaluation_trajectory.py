"""How a flow bends, on flows with closed forms: straight ones, a turning one, one that speeds up, a Gaussian's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_jit

from proreflow_jax.evaluation import trajectory
from proreflow_jax.flow import losses, solvers, windows
from proreflow_jax.flow.parameterization import Parameterization, convert, ddim_jump
from proreflow_jax.flow.schedule import make_schedule

SCHEDULE = make_schedule("scaled_linear", 0.00085, 0.012)
SHAPE = (3, 2, 2, 4)
Z = jax.random.normal(jax.random.key(0), SHAPE)
C = jax.random.normal(jax.random.key(1), SHAPE)  # the velocity of the straight flow
RISE, TURN = 3.0, 2.0


def straight(z, t):
    return C


def faster(z, t):
    """The straight flow's direction, at the speed 1 + RISE t."""
    return (1 + RISE * t)[:, None, None, None] * C


def turning(z, t):
    """Of norm 1 in the first two entries, at the angle TURN t."""
    flat = jnp.stack([jnp.cos(TURN * t), jnp.sin(TURN * t)] + [0 * t] * 14, axis=1)
    return flat.reshape(SHAPE)


def along(predict, steps, n, prediction="velocity"):
    nodes, student = windows.sampling_nodes(steps, n), Parameterization(prediction, n)
    return nodes, *quick_jit(partial(trajectory.trajectory, student, SCHEDULE, predict))(Z, nodes)


def euler(velocity):
    return lambda z, t, u, carry: (solvers.euler_step(SCHEDULE, velocity, z, t, u), carry)


@quick_jit
def perturbed(velocity_is_straight, nodes, key, kind, sizes):
    """Samples and the unperturbed one, of the straight or the turning flow; one program for all kinds."""
    step = euler(lambda z, t: jnp.where(velocity_is_straight, straight(z, t), turning(z, t)))
    draw = trajectory.perturbed_samples(step, Z, nodes, jax.random.key(key), kind, sizes)
    return draw, solvers.solve(step, Z, nodes)


@quick_jit
def perturbed_states(nodes, kind):
    step = trajectory.perturbed_step(euler(turning), jax.random.key(0), kind, 0.3)
    return solvers.solve(step, Z, nodes, keep=True)[1]


@quick_jit
def jumped(z, t, u):
    """A DDIM step with the epsilon C."""
    return ddim_jump(SCHEDULE, z, C, jnp.full(3, t), jnp.full(3, u))


def norms(v):
    return np.linalg.norm(np.asarray(v).reshape(*v.shape[:-3], -1), axis=-1)


def test_a_straight_flow_is_straight_and_equal_at_all_times():
    nodes, states, v = along(straight, 16, 4)
    np.testing.assert_allclose(states[-1], Z - C, atol=1e-5)
    for n in (1, 2, 4):
        for measured in trajectory.straightness(SCHEDULE, states, v, nodes, n):
            assert measured.shape == (3, n) and np.max(measured) < 1e-8
    l2, cosine = trajectory.discrepancy(v)
    assert l2.shape == cosine.shape == (3, 16, 16)
    np.testing.assert_allclose(l2, 0, atol=1e-6)
    np.testing.assert_allclose(cosine, 1, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4])
def test_straightness_of_a_flow_that_speeds_up_is_its_closed_form(n):
    """v = (1 + k t) c has the chord (1 + k m) c of a window's middle m, and S = k^2 h^2 / 12 |c|^2 for a width h."""
    nodes, states, v = along(faster, 200, n)
    absolute, relative = trajectory.straightness(SCHEDULE, states, v, nodes, n)
    h, middle, square = 1 / n, 1 - (np.arange(n) + 0.5) / n, np.mean(np.square(C), axis=(1, 2, 3))
    want = (RISE * h) ** 2 / 12
    np.testing.assert_allclose(absolute, want * np.tile(square[:, None], n), rtol=2e-3)
    np.testing.assert_allclose(relative, np.tile(want / (1 + RISE * middle) ** 2, (3, 1)), rtol=2e-2)


def test_straightness_weighs_uneven_steps_by_their_length():
    nodes = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0])
    v = jnp.stack([faster(Z, jnp.full(3, t)) for t in nodes[:-1]])
    states = jnp.stack([Z - C * 0, Z + C])  # the chord of [1, 0] is -C
    absolute, _ = trajectory.straightness(SCHEDULE, jnp.concatenate([states[:1]] * 6 + [states[1:]]), v, nodes, 1)
    want = np.average((2 + RISE * nodes[:-1]) ** 2, weights=-np.diff(nodes)) * np.mean(np.square(C), axis=(1, 2, 3))
    np.testing.assert_allclose(absolute[:, 0], want, rtol=1e-5)


def test_one_step_a_window_is_always_straight_and_bounds_must_be_nodes():
    nodes, states, v = along(faster, 4, 4)
    assert np.max(trajectory.straightness(SCHEDULE, states, v, nodes, 4)[0]) < 1e-8
    assert np.min(trajectory.straightness(SCHEDULE, states, v, nodes, 2)[0]) > 1e-3
    with pytest.raises(ValueError, match=r"4 steps do not stop at t = 0.875, a bound of 8 windows; change --config"):
        trajectory.straightness(SCHEDULE, states, v, nodes, 8)


def test_velocities_of_a_turning_flow_differ_by_the_angle():
    nodes, _, v = along(turning, 10, 1)
    l2, cosine = trajectory.discrepancy(v)
    angle = TURN * (nodes[:-1, None] - nodes[None, :-1])
    np.testing.assert_allclose(cosine, np.tile(np.cos(angle), (3, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(l2, np.tile(2 * np.abs(np.sin(angle / 2)) / 4, (3, 1, 1)), atol=1e-5)  # 16 entries


def gaussian(kind):
    """The exact model of data ~ N(0, 0.25): its flow keeps z / sqrt(a^2 / 4 + s^2)."""

    def predict(z, t):
        a, s = (f(t)[:, None, None, None] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        return convert("epsilon", kind, SCHEDULE, z, s * z / (0.25 * a**2 + s**2), t)

    return predict


@quick_jit
def deviation(t):
    """Of the noised data at time t."""
    return jnp.sqrt(0.25 * SCHEDULE.alpha(t) ** 2 + SCHEDULE.sigma(t) ** 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_diffusion_model_moves_along_its_flow_with_the_flows_velocity(kind):
    nodes = windows.sampling_nodes(200, 1)
    states, v = quick_jit(partial(trajectory.trajectory, Parameterization(kind), SCHEDULE, gaussian(kind)))(Z, nodes)
    scale = np.asarray(deviation(nodes)) / float(deviation(nodes)[0])
    np.testing.assert_allclose(states[::20, 0], scale[::20, None, None, None] * Z[None, 0], rtol=2e-2, atol=1e-3)
    rate = np.gradient(scale, nodes)[40:160:20]  # dz/dt by differences of the closed form
    np.testing.assert_allclose(v[40:160:20, 1], rate[:, None, None, None] * Z[None, 1], rtol=3e-2, atol=1e-3)


def test_a_students_velocity_is_that_of_the_window_it_is_in():
    student = Parameterization("ddim_eps", 4)
    velocity = solvers.make_velocity(student, SCHEDULE, straight)
    both = quick_jit(lambda w: (velocity(Z, w.t), student.to_velocity(SCHEDULE, Z, C, w)))
    for t, k in ((0.75, 1), (0.6, 1), (0.1, 3)):
        w = windows.at_start(jnp.full(3, k), 4)._replace(t=jnp.full(3, t))
        np.testing.assert_allclose(*both(w), rtol=1e-5)
    _, states, v = along(straight, 4, 4, "ddim_eps")
    jump = jumped(Z, 1.0, 0.75)
    np.testing.assert_allclose(states[1], jump, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(Z - 0.25 * v[0], jump, rtol=1e-4, atol=1e-5)


def errors(velocity, path, states, times):
    return quick_jit(lambda states: trajectory.velocity_error(velocity, SCHEDULE, path, states, times))(states)


def bounds_of(states, predict=straight):
    """A velocity that is right in every window of a teacher's states, times what `predict` says of t."""
    n = len(states) - 1

    def velocity(z, t):
        k = windows.locate(t, n).k
        chords = jnp.stack([(states[i + 1] - states[i]) * -n for i in range(n)])
        return predict(t)[:, None, None, None] * chords[k, jnp.arange(3)]

    return velocity


def test_the_velocity_error_is_relative_and_knows_its_window():
    states = jnp.cumsum(jax.random.normal(jax.random.key(2), (5, *SHAPE)), axis=0)
    times = trajectory.window_times(4, 3)
    right = bounds_of(states, jnp.ones_like)
    relative, cosine = errors(right, "linear", states, times)
    assert relative.shape == cosine.shape == (3, 4, 3)
    assert np.max(relative) < 1e-5 and np.min(cosine) > 1 - 1e-5
    backwards_late = bounds_of(states, lambda t: jnp.where(t < 0.5, -1.1, 1.0))
    relative, cosine = errors(backwards_late, "linear", states, times)
    np.testing.assert_allclose(relative, np.broadcast_to([[[0.0], [0.0], [2.1], [2.1]]], (3, 4, 3)), atol=1e-5)
    np.testing.assert_allclose(cosine, np.broadcast_to([[[1.0], [1.0], [-1.0], [-1.0]]], (3, 4, 3)), atol=1e-5)


def test_an_error_at_window_starts_alone_is_seen_there_alone():
    states = jnp.cumsum(jax.random.normal(jax.random.key(2), (5, *SHAPE)), axis=0)
    wrong = bounds_of(states, lambda t: jnp.where(jnp.isin(jnp.round(1000 * t), jnp.array([1000, 750, 500, 250])), -1.0, 1.0))
    measure = partial(errors, wrong, "linear", states)
    relative, cosine = measure(windows.bounds(4)[:-1, None])
    np.testing.assert_allclose(relative, 2, atol=1e-5)
    np.testing.assert_allclose(cosine, -1, atol=1e-5)
    assert np.max(measure(trajectory.window_times(4, 5))[0]) < 1e-5


def test_one_epsilon_has_no_error_on_the_first_order_path_but_on_the_line():
    states = jnp.stack([Z, jumped(Z, 1.0, 0.5), jumped(jumped(Z, 1.0, 0.5), 0.5, 0.0)])
    velocity = lambda path: solvers.make_velocity(Parameterization("ddim_eps", 2, path), SCHEDULE, straight)
    times = trajectory.window_times(2, 4)
    for path in ("linear", "first_order"):
        assert np.max(errors(velocity(path), path, states, times)[0]) < 1e-3
    assert np.mean(errors(velocity("first_order"), "linear", states, times)[0]) > 1e-2


def test_window_times_are_the_middles_of_equal_parts():
    times = trajectory.window_times(4, 5)
    np.testing.assert_allclose(times[0], [0.975, 0.925, 0.875, 0.825, 0.775])
    np.testing.assert_allclose(times[1:], times[:-1] - 0.25)
    np.testing.assert_allclose(trajectory.window_times(8, 8).mean(axis=1), windows.bounds(8)[:-1] - 1 / 16, atol=1e-3)
    with pytest.raises(ValueError, match="must be 1 to 62"):
        trajectory.window_times(8, 63)


@pytest.mark.parametrize("size", [0.0, 0.1, 0.7, 2.0])
def test_a_perturbed_velocity_has_the_error_it_says(size):
    noise, sign = jax.random.normal(jax.random.key(3), SHAPE), jnp.array([1.0, -1.0, 1.0])
    turned = trajectory.perturb(C, noise, sign, 1.0, size)
    np.testing.assert_allclose(norms(turned), norms(C), rtol=1e-5)
    np.testing.assert_allclose(losses.relative_error(turned, C), size, atol=1e-5)
    np.testing.assert_allclose(losses.cosine(turned, C), 1 - size**2 / 2, atol=1e-5)
    stretched = trajectory.perturb(C, noise, sign, 0.0, size)
    np.testing.assert_allclose(losses.relative_error(stretched, C), size, atol=1e-5)
    np.testing.assert_allclose(norms(stretched), norms(C) * np.abs(1 + np.asarray(sign) * size), atol=1e-5)


@pytest.mark.parametrize("kind", trajectory.KINDS)
def test_size_zero_is_the_sample_itself_and_equal_keys_give_equal_draws(kind):
    nodes, sizes = windows.sampling_nodes(8, 1), np.array([0.0, 0.2])
    first, sample = perturbed(False, nodes, 0, trajectory.KINDS[kind], sizes)
    assert first.shape == (2, *SHAPE)
    np.testing.assert_allclose(first[0], sample, atol=1e-6)
    again, other = (perturbed(False, nodes, key, trajectory.KINDS[kind], sizes)[0] for key in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first[1], other[1]) == kind.startswith("magnitude_")  # only these two draw nothing
    assert np.max(np.abs(first[1] - first[0])) > 1e-3


@pytest.mark.parametrize("kind", trajectory.KINDS)
def test_every_step_has_the_same_relative_error(kind):
    nodes, k = windows.sampling_nodes(6, 1), trajectory.KINDS[kind]
    states = perturbed_states(nodes, k)
    v = (states[1:] - states[:-1]) / np.diff(nodes)[:, None, None, None, None]
    for i, t in enumerate(nodes[:-1]):
        true = turning(Z, jnp.full(3, t))
        np.testing.assert_allclose(losses.relative_error(v[i], true), 0.3, rtol=1e-4)
        if k.turned:
            np.testing.assert_allclose(norms(v[i]), 1, rtol=1e-5)
        else:
            np.testing.assert_allclose(losses.cosine(v[i], true), 1, atol=1e-5)


def test_errors_that_are_held_add_up_and_those_that_are_drawn_average_out():
    """On a straight flow of m steps: r |c| and r |c| / sqrt(m), beside the r^2/2 |c| that every turned step falls short."""
    m, r = 100, 0.1
    ends = {}
    for name, kind in trajectory.KINDS.items():
        out = perturbed(True, windows.sampling_nodes(m, 1), 5, kind, np.array([r]))[0][0]
        ends[name] = norms(out - (Z - C)) / norms(C)
    for name in ("direction_held", "magnitude_up", "magnitude_down"):
        np.testing.assert_allclose(ends[name], r, rtol=1e-3)
    np.testing.assert_allclose(ends["direction"], np.hypot(r / np.sqrt(m), r**2 / 2), rtol=0.5)
    assert np.all(ends["magnitude"] < 3 * r / np.sqrt(m))


def test_the_draws_of_two_steps_and_two_examples_differ():
    moved = trajectory.perturbed_step(euler(straight), jax.random.key(0), trajectory.KINDS["direction"], 0.5)
    one = quick_jit(lambda z, t: moved(z, jnp.full(3, t), jnp.full(3, t - 0.1), None)[0] - z)
    first, second = one(Z, 1.0), one(Z, 0.9)
    assert np.min(losses.relative_error(first, second)) > 0.1
    held = trajectory.perturbed_step(euler(straight), jax.random.key(0), trajectory.KINDS["direction_held"], 0.5)
    one = quick_jit(lambda z, t: held(z, jnp.full(3, t), jnp.full(3, t - 0.1), None)[0] - z)
    np.testing.assert_allclose(one(Z, 1.0), one(Z, 0.9), atol=1e-6)
    signs = trajectory.perturbed_step(euler(straight), jax.random.key(0), trajectory.KINDS["magnitude"], 0.5)
    one = quick_jit(lambda z, t: signs(z, jnp.full(3, t), jnp.full(3, t - 0.1), None)[0] - z)
    lengths = [norms(one(Z, t)) / norms(0.1 * C) for t in (1.0, 0.8, 0.6, 0.4)]
    assert set(np.round(np.concatenate(lengths), 3)) == {0.5, 1.5} and len({tuple(np.round(x, 3)) for x in lengths}) > 1


def test_distances_are_root_mean_squares():
    scale = jnp.array([0.0, 1.0, 2.0])[:, None, None, None]
    np.testing.assert_allclose(trajectory.distances(Z + scale, Z), [0, 1, 2], atol=1e-6)
