"""The algorithm: pairs -> a time inside a window -> aligned velocity loss. `state.train_step` turns it into an update.

ProReflow (Ke et al. 2025): sec. 3.2 progressive reflow, eq. 8 to 10 aligned v-prediction, on PeRFlow's windows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from proreflow_jax import UserError
from proreflow_jax.flow import losses, prediction, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import GRID, Schedule, grid_time
from proreflow_jax.models.network import Params
from proreflow_jax.reflow.pairs import Frozen, Networks
from proreflow_jax.reflow.predict import make_predict, row_context

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
    key: Key[Array, ""], k: Int[Array, " b"], n: int, start_prob: Float[ArrayLike, ""], start_steps: int = 0
) -> tuple[Float[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """(t, t_s, t_e), each (b,): grid times in (t_e, t_s] of window k of n.

    With probability start_prob t is a node of a sampler of start_steps steps (`windows.sampling_nodes`) in that window, each
    node with equal probability. With no more steps than windows the only node is t_s.
    """
    first, second, third = jax.random.split(key, 3)
    width, nodes = GRID // n, jnp.maximum(windows.window_steps(k, start_steps, n), 1)
    back = jax.random.randint(first, k.shape, 0, width)
    node = windows.steps_back(jax.random.randint(third, k.shape, 0, nodes), nodes, width)
    back = jnp.where(jax.random.bernoulli(second, start_prob, k.shape), node, back)
    i_s = GRID - k * width
    return grid_time(i_s - back), grid_time(i_s), grid_time(i_s - width)


def draw_examples(
    frozen: Frozen,
    pairs: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    flow: Parameterization,
    networks: Networks,
    loss: LossRecipe,
) -> dict[str, Any]:
    """Pair records -> what the loss needs: one window of each record, a time inside it, the state and the chord there.

    pairs: states (b, m + 1, h, w, c), first (b,), ids (b, s); text, pooled as `row_context` takes them. Everything
    returned has b in front and carries no gradient.
    """
    pick, times = jax.random.split(key)
    b, bounds = pairs["states"].shape[:2]
    j = jax.random.randint(pick, (b,), 0, bounds - 1)
    rows = jnp.arange(b)
    states = pairs["states"].astype(jnp.float32)
    z_s, z_e, k = states[rows, j], states[rows, j + 1], pairs["first"] + j

    t, t_s, t_e = draw_times(times, k, flow.windows, loss.window_start_prob, loss.start_steps)
    z_t = windows.interpolate(flow.path, networks.schedule, z_s, z_e, t_s, t_e, t)
    path = {"z": z_t, "t": t, "t_s": t_s, "t_e": t_e}
    v = target_velocity(flow, networks.schedule, z_s, z_e, path)
    context = row_context(networks.condition, frozen.text, frozen.empty, pairs)
    return jax.lax.stop_gradient({**path, "v": v, "k": k, "context": context})


def target_velocity(flow: Parameterization, schedule: Schedule, z_s: Array, z_e: Array, path: Mapping[str, Array]) -> Array:
    """The velocity a perfect student has at z_t: the chord's; on the first-order path that of the pair's one epsilon."""
    t_s, t_e = path["t_s"], path["t_e"]
    if flow.path == "linear":
        return windows.chord(z_s, z_e, t_s, t_e)
    jump = ("ddim_eps", flow.path, schedule)  # the one epsilon is the same at every t, whatever the student's own words are
    eps = prediction.from_velocity(*jump, z_s, windows.chord(z_s, z_e, t_s, t_e), t_s, t_s, t_e)
    return prediction.to_velocity(*jump, path["z"], eps, path["t"], t_s, t_e)


def reflow_loss(
    params: Params, drawn: Mapping[str, Any], *, flow: Parameterization, networks: Networks, loss: LossRecipe
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Mean aligned loss of a batch, and per-window sums of its parts (n,) with their counts.

    MSE(v, v_target) + alpha (1 - cos(v, v_target)); in space "output" the same of the raw outputs. The fields of `loss` say
    in which units alpha is and whether large errors are bent.
    """
    z, t, t_s, t_e = (drawn[name] for name in ("z", "t", "t_s", "t_e"))
    reading = (flow.prediction, flow.path, networks.schedule, z)
    out = make_predict(networks.unet, params, loss.dtype)(z, t, drawn["context"])
    v = prediction.to_velocity(*reading, out, t, t_s, t_e)

    compared = (v, drawn["v"])
    if loss.space == "output":
        compared = out, prediction.from_velocity(*reading, drawn["v"], t, t_s, t_e)
    error, cosine = losses.squared_error(*compared), losses.cosine(*compared)
    alpha = loss.alpha * losses.direction_weight(compared[1]) if loss.balance == "auto" else loss.alpha
    per_example = (losses.pseudo_huber(error, loss.huber) if loss.huber else error) + alpha * (1 - cosine)

    rows = {
        "loss": per_example,
        "cosine": cosine,
        "relative_error": losses.relative_error(*compared),
        "count": jnp.ones_like(per_example),
    }
    sums = {name: jax.ops.segment_sum(value, drawn["k"], flow.windows) for name, value in rows.items()}
    return jnp.mean(per_example), {"window": jax.lax.stop_gradient(sums)}


def check_loss(loss: LossRecipe) -> None:
    """Raises ValueError, one line, for a loss that does not exist."""
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
