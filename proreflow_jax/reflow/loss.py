"""The algorithm: pairs -> a time inside a window -> aligned velocity loss. `train_step.train_step` turns it into an update.

ProReflow (Ke et al. 2025): sec. 3.2 progressive reflow, eq. 8 to 10 aligned v-prediction, on PeRFlow's windows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from proreflow_jax import UserError
from proreflow_jax.flow import losses, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import GRID, Schedule, grid_time
from proreflow_jax.flow.windows import Window
from proreflow_jax.models.network import Params
from proreflow_jax.reflow.pairs import Frozen, Networks, make_predict, row_context

SPACES = ("velocity", "output")
BALANCES = ("fixed", "auto")


class LossRecipe(NamedTuple):
    """What is compared with what; every field comes from the config."""

    space: str  # "velocity": the paper; "output": the network's raw output (PeRFlow's noise matching)
    alpha: float  # weight of 1 - cosine; may be traced
    balance: str  # "fixed": alpha as it is, the paper; "auto": in units of each target's own `losses.direction_weight`
    huber: float  # delta of a pseudo-Huber in place of the squared error; 0: squared error, the paper
    window_start_prob: float  # probability that t is a time of a sampler; else t is uniform in the window; may be traced
    start_steps: int  # the sampler's steps; at most as many as windows: only windows' starts
    dtype: str  # of the student's computation


def draw_times(
    key: Key[Array, ""], k: Int[Array, " b"], n: Int[ArrayLike, ""], start_prob: Float[ArrayLike, ""], start_steps: int = 0
) -> Window:
    """Window k of n, (b,), at a grid time t in (t_e, t_s].

    With probability start_prob t is a node of a sampler of start_steps steps (`windows.sampling_nodes`) in that window, each
    node with equal probability. With no more steps than windows the only node is t_s.
    """
    first, second, third = jax.random.split(key, 3)
    width, nodes = GRID // n, jnp.maximum(windows.window_steps(k, start_steps, n), 1)
    back = jax.random.randint(first, k.shape, 0, width)
    node = windows.steps_back(jax.random.randint(third, k.shape, 0, nodes), nodes, width)
    back = jnp.where(jax.random.bernoulli(second, start_prob, k.shape), node, back)
    return windows.at_start(k, n)._replace(t=grid_time(windows.start_index(k, n) - back))


def draw_examples(
    frozen: Frozen,
    pairs: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    flow: Parameterization,
    networks: Networks,
    loss: LossRecipe,
) -> dict[str, Any]:
    """Pair records -> examples for the loss, all (b, ...) and without gradient.

    pairs: states (b, m + 1, h, w, c), first (b,), ids (b, s); text, pooled as `row_context` takes them. Where `frozen` says
      the windows, states behind the last bound are filling.

    Returns:
      window: a `Window`, one of each record's, at a time inside it.
      z: the state at that time, on the path between the record's states at the window's bounds.
      v: the velocity there that a perfect student has.
      context: the conditioning of the denoiser.
    """
    pick, times = jax.random.split(key)
    b, bounds = pairs["states"].shape[:2]
    count = flow.windows if frozen.windows is None else frozen.windows
    held = bounds - 1 if frozen.windows is None else jnp.minimum(bounds - 1, count)
    j = jax.random.randint(pick, (b,), 0, held)
    rows = jnp.arange(b)
    states = pairs["states"].astype(jnp.float32)
    z_s, z_e, k = states[rows, j], states[rows, j + 1], pairs["first"] + j

    w = draw_times(times, k, count, loss.window_start_prob, loss.start_steps)
    z = windows.interpolate(flow.path, networks.schedule, z_s, z_e, w)
    v = target_velocity(flow, networks.schedule, z_s, z_e, z, w)
    context = row_context(networks.condition, frozen, pairs)
    return jax.lax.stop_gradient({"z": z, "window": w, "v": v, "context": context})


def target_velocity(flow: Parameterization, schedule: Schedule, z_s: Array, z_e: Array, z: Array, w: Window) -> Array:
    """The velocity of a perfect student at (z, w.t): the chord's; on the first-order path that of the pair's one epsilon.

    That epsilon is the same at every t, whatever the student's prediction type.
    """
    chord = windows.chord(schedule, z_s, z_e, w.t_s, w.t_e)
    if flow.path == "linear":
        return chord
    jump = flow._replace(prediction="ddim_eps")
    eps = jump.from_velocity(schedule, z_s, chord, w._replace(t=w.t_s))
    return jump.to_velocity(schedule, z, eps, w)


def reflow_loss(
    params: Params, examples: Mapping[str, Any], *, flow: Parameterization, networks: Networks, loss: LossRecipe
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Mean aligned loss of a batch of examples, and per-window sums of its parts (flow.windows,) with their counts.

    MSE(v, v_target) + alpha (1 - cos(v, v_target)); in space "output" the same of the raw outputs. The fields of `loss` say
    in which units alpha is and whether large errors are bent.
    """
    z, w, schedule = examples["z"], examples["window"], networks.schedule
    out = make_predict(networks.denoiser, schedule, params, loss.dtype)(z, w.t, examples["context"])

    v, target = flow.to_velocity(schedule, z, out, w), examples["v"]
    if loss.space == "output":
        v, target = out, flow.from_velocity(schedule, z, target, w)
    error, cosine = losses.squared_error(v, target), losses.cosine(v, target)
    alpha = loss.alpha * losses.direction_weight(target) if loss.balance == "auto" else loss.alpha
    per_example = (losses.pseudo_huber(error, loss.huber) if loss.huber else error) + alpha * (1 - cosine)

    rows = {
        "loss": per_example,
        "cosine": cosine,
        "relative_error": losses.relative_error(v, target),
        "count": jnp.ones_like(per_example),
    }
    sums = {name: jax.ops.segment_sum(value, w.k, flow.windows) for name, value in rows.items()}
    return jnp.mean(per_example), {"window": jax.lax.stop_gradient(sums)}


def check_loss(loss: LossRecipe) -> None:
    """Raises UserError, one line, for a loss that does not exist."""
    if loss.space not in SPACES:
        raise UserError(f"--config.loss.space={loss.space!r} must be one of {', '.join(SPACES)}")
    if not 0 <= loss.window_start_prob <= 1:
        raise UserError(f"--config.loss.window_start_prob={loss.window_start_prob} must be in [0, 1]")
    if loss.balance not in BALANCES:
        raise UserError(f"--config.loss.balance={loss.balance!r} must be one of {', '.join(BALANCES)}")
    if loss.huber < 0:
        raise UserError(f"--config.loss.huber={loss.huber} must not be negative (0: squared error)")
    if not 0 <= loss.start_steps <= GRID:
        raise UserError(f"--config.loss.start_steps={loss.start_steps} must be in [0, {GRID}]")
    if loss.alpha < 0:
        raise UserError(f"--config.loss.alpha={loss.alpha} must not be negative")
