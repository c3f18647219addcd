"""A frozen network that carries states from noise towards data: a diffusion model by a solver, or a student by its windows.

One step function serves both, so that pairs and samples are made by the same code (PeRFlow alg. 1 for a diffusion teacher,
ProReflow sec. 3.2 for the student of the stage before).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from proreflow_jax.flow import prediction, schedule, solvers, windows
from proreflow_jax.models.conditioning import Conditioner, Context
from proreflow_jax.models.network import Network, Params, cast

DIFFUSION = ("epsilon", "v_prediction", "sample")  # diffusers' prediction_type


class Flow(NamedTuple):
    """How a network's output is read.

    prediction: a diffusion model's prediction_type, or a student's reading (velocity, ddim_eps, diff_eps, ddim_v).
    windows: the student's number of windows; 0 for a diffusion model.
    path: the student's path inside a window.
    """

    prediction: str
    windows: int = 0
    path: str = "linear"


def make_step(flow: Flow, noise: schedule.Schedule, predict: solvers.Predict, solver: str = "ddim") -> solvers.Step:
    """The step (z, t, u, carry) -> (z_u, carry) of a network behind `predict(z, t)`.

    A diffusion model moves by `solver`; a student moves along its reading's path, in the window t lies in.
    """
    if flow.windows == 0:
        return solvers.make_step(solver, noise, as_epsilon(flow.prediction, noise, predict))

    def step(z: Array, t: Array, u: Array, carry: Any) -> tuple[Array, Any]:
        _, t_s, t_e = windows.locate(t, flow.windows)
        return prediction.advance(flow.prediction, flow.path, noise, z, predict(z, t), t, u, t_s, t_e), carry

    return step


def as_epsilon(kind: str, noise: schedule.Schedule, predict: solvers.Predict) -> solvers.Predict:
    """A diffusion model of any prediction_type as an epsilon model."""
    if kind not in DIFFUSION:
        raise ValueError(f"prediction_type {kind!r} in scheduler_config.json must be one of {', '.join(DIFFUSION)}")
    if kind == "epsilon":
        return predict
    return lambda z, t: prediction.convert(kind, "epsilon", noise, z, predict(z, t), t)


def make_predict(
    unet: Network, params: Params, dtype: str = "float32"
) -> Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]:
    """predict(z, t, context) of a UNet, for `solvers.guided`; computed in `dtype`, given back as float32."""
    weights = params if dtype == "float32" else cast(params, jnp.dtype(dtype))

    def predict(z: Array, t: Array, context: Context) -> Array:
        return unet.apply(weights, z.astype(dtype), schedule.timestep(t), *context.cast(dtype)).astype(z.dtype)

    return predict


def text_context(condition: Conditioner, params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
    """What the UNet is told of prompts; no gradient flows into it. params: of the text encoders, by component."""
    return jax.lax.stop_gradient(condition(params, ids))


def row_context(
    condition: Conditioner, params: Mapping[str, Params], empty: Int[Array, " s"], rows: Mapping[str, Array]
) -> Context:
    """What the UNet is told of a batch: the text states that its rows bring, or else those of their ids.

    rows: ids (b, s), or text (b, s, d) and, of SDXL, pooled (b, p) beside them; empty: ids of the empty prompt.
    """
    if "text" not in rows:
        return text_context(condition, params, rows["ids"])
    one = text_context(condition, params, empty[None])  # brings the sizes, and says what the model takes
    told = Context(rows["text"], rows.get("pooled"), None).cast(one.states.dtype)
    sizes = None if one.time_ids is None else jnp.repeat(one.time_ids, len(told.states), axis=0)
    return jax.lax.stop_gradient(told._replace(time_ids=sizes))
