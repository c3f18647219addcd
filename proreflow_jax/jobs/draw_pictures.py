"""Pictures of prompts as one PNG, by a stage's student or by the base model."""

import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.data.prompts import Prompts
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import text_context
from proreflow_jax.run.experiment import load_weights
from proreflow_jax.run.open import open_experiment
from proreflow_jax.run.stages import find_stage, seed_key
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
BASE_STEPS = 50


def draw_pictures(
    config: ConfigDict,
    *,
    prompt: str,
    prompts: str,
    negative: str,
    stage: int,
    steps: int,
    guidance: float,
    count: int,
    seed: int,
    out: str,
) -> None:
    """Writes a grid: one row a prompt, `count` seeds in columns. Column j starts from the same noise in every row and call.

    The parameters are the flags of `sample`, which explains them.
    """
    experiment = open_experiment(config, base_alone=not stage)
    chosen = find_stage(experiment.stages, stage) if stage else None
    listed = [{"caption": prompt}]
    if prompts:
        listed = Prompts(paths.local_copy(paths.parse_path(prompts, "--prompts"), "--prompts"), "--prompts")
    texts = [listed[i]["caption"] for i in range(len(listed))]
    if not texts[0]:
        raise UserError("--prompt is empty: say what to draw, or name a text file by --prompts")
    path = paths.parse_path(out, "--out")
    if path.suffix.lower() != ".png" or isinstance(path, Path) and not path.parent.is_dir():
        raise UserError(f"--out={out} must be a .png file in a folder that exists")
    steps = steps or stage or experiment.flow.windows or BASE_STEPS
    sampler.check_sampling(steps, chosen.student if chosen else experiment.flow)
    weights = load_weights(experiment, chosen)

    n, encode = experiment.networks, experiment.base.tokenizer.encode
    read = jax.jit(partial(text_context, n.condition))
    context = read(experiment.base.text, np.repeat(encode(texts), count, axis=0))
    against = read(experiment.base.text, encode([negative]))
    noise = jax.random.normal(seed_key(seed), (count, *experiment.base.latent_shape))
    noise = jnp.tile(noise, (len(texts), 1, 1, 1))
    draw = partial(
        sampler.sample_latents,
        unet=n.unet,
        schedule=n.schedule,
        flow=weights.flow,
        steps=steps,
        guidance=float(guidance),
        dtype=config.model.sampling_dtype,
    )
    latents = jax.jit(draw)(weights.params, noise, context, against)
    check_finite_rows(np.isfinite(np.asarray(latents)).all(axis=(1, 2, 3)), np.repeat(texts, count).tolist())
    decode = jax.jit(lambda weights, z: sampler.decode(n.vae, weights, z, n.scaling))
    images = np.asarray(decode(experiment.base.params["vae"], latents))
    rows = images.reshape(len(texts), count, *images.shape[1:])
    with atomic.drafted(path) as draft:
        Image.fromarray(np.concatenate(np.concatenate(rows, axis=1), axis=1)).save(draft, "PNG")
    log.info(
        "wrote %s: %d prompts x %d seeds, %d steps, guidance %g, %s",
        path, len(texts), count, steps, guidance, config.model.sampling_dtype,
    )  # fmt: skip
