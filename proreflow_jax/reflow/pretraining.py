"""The two trainings behind a latent diffusion model: the autoencoder, then noise prediction on its latents.

(Rombach et al. 2022, sections 3.1 and 3.3.) Draws and losses only; `state.train_step` runs them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from proreflow_jax.flow.losses import squared_error
from proreflow_jax.flow.schedule import Schedule, grid_time, per_example
from proreflow_jax.models.network import Network, Params

DENOISER, TEXT = "unet/", "text_encoder/"  # prefixes of the two networks that are trained as one flat dict


def to_float(images: Array) -> Float[Array, "b h w c"]:
    """uint8 images -> [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def part(params: Params, prefix: str) -> Params:
    """The parameters of one network, without its prefix."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def joined(parts: Mapping[str, Params]) -> Params:
    """{prefix: parameters} -> one flat dict; `part` takes it apart."""
    return {prefix + name: value for prefix, params in parts.items() for name, value in params.items()}


def draw_autoencoder(
    frozen: None, batch: Mapping[str, Array], key: Key[Array, ""], *, latent: tuple[int, ...]
) -> dict[str, Array]:
    """Images in [-1, 1] and the noise of the latents' reparameterisation; latent is their shape (h, w, c)."""
    images = to_float(batch["image"])
    return {"image": images, "noise": jax.random.normal(key, (images.shape[0], *latent))}


def autoencoder_loss(
    params: Params, examples: Mapping[str, Array], *, vae: Network, kl_weight: float
) -> tuple[Float[Array, ""], dict]:
    """Squared reconstruction error + kl_weight x KL divergence to a unit normal, mean over latent entries."""
    mean, std = vae.apply(params, examples["image"], method="encode")
    images = vae.apply(params, mean + std * examples["noise"], method="decode")
    error = jnp.mean(squared_error(images, examples["image"]))
    kl = 0.5 * jnp.mean(mean**2 + std**2 - 1.0 - 2.0 * jnp.log(std))
    return error + kl_weight * kl, {"error": error, "kl": kl}


def draw_noise(
    frozen: None,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    empty: Array,
    drop: float,
    most_snr: float = 0.0,
) -> dict[str, Array]:
    """z_t = a x0 + s eps at grid times drawn uniformly, and for each example one of its wordings.

    Prompts are replaced by the empty one with probability `drop`.

    batch: mean, std (b, h, w, c) of scaled latents, ids (b, k, s) of k wordings. empty: (s,) ids of the empty prompt.
    most_snr: errors are weighted by min(SNR, most_snr) / SNR, so that an error of x0 counts min(SNR, most_snr) (Hang et al.
    2023, eq. 8); 0: all alike.
    """
    latents, times, noise, drops = jax.random.split(key, 4)
    b = batch["mean"].shape[0]
    x0 = batch["mean"] + batch["std"] * jax.random.normal(latents, batch["mean"].shape)
    t = grid_time(jax.random.randint(times, (b,), 1, 1001))
    eps = jax.random.normal(noise, x0.shape)
    z = per_example(schedule.alpha(t), x0) * x0 + per_example(schedule.sigma(t), x0) * eps
    ids = jnp.where(jax.random.bernoulli(drops, drop, (b, 1)), empty, draw_wording(batch["ids"], jax.random.fold_in(drops, 1)))
    weight = {"weight": jnp.minimum(1.0, most_snr * jnp.exp(-schedule.log_snr(t)))} if most_snr else {}
    return {"z": z, "timestep": schedule.timestep(t), "eps": eps, "ids": ids, **weight}


def draw_wording(ids: Int[Array, "b k s"], key: Key[Array, ""]) -> Int[Array, "b s"]:
    """One of the k wordings of each example."""
    b, k, _ = ids.shape
    return ids[jnp.arange(b), jax.random.randint(key, (b,), 0, k)]


def noise_loss(
    params: Params, examples: Mapping[str, Array], *, denoiser: Network, text_encoder: Network
) -> tuple[Float[Array, ""], dict]:
    """Mean |eps - eps_theta|^2 (Ho et al. 2020, eq. 14); the text encoder learns along (Rombach et al. 2022, eq. 3).

    Where the draw gave weights, the loss is the weighted mean and the plain one is the metric "error".
    """
    context = text_encoder.apply(part(params, TEXT), examples["ids"]).last
    eps = denoiser.apply(part(params, DENOISER), examples["z"], examples["timestep"], context)
    errors = squared_error(eps, examples["eps"])
    if "weight" not in examples:
        return jnp.mean(errors), {}
    return jnp.mean(examples["weight"] * errors), {"error": jnp.mean(errors)}
