"""[0, 1] cut into N equal windows, and what happens inside one.

Window k of N runs from t_s = 1 - k/N (its noisy start) down to t_e = 1 - (k+1)/N (its clean end). All bounds lie on the
grid of 1000 steps, so N must divide 1000. A time on a bound belongs to the window that starts there: that is where a
sampler stands when it is about to cross the window. t = 0 starts no window and goes to the last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.flow.schedule import GRID, RectifiedFlow, Schedule, as_time, grid_time, per_example, position

PATHS = ("linear", "first_order")


class Window(NamedTuple):
    """A time and the window that holds it, one of each per example: arrays of one shape, hence a pytree.

    k: index of the window, 0 the noisiest.
    t: the time, t_e <= t <= t_s.
    t_s, t_e: the window's noisy start and its clean end.
    """

    k: Int[Array, "*b"]
    t: Float[Array, "*b"]
    t_s: Float[Array, "*b"]
    t_e: Float[Array, "*b"]


def check_windows(n: int) -> None:
    """Raises UserError unless n windows have their bounds on the grid: 1000 % n == 0."""
    if n < 1 or GRID % n:
        near = [d for d in range(1, GRID + 1) if GRID % d == 0 and d <= 2 * max(n, 4)][-4:]
        raise UserError(f"{n} windows, must divide {GRID} (1000 % n == 0), for example {near}; change --config.stages")


def check_path(path: str, schedule: Schedule | None = None) -> None:
    """Raises UserError unless path names a path inside a window; of a rectified flow only linear, which is its DDIM's path."""
    if path not in PATHS:
        raise UserError(f"path {path!r}, must be one of {', '.join(PATHS)}; change --config.student.path")
    if path == "first_order" and isinstance(schedule, RectifiedFlow):
        raise UserError(
            "path first_order of a rectified flow, must be linear: DDIM moves along it; change --config.student.path"
        )


