"""[0, 1] cut into N equal windows, and what happens inside one.

Window k of N runs from t_s = 1 - k/N (its noisy start) down to t_e = 1 - (k+1)/N (its clean end). All bounds lie on the
grid of 1000 steps, so N must divide 1000. A time on a bound belongs to the window that starts there: that is where a
sampler stands when it is about to cross the window. t = 0 starts no window and goes to the last.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.flow.schedule import GRID, Schedule, as_time, grid_time, per_example, position

PATHS = ("linear", "first_order")


def check_windows(n: int) -> None:
    """Raises ValueError unless n windows have their bounds on the grid: 1000 % n == 0."""
    if n < 1 or GRID % n:
        near = [d for d in range(1, GRID + 1) if GRID % d == 0 and d <= 2 * max(n, 4)][-4:]
        raise UserError(f"{n} windows, must divide {GRID} (1000 % n == 0), for example {near}; change --config.stages")


def check_path(path: str) -> None:
    """Raises ValueError unless path names a path inside a window."""
    if path not in PATHS:
        raise UserError(f"path {path!r}, must be one of {', '.join(PATHS)}; change --config.student.path")


def bounds(n: int) -> Float[np.ndarray, "n_plus_1"]:
    """The n + 1 bounds of n windows, float64, from 1 down to 0. Raises ValueError if n does not divide 1000."""
    check_windows(n)
    return _bound_indices(n) / GRID


def locate(t: Float[ArrayLike, "*b"], n: int) -> tuple[Int[Array, "*b"], Float[Array, "*b"], Float[Array, "*b"]]:
    """(k, t_s, t_e): the index and the bounds of the window that t lies in, of n windows; all of t's shape.

    A bound belongs to the window that starts there, t = 0 to the last. Raises ValueError if n does not divide 1000.
    """
    check_windows(n)
    x = position(t)
    k = jnp.clip(jnp.floor((GRID - x) / (GRID // n)).astype(jnp.int32), 0, n - 1)
    edges = jnp.asarray(_bound_indices(n))
    return k, grid_time(edges[k], x.dtype), grid_time(edges[k + 1], x.dtype)


def nodes(t_s: Float[ArrayLike, "*b"], t_e: Float[ArrayLike, "*b"], steps: int) -> Float[Array, "steps_plus_1 *b"]:
    """steps + 1 times from t_s down to t_e, as even as the 1/1000 grid allows, both ends included.

    t_s, t_e: shape () or (b,), or traced; they are rounded to the grid.
    Raises ValueError if steps is below 1 or (where the times are known) exceeds the grid steps of the window.
    """
    start, end = (jnp.round(position(t)).astype(jnp.int32) for t in (t_s, t_e))
    known = not any(isinstance(i, jax.core.Tracer) for i in (start, end))
    check_steps(steps, int(jnp.min(start - end)) if known else GRID)
    j = jnp.arange(steps + 1).reshape((-1,) + (1,) * start.ndim)
    return grid_time(start - steps_back(j, steps, start - end), as_time(t_s).dtype)


def steps_back(
    j: Int[ArrayLike, "*#b"], steps: Int[ArrayLike, "*#b"], width: Int[ArrayLike, "*#b"]
) -> Int[np.ndarray, "*b"] | Int[Array, "*b"]:
    """Grid steps from a window's start down to node j of `steps`, in a window of `width` grid steps."""
    return (width * j + steps // 2) // steps


def window_steps(k: Int[ArrayLike, "*b"], steps: int, n: int) -> Int[ArrayLike, "*b"]:
    """How many of a sampler's `steps` lie in window k of n: a remainder goes to the noisiest windows, one each."""
    return steps // n + (k < steps % n)


def check_steps(steps: int, width: int) -> None:
    """Raises ValueError unless a window of `width` grid steps can be crossed in `steps` steps on the grid."""
    if not 1 <= steps <= width:
        raise UserError(
            f"{steps} steps across one window, must be 1 to {width}, the window's steps on the 1/{GRID} grid; "
            "change --config.pairs.steps"
        )


def sampling_nodes(steps: int, n: int) -> Float[np.ndarray, "steps_plus_1"]:
    """The steps + 1 times, float64, that an n-window student visits from 1 to 0: on the grid, every bound included.

    Window k holds `window_steps(k, steps, n)` of them, its start included.
    Raises ValueError if n does not divide 1000, if steps < n, or if steps > 1000.
    """
    check_windows(n)
    if steps < n:
        raise UserError(f"{steps} sampling steps, must be at least the number of windows, {n}; change --steps")
    if steps > GRID:
        raise UserError(f"{steps} sampling steps, must be at most the {GRID} steps of the grid; change --steps")
    counts = [window_steps(k, steps, n) for k in range(n)]
    inner = [edge - steps_back(np.arange(m), m, GRID // n) for edge, m in zip(_bound_indices(n), counts, strict=False)]
    return np.concatenate([*inner, [0]]) / GRID


def chord(
    z_s: Float[Array, "b *d"], z_e: Float[Array, "b *d"], t_s: Float[ArrayLike, "b"], t_e: Float[ArrayLike, "b"]
) -> Float[Array, "b *d"]:
    """The velocity of a pair, (z_e - z_s) / (t_e - t_s), per unit of t; shape of z (PeRFlow, Yan et al. 2024)."""
    return (z_e - z_s) / per_example(as_time(t_e) - as_time(t_s), z_s)


def interpolate(
    path: str,
    schedule: Schedule,
    z_s: Float[Array, "b *d"],
    z_e: Float[Array, "b *d"],
    t_s: Float[ArrayLike, "b"],
    t_e: Float[ArrayLike, "b"],
    t: Float[ArrayLike, "b"],
) -> Float[Array, "b *d"]:
    """z_t on the path from (t_s, z_s) to (t_e, z_e), exact at both ends; shape of z.

    path: "linear" is a straight line in t (Liu et al. 2022); "first_order" is a straight line of z/a in s/a, the path
      that a DDIM step with one constant epsilon takes (Rectified Diffusion, Wang et al. 2024).
    Raises ValueError for another path.
    """
    check_path(path)
    t_s, t_e, t = as_time(t_s), as_time(t_e), as_time(t)
    if path == "linear":
        done = per_example((t_s - t) / (t_s - t_e), z_s)
        return (1 - done) * z_s + done * z_e
    a_s, a_e, a = (schedule.alpha(u) for u in (t_s, t_e, t))
    r_s, r_e, r = (schedule.sigma(u) / schedule.alpha(u) for u in (t_s, t_e, t))
    span = jnp.where(r_s == r_e, 1.0, r_s - r_e)  # the window [0.001, 0] has one noise level: nothing moves
    done = jnp.where(t == t_e, 1.0, (r_s - r) / span)
    return per_example((1 - done) * a / a_s, z_s) * z_s + per_example(done * a / a_e, z_s) * z_e


def _bound_indices(n: int) -> Int[np.ndarray, "n_plus_1"]:
    """The bounds in grid steps, from 1000 down to 0."""
    return GRID - (GRID // n) * np.arange(n + 1)
