"""The noise schedule, and the one statement of the direction of time.

Stable Diffusion is trained on z = a_i x0 + s_i eps, where i = 0 .. 999 counts entries of a table, a_i^2 =
alphas_cumprod[i] and s_i^2 = 1 - a_i^2. Entry 0 is nearly clean and entry 999 nearly noise. A flow wants a real time
instead, so we lay the 1000 entries on the grid {0, 1/1000, ..., 1}:

    t = 1 is noise, t = 0 is data, and entry i sits at t = (i + 1) / 1000.

Read backwards, the network is fed `timestep = 1000 t - 1`, which is 999 at t = 1 and 0 at t = 1/1000. The grid has 1001
points and the table 1000 entries: the point without an entry, t = 0, borrows entry 0 (diffusers:
set_alpha_to_one=False), so timestep is clipped at 0 and the schedule is flat on [0, 1/1000]. This choice puts the
bounds 1 - k/N of N windows on the very entries that diffusers' "trailing" spacing visits in N steps, which is why a
trained student runs in the stock DDIMScheduler.

Between two grid points log(a^2 / s^2) follows a monotone cubic Hermite spline (Fritsch and Carlson 1980), so a(t) and
s(t) are once differentiable from 1/1000 to 1 and the probability flow dz/dt has rates that belong to the values. A grid
point that has lost a digit in float32 (1000 * 0.003 is not 3) is recognised and read as the grid point.

A rectified flow (Liu et al. 2022; Stable Diffusion 3, Esser et al. 2024) has no table: z = (1 - s) x0 + s eps with
s(t) = shift t / (1 + (shift - 1) t), and the network is fed 1000 s(t). Its ends are exact: a(1) = 0 and s(0) = 0.

The *clock* of a schedule is the time in which its straight lines are straight: t of a table, s(t) of a rectified flow.
Every velocity is per unit of the clock. Windows and nodes are laid out in t for both.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.flow.stock import FLOW_MATCH, model_shift

GRID = 1000  # grid steps in [0, 1], and entries of the table
_GRID_TIMES = np.arange(GRID + 1) / GRID


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """The noise levels a(t), s(t) of one trained diffusion model, a^2 + s^2 = 1.

    Equal only to itself, hence hashable and fit for a closure.

    Attributes:
      alphas_cumprod: (1000,) float64, falling from nearly 1 to nearly 0, both excluded.

    Raises:
      UserError: the table has another length, or does not fall strictly inside (0, 1).
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self) -> None:
        table = np.array(self.alphas_cumprod, dtype=np.float64)
        if table.shape != (GRID,):
            raise UserError(
                f"alphas_cumprod has shape {table.shape}, must be ({GRID},): the time grid has {GRID} steps; "
                "choose another --config.model.path"
            )
        if not (table[0] < 1 and table[-1] > 0 and np.all(np.diff(table) < 0)):
            raise UserError(
                f"alphas_cumprod runs from {table[0]} to {table[-1]}, must fall strictly inside (0, 1); "
                "choose another --config.model.path"
            )
        table.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", table)

    @functools.cached_property
    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """log-SNR and its slope per grid step at every entry; (1000,) each."""
        log_snr = np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)
        return log_snr, _monotone_slopes(log_snr)

    def log_snr(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """log(a^2 / s^2) at any t, same shape as t. Exact at grid points, constant on [0, 1/1000]."""
        x = position(t) - 1  # counted in entries
        x = jnp.where(x < 0, 0.0, x)
        i = jnp.clip(jnp.floor(jax.lax.stop_gradient(x)).astype(jnp.int32), 0, GRID - 2)
        values, slopes = (jnp.asarray(k, x.dtype) for k in self._knots)

        # Hermite's cubic on the cell [i, i + 1], as the left value plus a small increment
        f = x - i
        rise = values[i + 1] - values[i]
        bend = slopes[i] * (1 - f) - slopes[i + 1] * f - rise * (1 - 2 * f)
        return values[i] + f * (rise + (1 - f) * bend)

    def alpha(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """a(t), the factor of the data; same shape as t. a^2 + s^2 = 1 (Ho et al. 2020, eq. 4)."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.log_snr(t)))

    def sigma(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """s(t), the factor of the noise; same shape as t."""
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.log_snr(t)))

    def rates(self, t: Float[ArrayLike, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(da/dt, ds/dt) per unit of t, same shape as t. At 1/1000 the limit from above, below it zero."""
        t = as_time(t)
        return jax.jvp(lambda t: (self.alpha(t), self.sigma(t)), (t,), (jnp.ones_like(t),))[1]

    def clock(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """t itself, in at least float32."""
        return as_time(t)

    def timestep(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """What the network is fed at time t: 1000 t - 1, never below 0; float32, same shape as t."""
        return jnp.maximum(position(t) - 1, 0).astype(jnp.float32)


@dataclass(frozen=True)
class RectifiedFlow:
    """The noise levels a(t) = 1 - s(t), s(t) of a model that flows along straight lines from noise to data.

    Attributes:
      shift: of the change of time (Esser et al. 2024, eq. 23), above 0; 1 is s(t) = t, more gives noisy times more room.

    Raises:
      UserError: the shift is not above 0, or not finite.
    """

    shift: float

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift={self.shift!r} must be a number above 0; choose another --config.model.path")

    def alpha(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """a(t) = 1 - s(t), same shape as t; 0 at t = 1, with all its digits near it."""
        t = as_time(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """s(t), same shape as t; 1 at t = 1 and 0 at t = 0."""
        t = as_time(t)
        return jnp.where(t < 1, self.shift * t / (1 + (self.shift - 1) * t), 1.0)

    def log_snr(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """log(a^2 / s^2), same shape as t. Finite: at t = 1 and t = 0 about -175 and 175 (in float32), where it is infinite."""
        t = as_time(t)
        least = jnp.finfo(t.dtype).tiny
        return 2 * (jnp.log(jnp.maximum(1 - t, least)) - jnp.log(jnp.maximum(self.shift * t, least)))

    def rates(self, t: Float[ArrayLike, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(da/ds, ds/ds) = (-1, 1) per unit of the clock, each of the shape of t."""
        one = jnp.ones_like(as_time(t))
        return -one, one

    def clock(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """s(t): in it the lines from noise to data are straight."""
        return self.sigma(t)

    def timestep(self, t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        """What the network is fed at time t: 1000 s(t); float32, same shape as t."""
        return (GRID * self.sigma(t)).astype(jnp.float32)


Schedule = NoiseTable | RectifiedFlow


def as_time(t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """t as an array of at least float32: a bfloat16 has no room for 1000 grid points."""
    t = jnp.asarray(t)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def position(t: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """t counted in grid steps, 0 to 1000; whole where t is a grid point up to rounding. Its derivative is 1000."""
    t = as_time(t)
    x = t * GRID
    nearest = jnp.round(x)
    whole = jnp.abs(x - nearest) < 1e4 * jnp.finfo(x.dtype).eps
    return jnp.where(whole, nearest + (x - jax.lax.stop_gradient(x)), x)


def grid_time(index: Int[ArrayLike, "..."], dtype: Any = None) -> Float[Array, "..."]:
    """The time index / 1000, same shape as index; read from a table, so that equal indices are equal bits everywhere.

    dtype: of the result; None is jax's default float (float32, or float64 under x64).
    """
    return jnp.asarray(_GRID_TIMES, jnp.result_type(float) if dtype is None else dtype)[jnp.asarray(index)]


def per_example(t: Float[Array, "b"], z: Float[Array, "b *d"]) -> Float[Array, "b *ones"]:
    """t reshaped to (b, 1, ..., 1), so that it multiplies every entry of its example in z."""
    return jnp.reshape(t, jnp.shape(t) + (1,) * (jnp.ndim(z) - 1))


def make_schedule(beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int = GRID) -> NoiseTable:
    """The schedule of a named beta table, by diffusers' formulas.

    Args:
      beta_schedule: "scaled_linear" (Stable Diffusion), "linear" (Ho et al. 2020), or "squaredcos_cap_v2" (Nichol and
        Dhariwal 2021, eq. 17), which looks at neither bound.
      beta_start, beta_end: first and last beta, in (0, 1).
      num_train_timesteps: must be 1000.

    Raises:
      UserError: another name, another number of timesteps, or bounds that do not give a falling table.
    """
    _check_grid(num_train_timesteps)
    if beta_schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, GRID) ** 2
    elif beta_schedule == "linear":
        betas = np.linspace(beta_start, beta_end, GRID)
    elif beta_schedule == "squaredcos_cap_v2":
        bar = np.cos((_GRID_TIMES + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise UserError(
            f"beta_schedule={beta_schedule!r}, must be scaled_linear, linear or squaredcos_cap_v2; "
            "choose another --config.model.path"
        )
    return NoiseTable(np.cumprod(1 - betas))


def from_config(scheduler_config: Mapping[str, Any]) -> Schedule:
    """The schedule that a diffusers `scheduler_config.json` describes: a rectified flow where its class is FLOW_MATCH.

    Raises:
      UserError: a key is missing, the table is of no use here (trained_betas, rescale_betas_zero_snr), or a rectified flow
        moves in another way than by one fixed shift (`stock.model_shift`).
    """
    if scheduler_config.get("_class_name") == FLOW_MATCH:
        _check_grid(scheduler_config.get("num_train_timesteps", GRID))
        return RectifiedFlow(model_shift(scheduler_config))
    if scheduler_config.get("trained_betas") is not None:
        raise UserError(
            "trained_betas in scheduler_config.json must be null: only named beta schedules are read; "
            "choose another --config.model.path"
        )
    if scheduler_config.get("rescale_betas_zero_snr"):
        raise UserError(
            "rescale_betas_zero_snr=true must be false: alpha(1) = 0 leaves the image undetermined by epsilon; "
            "choose another --config.model.path"
        )
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    missing = [k for k in keys if scheduler_config.get(k) is None]
    if missing:
        raise UserError(f"scheduler_config.json lacks {', '.join(missing)}; choose another --config.model.path")
    return make_schedule(*(scheduler_config[k] for k in keys))


def same_levels(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules have the same noise levels, up to rounding."""
    if isinstance(one, RectifiedFlow) or isinstance(other, RectifiedFlow):
        return one == other
    return bool(np.allclose(one.alphas_cumprod, other.alphas_cumprod, rtol=1e-6, atol=0))


def _check_grid(num_train_timesteps: Any) -> None:
    """Raises UserError unless a model was trained on as many timesteps as the time grid has steps."""
    if num_train_timesteps != GRID:
        raise UserError(
            f"num_train_timesteps={num_train_timesteps}, must be {GRID}, the time grid of the windows; "
            "choose another --config.model.path"
        )


def _monotone_slopes(values: np.ndarray) -> np.ndarray:
    """Slopes at the points of a falling table: fourth-order differences (second-order at the ends).

    Cut to three times the flatter neighbouring difference, which keeps the cubic falling (Fritsch and Carlson 1980).
    """
    d = np.diff(values)
    slopes = np.gradient(values, edge_order=2)
    slopes[2:-2] = (values[:-4] - 8 * values[1:-3] + 8 * values[3:-1] - values[4:]) / 12
    flatter = np.maximum(np.r_[d[0], d], np.r_[d, d[-1]])
    return np.clip(slopes, 3 * flatter, 0)
