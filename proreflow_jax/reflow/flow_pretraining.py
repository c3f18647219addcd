"""The training of a rectified flow on latents, in the place of noise prediction.

z = (1 - sigma) x0 + sigma eps, and the network learns v = eps - x0 (Esser et al. 2024, sec. 3.1). Draw and
loss only, like `pretraining`, whose latents, wordings and prompt dropout these are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from proreflow_jax.flow.losses import squared_error
from proreflow_jax.flow.schedule import RectifiedFlow, per_example
from proreflow_jax.models.network import Conditioner, Network, Params
from proreflow_jax.reflow.pretraining import draw_wording, part

TRANSFORMER = "transformer/"  # prefix of the network, as `pretraining.DENOISER` is a UNet's


class LogitNormal(NamedTuple):
    """The density of times whose logit is normal (Esser et al. 2024, eq. 19)."""

    mean: float  # 0: as many times above 1/2 as below; more leans to noise
    std: float


def draw_times(key: Key[Array, ""], count: int, density: LogitNormal) -> Float[Array, "b"]:
    """Times in (0, 1) by the density."""
    return jax.nn.sigmoid(density.mean + density.std * jax.random.normal(key, (count,)))


def draw_flow(
    frozen: None,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    schedule: RectifiedFlow,
    density: LogitNormal,
    empty: Array,
    drop: float,
) -> dict[str, Array]:
    """z between x0 and noise at times of the density, put through the schedule's shift (Esser et al. 2024, eq. 23), and v.

    Prompts are one wording of each example, replaced by the empty one with probability `drop`.

    batch: mean, std (b, h, w, c) of scaled latents, ids (b, k, s) of k wordings. empty: (s,) ids of the empty prompt.
    """
    latents, times, noise, drops, wording = jax.random.split(key, 5)
    b = batch["mean"].shape[0]
    x0 = batch["mean"] + batch["std"] * jax.random.normal(latents, batch["mean"].shape)
    eps = jax.random.normal(noise, x0.shape)
    t = draw_times(times, b, density)
    z = per_example(schedule.alpha(t), x0) * x0 + per_example(schedule.sigma(t), x0) * eps
    ids = jnp.where(jax.random.bernoulli(drops, drop, (b, 1)), empty, draw_wording(batch["ids"], wording))
    return {"z": z, "timestep": schedule.timestep(t), "v": eps - x0, "ids": ids}


def flow_loss(
    params: Params, examples: Mapping[str, Array], *, denoiser: Network, condition: Conditioner, encoders: tuple[str, ...]
) -> tuple[Float[Array, ""], dict]:
    """Mean |v - v_theta|^2 (Esser et al. 2024, sec. 2, with the weight of rectified flows); the text encoders learn along.

    params: of the network, without its constants, and of the encoders, each behind its name and a stroke.
    """
    context = condition({name: part(params, f"{name}/") for name in encoders}, examples["ids"])
    v = denoiser.apply(part(params, TRANSFORMER), examples["z"], examples["timestep"], *context)
    return jnp.mean(squared_error(v, examples["v"])), {}
