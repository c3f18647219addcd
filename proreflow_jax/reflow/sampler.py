"""K-step sampling: noise and prompts -> latents -> images, of a diffusion model or a student of any number of windows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import Schedule
from proreflow_jax.models.network import Context, Network, Params
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
    unet: Network,
    schedule: Schedule,
    flow: Parameterization,
    steps: int,
    guidance: Any,
    solver: str = "ddim",
    dtype: str = "float32",
) -> Float[Array, "b h w c"]:
    """Latents at t = 0 from noise at t = 1, still scaled.

    Args:
      params: of the UNet.
      noise: unit normal.
      context, negative: conditioning by the prompts and by the negative prompts (one for all, or one each).
      steps: network evaluations per image (twice that with guidance, one batched call a step).
      guidance: scale; the Python number 1 turns it off.
      solver: of a diffusion model; a student moves along its own path.
      dtype: of the UNet's computation; the states stay float32.
    """
    nodes = windows.sampling_nodes(steps, max(flow.windows, 1)).astype(np.float32)
    predict = solvers.guided(make_predict(unet, params, dtype), context, negative, guidance)
    return solvers.solve(solvers.make_step(flow, schedule, predict, solver), noise, nodes)


def make_step_by_step(
    params: Params, context: Context, negative: Context, **options: Any
) -> Callable[[Float[Array, "b h w c"], int, Callable[[int], None]], Float[Array, "b h w c"]]:
    """sample(noise, steps, told) -> latents, as `sample_latents` makes them, by one call of a compiled step for each step.

    One program serves every number of steps. told: called with the steps done, once the device has done them. The arguments
    and options are those of `sample_latents`, but for `steps`.
    """
    flow, guidance = options["flow"], options["guidance"]

    @jax.jit
    def move(weights: Params, z: Array, ends: Array, contexts: tuple[Context, Context], scale: Array) -> Array:
        predict = make_predict(options["unet"], weights, options["dtype"])
        predict = solvers.guided(predict, contexts[0], contexts[1], 1 if guidance == 1 else scale)
        t, u = (jnp.full(z.shape[0], end) for end in ends)
        return solvers.make_step(flow, options["schedule"], predict)(z, t, u, None)[0]

    def sample(noise: Array, steps: int, told: Callable[[int], None]) -> Array:
        nodes = windows.sampling_nodes(steps, max(flow.windows, 1)).astype(np.float32)
        z = noise
        for done, ends in enumerate(zip(nodes[:-1], nodes[1:], strict=True), 1):
            z = jax.block_until_ready(move(params, z, np.array(ends), (context, negative), np.float32(guidance)))
            told(done)
        return z

    return sample


def decode(vae: Network, params: Params, latents: Float[Array, "b h w c"], scaling: float) -> UInt8[Array, "b height width 3"]:
    """Scaled latents -> uint8 images."""
    images = vae.apply(params, latents / scaling, method="decode")
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
