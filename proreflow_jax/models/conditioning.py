"""Token ids -> a UNet's conditioning: text states, and for SDXL the pooled state and the sizes of micro-conditioning.

SD 1.x and 2.x read the last states of one encoder. SDXL (Podell et al. 2023, sec. 2.1 and 2.2) reads the states before the
last layer of two encoders side by side, the second's pooled state, and six numbers about the image.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.models.network import Network, Params


class Context(NamedTuple):
    """A UNet's conditioning, one row an example: a tree of arrays, None where the model takes none."""

    states: Float[Array, "b s d"]
    pooled: Float[Array, "b p"] | None = None
    time_ids: Float[Array, "b 6"] | None = None

    def cast(self, dtype: Any) -> "Context":
        """States in a compute dtype; sizes stay exact."""
        pooled = None if self.pooled is None else self.pooled.astype(dtype)
        return self._replace(states=self.states.astype(dtype), pooled=pooled)


Conditioner = Callable[[Mapping[str, Params], Int[Array, "b s"]], Context]  # (weights by component, ids) -> Context


def make_conditioner(encoders: Mapping[str, Network], sizes: tuple[int, ...], zeroed: np.ndarray | None) -> Conditioner:
    """The function from ids to Context.

    Args:
      encoders: one text encoder, or SDXL's two in order; ids of their tokenizers lie side by side.
      sizes: SDXL's (original height, width, crop top, left, target height, width), in pixels.
      zeroed: ids (s,) of the empty prompt, if SDXL takes its states as zeros (`force_zeros_for_empty_prompt`).
    """
    if len(encoders) == 1:
        ((name, encoder),) = encoders.items()
        return lambda params, ids: Context(encoder.apply(params[name], ids).last)

    def both(params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
        parts = jnp.split(ids, len(encoders), axis=1)
        states = [encoder.apply(params[name], part) for (name, encoder), part in zip(encoders.items(), parts, strict=True)]
        texts, pooled = jnp.concatenate([s.penultimate for s in states], axis=-1), states[-1].pooled
        if zeroed is not None:
            not_empty = jnp.any(ids != zeroed, axis=1)
            texts, pooled = texts * not_empty[:, None, None], pooled * not_empty[:, None]
        return Context(texts, pooled, jnp.tile(jnp.asarray(sizes, jnp.float32), (ids.shape[0], 1)))

    return both


def check_fit(unet: Mapping[str, Any], encoders: Mapping[str, Network], origin: str) -> None:
    """Raises ValueError, one line, if a UNet's config.json asks for another conditioning than the text encoders give."""
    widths = [encoder.config["hidden_size"] for encoder in encoders.values()]
    if sum(widths) != unet["cross_attention_dim"]:
        raise UserError(
            f"{origin}: the UNet reads text states of width {unet['cross_attention_dim']}, its text encoders give {sum(widths)}"
        )
    added = unet.get("addition_embed_type") is not None
    if added != (len(encoders) == 2):
        raise UserError(f"{origin}: a UNet with micro-conditioning (SDXL) and two text encoders go together, one is missing")
    if added:
        last = list(encoders.values())[-1]
        pooled = last.shapes["text_projection.weight"].shape[1] if "text_projection.weight" in last.shapes else widths[-1]
        expected, present = unet["projection_class_embeddings_input_dim"], pooled + 6 * unet["addition_time_embed_dim"]
        if expected != present:
            raise UserError(
                f"{origin}: the UNet reads {expected} numbers beside the text, SDXL base gives {present} (a refiner?)"
            )
