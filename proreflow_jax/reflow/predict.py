"""The forward pass of a UNet, of teacher and student alike, and its conditioning by prompts."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from proreflow_jax.flow import schedule
from proreflow_jax.models.conditioning import Conditioner, Context
from proreflow_jax.models.network import Network, Params, cast


def make_predict(
    unet: Network, params: Params, dtype: str = "float32"
) -> Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]:
    """predict(z, t, context) of a UNet, for `solvers.guided`; computed in `dtype`, returned as float32."""
    weights = params if dtype == "float32" else cast(params, jnp.dtype(dtype))

    def predict(z: Array, t: Array, context: Context) -> Array:
        return unet.apply(weights, z.astype(dtype), schedule.timestep(t), *context.cast(dtype)).astype(z.dtype)

    return predict


def text_context(condition: Conditioner, params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
    """The UNet's conditioning by prompts; no gradient flows into it. params: of the text encoders, by component."""
    return jax.lax.stop_gradient(condition(params, ids))


def row_context(
    condition: Conditioner, params: Mapping[str, Params], empty: Int[Array, " s"], rows: Mapping[str, Array]
) -> Context:
    """The UNet's conditioning by the prompts of a batch: from the rows' text states, or else from their ids.

    rows: ids (b, s), or text (b, s, d) with SDXL's pooled (b, p). empty: ids of the empty prompt.
    """
    if "text" not in rows:
        return text_context(condition, params, rows["ids"])
    one = text_context(condition, params, empty[None])  # its sizes are every row's
    context = Context(rows["text"], rows.get("pooled"), None).cast(one.states.dtype)
    sizes = None if one.time_ids is None else jnp.repeat(one.time_ids, len(context.states), axis=0)
    return jax.lax.stop_gradient(context._replace(time_ids=sizes))
