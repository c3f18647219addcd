"""K-step sampling: noise and prompts -> latents -> images, of a diffusion model or a student of any number of windows."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import Schedule
from proreflow_jax.models.network import Context, Network, Params, cast
from proreflow_jax.reflow.pairs import make_predict


def check_sampling(steps: int, flow: Parameterization) -> None:
    """Raises UserError, one line, if a network of this parameterization cannot be sampled in so many steps."""
    windows.sampling_nodes(steps, max(flow.windows, 1))


def sample_latents(
    params: Params,
    noise: Float[Array, "b h w c"],
    context: Context,
    negative: Context,
    *,
    denoiser: Network,
    schedule: Schedule,
    flow: Parameterization,
    steps: int,
    guidance: Any,
    solver: str = "ddim",
    dtype: str = "float32",
    skip: int = 0,
) -> Float[Array, "b h w c"]:
    """Latents at t = 0 from noise at t = 1, still scaled.

    Args:
      params: of the denoiser.
      noise: unit normal; with skip the state at the time where the first step that is taken begins (`noised`).
      context, negative: conditioning by the prompts and by the negative prompts (one for all, or one each).
      steps: network evaluations per image (twice that with guidance, one batched call a step).
      guidance: scale; the Python number 1 turns it off.
      solver: of a diffusion model; a student moves along its own path.
      dtype: of the denoiser's computation; the states stay float32.
      skip: of the steps, how many at the noisy end are left out: image-to-image.
    """
    predict = solvers.guided(make_predict(denoiser, schedule, params, dtype), context, negative, guidance)
    return solvers.solve(solvers.make_step(flow, schedule, predict, solver), noise, sampling_times(steps, flow)[skip:])


def sampling_times(steps: int, flow: Parameterization) -> Float[np.ndarray, "steps_plus_1"]:
    """The times from 1 to 0 between which a network of this parameterization is carried. Raises as `check_sampling`."""
    return windows.sampling_nodes(steps, max(flow.windows, 1)).astype(np.float32)


def sample_step(
    params: Params,
    z: Float[Array, "b h w c"],
    times: tuple[Float[Array, ""], Float[Array, ""]],
    carry: Any,
    context: Context,
    negative: Context,
    *,
    denoiser: Network,
    schedule: Schedule,
    flow: Parameterization,
    guidance: Any,
    solver: str = "ddim",
    dtype: str = "float32",
) -> tuple[Float[Array, "b h w c"], Any]:
    """One step of `sample_latents` between two times, for those who look at every state: (the state after it, carry).

    carry: the solver's memory, of the step before; of the first step (zeros like z, the first time of each row).
    """
    predict = solvers.guided(make_predict(denoiser, schedule, params, dtype), context, negative, guidance)
    t, u = (jnp.broadcast_to(time, z.shape[:1]) for time in times)
    return solvers.make_step(flow, schedule, predict, solver)(z, t, u, carry)


def noised(
    schedule: Schedule, latents: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Float[ArrayLike, ""]
) -> Float[Array, "b h w c"]:
    """Scaled latents of pictures as they look at time t, with unit normal noise."""
    return schedule.alpha(t) * latents + schedule.sigma(t) * noise


def decode(
    vae: Network, params: Params, latents: Float[Array, "b h w c"], scaling: float, dtype: str = "float32"
) -> UInt8[Array, "b height width 3"]:
    """Scaled latents -> uint8 images, computed in `decoding_dtype`."""
    dtype = decoding_dtype(vae, dtype)
    weights = params if dtype == "float32" else cast(params, dtype)
    images = vae.apply(weights, (latents / scaling).astype(dtype), method="decode").astype(jnp.float32)
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def decoding_dtype(vae: Network, dtype: str) -> str:
    """The dtype that is asked for; float32 where the VAE's config.json asks for it (`force_upcast`, as SDXL's does)."""
    return "float32" if vae.config.get("force_upcast") else dtype


def decoding_facts(vae: Network, dtype: str) -> dict[str, str]:
    """How pictures were decoded, for what depends on them: {} in float32, as of all pictures that older runs keep."""
    dtype = decoding_dtype(vae, dtype)
    return {} if dtype == "float32" else {"decoded": dtype}
