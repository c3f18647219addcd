"""Laws of the windows: they tile [0, 1], a bound belongs to the window it starts, paths meet their ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_jit

from proreflow_jax.flow import windows as win
from proreflow_jax.flow.parameterization import ddim_jump
from proreflow_jax.flow.schedule import make_schedule

SD = make_schedule("scaled_linear", 0.00085, 0.012)
DIVISORS = [n for n in range(1, 1001) if 1000 % n == 0]
GRID_TIMES = (np.arange(1001) / 1000).astype(np.float32)


@pytest.mark.parametrize("n", DIVISORS)
def test_windows_tile_the_unit_interval(n):
    b = win.bounds(n)
    assert b[0] == 1 and b[-1] == 0 and b.shape == (n + 1,)
    np.testing.assert_allclose(np.diff(b), -1 / n, rtol=1e-9)
    k, t, t_s, t_e = win.locate(GRID_TIMES, n)
    np.testing.assert_array_equal(t, GRID_TIMES)
    assert np.all((t_e <= GRID_TIMES) & (t_s >= GRID_TIMES))
    assert np.all((t_e < GRID_TIMES) | (GRID_TIMES == 0))
    np.testing.assert_array_equal(t_s, b.astype(np.float32)[k])
    np.testing.assert_array_equal(t_e, b.astype(np.float32)[np.asarray(k) + 1])
    assert sorted(set(np.asarray(k).tolist())) == list(range(n))


@pytest.mark.parametrize("n", DIVISORS)
def test_a_bound_belongs_to_the_window_that_starts_there(n):
    """The bounds come again and again, so that they are as many for every n: arrays of one shape are compiled for once."""
    w = jax.tree.map(lambda x: np.asarray(x)[: n + 1], win.locate(np.resize(win.bounds(n), 1001).astype(np.float32), n))
    np.testing.assert_array_equal(w.k, [*range(n), n - 1])
    np.testing.assert_array_equal(w.t_s[:-1], win.bounds(n)[:-1].astype(np.float32))
    starts = jax.tree.map(lambda x: np.asarray(x)[:n], win.at_start(np.resize(np.arange(n), 1000), n))
    jax.tree.map(np.testing.assert_array_equal, starts, jax.tree.map(lambda x: x[:-1], w))


def test_a_bound_that_lost_a_digit_is_still_a_bound():
    almost = jnp.nextafter(jnp.float32(0.875), jnp.float32(0))
    assert win.locate(almost, 8).k == 1
    assert win.locate(jnp.float32(0.8751), 8).k == 0
    assert win.locate(jnp.float32(0.8749), 8).k == 1


@pytest.mark.parametrize("n", [0, -4, 3, 6, 7, 16, 2000])
def test_windows_off_the_grid_are_refused_in_one_line(n):
    for ask in (win.check_windows, win.bounds, lambda n: win.locate(jnp.ones(1), n)):
        with pytest.raises(ValueError, match=r"1000 % n == 0.*--config\.stages") as error:
            ask(n)
        assert str(n) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("n, steps", [(8, 4), (8, 7), (4, 32), (2, 500), (1, 10), (5, 3)])
def test_nodes_lie_on_the_grid_and_keep_the_ends(n, steps):
    b = win.bounds(n)
    for t_s, t_e in zip(b[:-1], b[1:], strict=True):
        nodes = np.asarray(win.nodes(t_s, t_e, steps))
        assert nodes[0] == np.float32(t_s) and nodes[-1] == np.float32(t_e) and nodes.shape == (steps + 1,)
        assert np.all(np.isin(nodes, GRID_TIMES))
        gaps = -np.diff(np.asarray(SD.timestep(nodes + 0.001)))
        assert gaps.max() - gaps.min() <= 1 and gaps.min() >= 1


def test_nodes_of_a_traced_batch_equal_those_of_each_window():
    b = jnp.asarray(win.bounds(4), jnp.float32)
    together = jax.jit(lambda s, e: win.nodes(s, e, 10))(b[:-1], b[1:])
    assert together.shape == (11, 4)
    for k in range(4):
        np.testing.assert_array_equal(together[:, k], win.nodes(b[k], b[k + 1], 10))


@pytest.mark.parametrize("steps", [0, 126, 1000])
def test_nodes_refuse_more_steps_than_the_grid_has(steps):
    with pytest.raises(ValueError, match=f"{steps} steps.*125.*--config"):
        win.nodes(jnp.array([1.0, 0.875]), jnp.array([0.875, 0.75]), steps)


@pytest.mark.parametrize("steps, n", [(8, 8), (11, 4), (7, 2), (30, 8), (1000, 8), (999, 8), (1000, 1), (5, 5)])
def test_sampling_nodes_contain_every_bound(steps, n):
    nodes, b = win.sampling_nodes(steps, n), win.bounds(n)
    assert nodes.shape == (steps + 1,) and nodes[0] == 1 and nodes[-1] == 0
    assert np.all(np.diff(nodes) < 0)
    assert np.all(np.isin(b, nodes)) and np.all(np.isin(nodes, np.arange(1001) / 1000))
    share = [int(np.sum((nodes <= s) & (nodes > e))) for s, e in zip(b[:-1], b[1:], strict=True)]
    assert share == sorted(share, reverse=True) and max(share) - min(share) <= 1


@pytest.mark.parametrize("steps, n", [(3, 4), (0, 1), (1001, 8)])
def test_sampling_nodes_refuse_a_wrong_count(steps, n):
    with pytest.raises(ValueError, match=f"{steps} sampling steps.*--steps"):
        win.sampling_nodes(steps, n)


interpolate = quick_jit(win.interpolate, static_argnums=(0, 1))  # (path, schedule, z_s, z_e, window)


def _pair(n, rows=None):
    """(state, state, window) of each window; of `rows` pairs, every window as often as the others."""
    z = jax.random.normal(jax.random.key(0), (2, rows or n, 3, 2, 4))
    return z[0], z[1], win.at_start(np.resize(np.arange(n), rows or n), n)


@pytest.mark.parametrize("n", [1, 2, 8, 1000])
@pytest.mark.parametrize("path", win.PATHS)
def test_both_paths_meet_both_ends(path, n):
    z_s, z_e, w = _pair(n, 1000)
    np.testing.assert_allclose(interpolate(path, SD, z_s, z_e, w), z_s, rtol=1e-6)
    np.testing.assert_allclose(interpolate(path, SD, z_s, z_e, w._replace(t=w.t_e)), z_e, rtol=1e-6)


def test_the_linear_path_moves_by_the_chord():
    z_s, z_e, w = _pair(4)
    t = 0.3 * w.t_s + 0.7 * w.t_e
    moved = z_s + win.chord(SD, z_s, z_e, w.t_s, w.t_e) * (t - w.t_s)[:, None, None, None]
    np.testing.assert_allclose(interpolate("linear", SD, z_s, z_e, w._replace(t=t)), moved, atol=1e-5)


def test_ddim_with_one_epsilon_stays_on_the_first_order_path():
    z_s, eps, w = _pair(4)
    jump = quick_jit(partial(ddim_jump, SD))
    z_e = jump(z_s, eps, w.t_s, w.t_e)
    for part in (0.1, 0.5, 0.96):
        t = (1 - part) * w.t_s + part * w.t_e
        expected = jump(z_s, eps, w.t_s, t)
        np.testing.assert_allclose(interpolate("first_order", SD, z_s, z_e, w._replace(t=t)), expected, atol=2e-5)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"spline.*--config\.student\.path"):
        win.interpolate("spline", SD, *_pair(2))
