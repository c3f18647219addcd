"""How a state is carried from one time to the next, and one scan that does it many times.

A step is a function (z, t, u, carry) -> (z_u, carry): z is (b, ...), t and u are (b,), u < t. `solve` scans it over the
nodes. The carry is the memory of a multistep method: its last prediction of x0 and the time of that prediction. One-step
methods pass it on. In the coordinates (z/a, s/a) DDIM is Euler's method; the one named euler here is Euler's on the clock.
Of a rectified flow both are the same step, z_u = (1 - s_u) x0 + s_u eps = z + (s_u - s_t) (eps - x0).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import Parameterization, check_model, convert, ddim_jump
from proreflow_jax.flow.schedule import RectifiedFlow, Schedule, as_time, per_example
from proreflow_jax.flow.windows import locate

Predict = Callable[[Array, Array], Array]  # (x, t) -> epsilon or velocity: x (b, ...), t (b,)
Step = Callable[[Array, Array, Array, Any], tuple[Array, Any]]  # (z, t, u, carry) -> (z_u, carry)
History = tuple[Array, Array]  # (x0 (b, ...), t (b,)) of the step before; t equal to the present time: there was none

SOLVERS = ("ddim", "euler", "heun", "dpmpp_2m")


def ddim_step(
    schedule: Schedule, predict_eps: Predict, z: Float[Array, "b *d"], t: Float[Array, "b"], u: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """One DDIM step from t to u: one call of predict_eps, first order (Song et al. 2021, eq. 12); shape of z."""
    return ddim_jump(schedule, z, predict_eps(z, t), t, u)


def euler_step(
    schedule: Schedule, velocity: Predict, z: Float[Array, "b *d"], t: Float[Array, "b"], u: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """One Euler step on the clock: one call of velocity(z, t), first order; shape of z. Exact on a straight flow."""
    return z + per_example(schedule.clock(u) - schedule.clock(t), z) * velocity(z, t)


def heun_step(
    schedule: Schedule, velocity: Predict, z: Float[Array, "b *d"], t: Float[Array, "b"], u: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """One Heun step on the clock: two calls of velocity, second order (Karras et al. 2022, alg. 1); shape of z.

    As there, the step that ends at u = 0 is Euler's: the flow of a diffusion has no useful slope at its clean end.
    The second call is at u: the velocity of a windowed student must then be that of the window which holds t.
    """
    span = per_example(schedule.clock(u) - schedule.clock(t), z)
    first = velocity(z, t)
    second = velocity(z + span * first, u)
    slope = jnp.where(per_example(u, z) > 0, (first + second) / 2, first)
    return z + span * slope


def dpmpp_2m_step(
    schedule: Schedule,
    predict_x0: Predict,
    z: Float[Array, "b *d"],
    t: Float[Array, "b"],
    u: Float[Array, "b"],
    history: History,
) -> tuple[Float[Array, "b *d"], History]:
    """One DPM-Solver++(2M) step: one call of predict_x0, second order (Lu et al. 2022b, alg. 2); (z_u, new history).

    Without a step before it (history's time equals t) it is first order, which is DDIM. So is the step that ends at
    u = 0: log(a/s) jumps too far there for a line through two predictions (on a Gaussian mixture, 4 to 32 steps, the
    line made every error larger).
    """
    x0_before, t_before = history
    x0 = predict_x0(z, t)
    lam_before, lam, lam_u = (schedule.log_snr(w) / 2 for w in (t_before, t, u))

    # D = (1 + 1/(2r)) x0 - 1/(2r) x0_before with r = h_before / h, the line through both predictions
    h, h_before = lam_u - lam, lam - lam_before
    second = (h_before > 0) & (u > 0)
    weight = jnp.where(second, h / (2 * jnp.where(second, h_before, 1.0)), 0.0)
    D = x0 + per_example(weight, z) * (x0 - x0_before)

    # z_u = s_u/s_t z - a_u (exp(-h) - 1) D
    keep, add = schedule.sigma(u) / schedule.sigma(t), -schedule.alpha(u) * jnp.expm1(-h)
    if isinstance(schedule, RectifiedFlow):
        keep = jnp.where(t > 0, keep, 1.0)  # a step from s = 0 stays there
    return per_example(keep, z) * z + per_example(add, z) * D, (x0.astype(z.dtype), t)


def make_solver_step(name: str, schedule: Schedule, predict: Predict, kind: str = "epsilon") -> Step:
    """The step of a named solver for a diffusion model of prediction_type `kind`, ready for `solve`.

    name: "ddim", "euler", "heun" (two calls of predict a step) or "dpmpp_2m". Of a rectified flow "ddim" is "euler".
    Raises UserError for another name, and as `check_model` for another kind.
    """
    predict_eps = as_epsilon(kind, schedule, predict)
    velocity = make_velocity(Parameterization(kind), schedule, predict)
    euler = lambda z, t, u, carry: (euler_step(schedule, velocity, z, t, u), carry)
    ddim = lambda z, t, u, carry: (ddim_step(schedule, predict_eps, z, t, u), carry)
    predict_x0 = lambda z, t: convert("epsilon", "sample", schedule, z, predict_eps(z, t), t)
    if isinstance(schedule, RectifiedFlow):  # epsilon says nothing at t = 1
        ddim, predict_x0 = euler, lambda z, t: convert(kind, "sample", schedule, z, predict(z, t), t)

    steps = {
        "ddim": ddim,
        "euler": euler,
        "heun": lambda z, t, u, carry: (heun_step(schedule, velocity, z, t, u), carry),
        "dpmpp_2m": lambda z, t, u, carry: dpmpp_2m_step(schedule, predict_x0, z, t, u, carry),
    }
    if name not in steps:
        raise UserError(f"solver {name!r}, must be one of {', '.join(SOLVERS)}; change --config.pairs.solver")
    return steps[name]


def make_step(flow: Parameterization, schedule: Schedule, predict: Predict, solver: str = "ddim") -> Step:
    """The step of a network behind `predict(z, t)`, ready for `solve`.

    A diffusion model moves by `solver`; a student moves along its own path, in the window that t lies in.
    """
    if flow.windows == 0:
        return make_solver_step(solver, schedule, predict, flow.prediction)

    def step(z: Array, t: Array, u: Array, carry: Any) -> tuple[Array, Any]:
        return flow.advance(schedule, z, predict(z, t), locate(t, flow.windows), u), carry

    return step


def make_velocity(flow: Parameterization, schedule: Schedule, predict: Predict) -> Predict:
    """velocity(z, t) = dz/dt, on the clock, of a network behind `predict(z, t)`, as `Parameterization.velocity`."""
    return lambda z, t: flow.velocity(schedule, z, predict(z, t), t)


def as_epsilon(kind: str, schedule: Schedule, predict: Predict) -> Predict:
    """A diffusion model of any prediction_type as an epsilon model. Raises UserError as `check_model`."""
    check_model(kind, schedule)
    if kind == "epsilon":
        return predict
    return lambda z, t: convert(kind, "epsilon", schedule, z, predict(z, t), t)


def solve(
    step: Step,
    z: Float[Array, "b *d"],
    nodes: Float[ArrayLike, "steps_plus_1"] | Float[ArrayLike, "steps_plus_1 b"],
    carry: Any = None,
    keep: bool = False,
) -> Float[Array, "b *d"] | tuple[Float[Array, "b *d"], Float[Array, "steps_plus_1 b *d"]]:
    """The state at nodes[-1], started from z at nodes[0]; shape and dtype of z. One `lax.scan` over the nodes.

    nodes: falling times, shared by the batch or one column per example.
    carry: the step's memory at the start; None is an empty History.
    keep: also return every state, (steps + 1, b, ...), the first of them z.
    """
    times = as_time(nodes)
    if times.ndim == 1:
        times = jnp.broadcast_to(times[:, None], (times.shape[0], z.shape[0]))
    if carry is None:
        carry = (jnp.zeros_like(z), times[0])

    def body(state: tuple[Array, Any], ends: tuple[Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        moved, memory = step(state[0], ends[0], ends[1], state[1])
        moved = moved.astype(z.dtype)
        return (moved, memory), (moved if keep else None)

    (last, _), states = jax.lax.scan(body, (z, carry), (times[:-1], times[1:]))
    return (last, jnp.concatenate([z[None], states])) if keep else last


def guided(
    predict: Callable[[Array, Array, Any], Array],
    conditional: Any,
    unconditional: Any,
    scale: Float[Array, ""] | float | int,
) -> Predict:
    """predict(x, t) under classifier-free guidance, u + scale (c - u) (Ho and Salimans 2022, eq. 6).

    predict: (x, t, context) -> output. Both contexts are trees of arrays with the batch in front; an unconditional one
    of batch 1 is repeated. The two outputs come from one call on the doubled batch. scale may be traced; the Python
    number 1 is the conditional model itself, one call on the batch as it is.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: predict(x, t, conditional)

    def both(x: Array, t: Array) -> Array:
        context = jax.tree.map(lambda c, u: _pairs(jnp.broadcast_to(u, c.shape), c), conditional, unconditional)
        out = predict(_pairs(x, x), _pairs(t, t), context)
        out = out.reshape(x.shape[0], 2, *out.shape[1:])
        return out[:, 0] + jnp.asarray(scale, out.dtype) * (out[:, 1] - out[:, 0])

    return both


def _pairs(first: Array, second: Array) -> Array:
    """(b, ...), (b, ...) -> (2 b, ...), the two of each example side by side, so a sharded batch stays where it is."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