def start_index(k: Int[ArrayLike, "*b"], n: Int[ArrayLike, ""]) -> Int[ArrayLike, "*b"]:
    """The noisy start of window k of n in grid steps, 1000 down to 0; k = n gives the end of the last window."""
    return GRID - (GRID // n) * k


def at_start(k: Int[ArrayLike, "*b"], n: Int[ArrayLike, ""], dtype: Any = None) -> Window:
    """Window k of n, with its start as the time; shape of k. dtype: of the times, as in `grid_time`."""
    start, end = (grid_time(start_index(i, n), dtype) for i in (k, k + 1))
    return Window(jnp.asarray(k), start, start, end)


def bounds(n: int) -> Float[np.ndarray, "n_plus_1"]:
    """The n + 1 bounds of n windows, float64, from 1 down to 0. Raises UserError if n does not divide 1000."""
    check_windows(n)
    return start_index(np.arange(n + 1), n) / GRID


def locate(t: Float[ArrayLike, "*b"], n: int) -> Window:
    """The window, of n, that t lies in; shape of t. Raises UserError if n does not divide 1000.

    A bound belongs to the window that starts there, t = 0 to the last.
    """
    check_windows(n)
    x = position(t)
    k = jnp.clip(jnp.floor((GRID - x) / (GRID // n)).astype(jnp.int32), 0, n - 1)
    return at_start(k, n, x.dtype)._replace(t=as_time(t))


def nodes(t_s: Float[ArrayLike, "*b"], t_e: Float[ArrayLike, "*b"], steps: int) -> Float[Array, "steps_plus_1 *b"]:
    """steps + 1 times from t_s down to t_e, as even as the 1/1000 grid allows, both ends included.

    t_s, t_e: shape () or (b,), or traced; they are rounded to the grid.
    Raises UserError if steps is below 1 or (where the times are known) exceeds the grid steps of the window.
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


def window_steps(k: Int[ArrayLike, "*b"], steps: int, n: Int[ArrayLike, ""]) -> Int[ArrayLike, "*b"]:
    """How many of a sampler's `steps` lie in window k of n: a remainder goes to the noisiest windows, one each."""
    return steps // n + (k < steps % n)


def check_steps(steps: int, width: int) -> None:
    """Raises UserError unless a window of `width` grid steps can be crossed in `steps` steps on the grid."""
    if not 1 <= steps <= width:
        raise UserError(
            f"{steps} steps across one window, must be 1 to {width}, the window's steps on the 1/{GRID} grid; "
            "change --config.pairs.steps"
        )


def sampling_nodes(steps: int, n: int) -> Float[np.ndarray, "steps_plus_1"]:
    """The steps + 1 times, float64, that an n-window student visits from 1 to 0: on the grid, every bound included.

    Window k holds `window_steps(k, steps, n)` of them, its start included.
    Raises UserError if n does not divide 1000, if steps < n, or if steps > 1000.
    """
    check_windows(n)
    if steps < n:
        raise UserError(f"{steps} sampling steps, must be at least the number of windows, {n}; change --steps")
    if steps > GRID:
        raise UserError(f"{steps} sampling steps, must be at most the {GRID} steps of the grid; change --steps")
    counts = [window_steps(k, steps, n) for k in range(n)]
    inner = [start_index(k, n) - steps_back(np.arange(m), m, GRID // n) for k, m in enumerate(counts)]
    return np.concatenate([*inner, [0]]) / GRID


def told_sigmas(steps: int, n: int) -> list[float]:
    """`sigmas` for StableDiffusion3Pipeline, with which a student of n windows takes these steps; see `flow.stock`.

    Unshifted: the scheduler, with the model's shift and no shift_terminal, shifts them. Raises as `sampling_nodes`.
    """
    return sampling_nodes(steps, n)[:-1].tolist()


def chord(
    schedule: Schedule,
    z_s: Float[Array, "b *d"],
    z_e: Float[Array, "b *d"],
    t_s: Float[ArrayLike, "b"],
    t_e: Float[ArrayLike, "b"],
) -> Float[Array, "b *d"]:
    """The velocity of a pair, (z_e - z_s) / (t_e - t_s) on the schedule's clock; shape of z (PeRFlow, Yan et al. 2024)."""
    return (z_e - z_s) / per_example(schedule.clock(t_e) - schedule.clock(t_s), z_s)


def interpolate(
    path: str, schedule: Schedule, z_s: Float[Array, "b *d"], z_e: Float[Array, "b *d"], w: Window
) -> Float[Array, "b *d"]:
    """z_t at w.t, on the path from z_s at the window's start to z_e at its end, exact at both ends; shape of z_s.

    path: "linear" is a straight line in the clock, which is t or a rectified flow's s (Liu et al. 2022); "first_order" is a
      straight line of z/a in s/a, the path that a DDIM step with one constant epsilon takes (Rectified Diffusion, Wang et al.
      2024).
    Raises UserError for another path, and for first_order of a rectified flow.
    """
    check_path(path, schedule)
    if path == "linear":
        c, c_s, c_e = (schedule.clock(u) for u in (w.t, w.t_s, w.t_e))
        done = per_example((c_s - c) / (c_s - c_e), z_s)
        return (1 - done) * z_s + done * z_e
    t, t_s, t_e = as_time(w.t), as_time(w.t_s), as_time(w.t_e)
    a_s, a_e, a = (schedule.alpha(u) for u in (t_s, t_e, t))
    r_s, r_e, r = (schedule.sigma(u) / schedule.alpha(u) for u in (t_s, t_e, t))
    span = jnp.where(r_s == r_e, 1.0, r_s - r_e)  # the window [0.001, 0] has one noise level: nothing moves
    done = jnp.where(t == t_e, 1.0, (r_s - r) / span)
    return per_example((1 - done) * a / a_s, z_s) * z_s + per_example(done * a / a_e, z_s) * z_e
