"""What a base model draws while it learns: at every checkpoint, beside the pictures of the training whose captions it is given.

  <run>/samples/samples.json                    prompts, one a picture; count (columns), tile (pixels), gap; steps and guidance
  <run>/samples/vae/step-00000100.png           left pictures of the training, right what the autoencoder makes of them
  <run>/samples/diffusion/step-00000100.png     left the same pictures, right what is drawn from their captions and fixed noise

Drawn with the average weights where there are any. A picture depends on config, data and the weights of its step alone. The
state is read and never changed, and a picture that fails is one line of warning.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from proreflow_jax.jobs.pretrain_networks import Diffusion
from proreflow_jax.jobs.stage_pictures import GAP, RECORD, write_picture
from proreflow_jax.models.network import Network, Params
from proreflow_jax.reflow import pretraining, sampler
from proreflow_jax.run.errors import message
from proreflow_jax.run.ranges import check_range
from proreflow_jax.run.stages import PICTURE_KEY, SAMPLES, run_key
from proreflow_jax.runtime import stopping
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
Draw = Callable[[Params], jax.Array]  # weights under training -> uint8 images (b, h, w, 3)
Keep = Callable[[int, Params], None]  # steps done, weights


class Sheet(NamedTuple):
    """Pictures of the training that are looked at, and their captions."""

    images: UInt8[np.ndarray, "b h w 3"]
    prompts: Sequence[str]
    columns: int


def check_pictures(config: ConfigDict) -> None:
    """Raises UserError, one line, for pictures that cannot be drawn."""
    check_range(config.samples.steps, (1, 1000), "--config.samples.steps")


def choose_sheet(config: ConfigDict, images: np.ndarray, texts: Sequence[Sequence[str]]) -> Sheet | None:
    """As many as --config.samples asks for, from all over the training set, with their first captions; None: no pictures."""
    c = config.samples
    if not c.rows * c.columns:
        return None
    numbers = np.linspace(0, len(images) - 1, c.rows * c.columns).astype(int)
    return Sheet(images[numbers], [texts[i][0] for i in numbers], c.columns)


def write_record(run: Path, config: ConfigDict, sheet: Sheet) -> None:
    """samples.json: what all pictures have in common."""
    record = {"prompts": list(sheet.prompts), "count": sheet.columns, "tile": sheet.images.shape[2], "gap": GAP}
    (run / SAMPLES).mkdir(parents=True, exist_ok=True)
    atomic.write_json(run / SAMPLES / RECORD, record | {"steps": config.samples.steps, "guidance": config.samples.guidance})


def reconstruction(vae: Network, sheet: Sheet) -> Draw:
    """The pictures as they come out of the autoencoder."""

    @jax.jit
    def draw(params: Params) -> jax.Array:
        mean, _ = vae.apply(params, pretraining.to_float(jnp.asarray(sheet.images)), method="encode")
        return sampler.decode(vae, params, mean, 1.0)

    return draw


class Decoder(NamedTuple):
    """The finished autoencoder, and the factor between its latents and those of the diffusion."""

    vae: Network
    params: Params
    scaling: float


def prompted(
    config: ConfigDict, diffusion: Diffusion, decoder: Decoder, ids: Int[np.ndarray, "b s"], empty: Int[np.ndarray, " s"]
) -> Draw:
    """What denoiser and text encoders draw from captions; ids of these and of the empty prompt."""
    denoiser = diffusion.denoiser
    side = denoiser.config["sample_size"]
    noise = jax.random.normal(run_key(config, PICTURE_KEY, 0), (len(ids), side, side, denoiser.config["in_channels"]))
    guidance = 1 if config.samples.guidance == 1 else config.samples.guidance
    options = dict(denoiser=denoiser, schedule=diffusion.schedule, flow=diffusion.flow, guidance=guidance)

    @jax.jit
    def images(joint: Params, vae_params: Params) -> jax.Array:
        params = diffusion.apart(joint)
        read = lambda words: diffusion.condition(params, jnp.asarray(words))
        trained = params[diffusion.name]
        latents = sampler.sample_latents(trained, noise, read(ids), read(empty[None]), steps=config.samples.steps, **options)
        return sampler.decode(decoder.vae, vae_params, latents, decoder.scaling)

    return lambda joint: images(joint, decoder.params)


def keeper(folder: Path, sheet: Sheet | None, draw: Draw | None) -> Keep:
    """Draws and writes the picture of a step. A failure is one line of warning."""
    if sheet is None or draw is None:
        return lambda done, params: None

    def keep(done: int, params: Params) -> None:
        path = folder / f"step-{done:08d}.png"
        try:
            halves = [_grid(images, sheet.columns) for images in (sheet.images, np.asarray(jax.device_get(draw(params))))]
            gap = np.full((len(halves[0]), GAP, 3), 255, np.uint8)
            about = {"prompts": list(sheet.prompts), "step": done}
            write_picture(path, np.concatenate([halves[0], gap, halves[1]], axis=1), about)
        except Exception as error:  # a picture is looked at; nothing depends on it
            log.warning("%s was not drawn (%s: %s); the job goes on", path, type(error).__name__, message(error))
        stopping.alive()

    return keep


def _grid(images: UInt8[np.ndarray, "b h w 3"], columns: int) -> UInt8[np.ndarray, "height width 3"]:
    rows = images.reshape(-1, columns, *images.shape[1:])
    return np.concatenate(np.concatenate(rows, axis=1), axis=1)
