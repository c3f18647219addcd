"""Stable Diffusion 3's conditioning: two CLIPs with projections, and T5 or none.

Esser et al. 2024, sec. 4 and app. B.3. The CLIPs' states before their last layers lie side by side, filled up with zeros to the
width of T5's, which follow along the sequence; both pooled states lie side by side. Without T5 its rows are zeros.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from proreflow_jax import UserError
from proreflow_jax.models.network import Conditioner, Context, Network, Params

CLIPS = 2


def make_joint_conditioner(encoders: Mapping[str, Network], width: int, tokens: int) -> Conditioner:
    """The function from ids to Context(states (b, 2-fold CLIP's tokens / 2 + tokens, width), pooled, None).

    Args:
      encoders: two CLIPs with projections, and T5 or not, in order; ids of their tokenizers lie side by side, both CLIPs' in
        equal parts, then T5's if it is there.
      width: of the states, the transformer's joint_attention_dim.
      tokens: T5's ids in each row; without T5, rows of zeros in their place: 256 as in diffusers, or 1 for a transformer
        that was made with repeated=256.
    """
    clips, third = list(encoders.items())[:CLIPS], list(encoders.items())[CLIPS:]

    def condition(params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
        both = ids.shape[1] - (tokens if third else 0)
        parts = jnp.split(ids[:, :both], CLIPS, axis=1)
        states = [encoder.apply(params[name], part) for (name, encoder), part in zip(clips, parts, strict=True)]
        texts = jnp.concatenate([s.penultimate for s in states], axis=-1)
        texts = jnp.pad(texts, ((0, 0), (0, 0), (0, width - texts.shape[-1])))
        rest = [encoder.apply(params[name], ids[:, both:]) for name, encoder in third]
        rest = rest or [jnp.zeros((ids.shape[0], tokens, width), texts.dtype)]
        return Context(jnp.concatenate([texts, *rest], axis=1), jnp.concatenate([s.pooled for s in states], axis=-1))

    return condition


def check_joint_conditioning(transformer: Mapping[str, Any], encoders: Mapping[str, Network], origin: str) -> None:
    """Raises ValueError, one line, if a transformer's config.json asks for another conditioning than the encoders give."""
    clips, third = list(encoders.items())[:CLIPS], list(encoders.items())[CLIPS:]
    if len(clips) != CLIPS or len(third) > 1:
        raise UserError(f"{origin}: Stable Diffusion 3 has two CLIPs and T5 or none, here are {', '.join(encoders) or 'none'}")
    if bare := [name for name, encoder in clips if "text_projection.weight" not in encoder.shapes]:
        raise UserError(f"{origin}: {bare[0]} has no text_projection, the transformer reads projected states of both CLIPs")
    pooled = sum(encoder.shapes["text_projection.weight"].shape[1] for _, encoder in clips)
    if pooled != transformer["pooled_projection_dim"]:
        expected = transformer["pooled_projection_dim"]
        raise UserError(f"{origin}: the transformer reads pooled states of width {expected}, its CLIPs give {pooled}")
    expected, widths = transformer["joint_attention_dim"], sum(encoder.config["hidden_size"] for _, encoder in clips)
    if widths > expected:
        raise UserError(f"{origin}: the transformer reads text states of width {expected}, its CLIPs give {widths}")
    for name, encoder in third:
        if encoder.config["d_model"] != expected:
            given = encoder.config["d_model"]
            raise UserError(f"{origin}: the transformer reads text states of width {expected}, {name} gives {given}")
