"""Draw pictures: prompts -> one PNG, from a stage's student or from the base model (--stage=0)."""

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
from proreflow_jax.run import cli
from proreflow_jax.run.experiment import load_weights, newest_weights
from proreflow_jax.run.open import open_experiment
from proreflow_jax.run.outlook import compiling
from proreflow_jax.run.stages import LARGEST, find_stage, seed_key
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
BASE_STEPS = 50


def sample(
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
    """Writes a grid: one row a prompt, `count` seeds in columns. Column j starts from the same noise in every row and call."""
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
    weights, trained = newest_weights(experiment, chosen) if chosen else (load_weights(experiment, None), 0)
    if chosen and trained < config.train.steps:
        log.info("stage %d is not finished: its student after %d of %d steps draws", stage, trained, config.train.steps)

    n, encode = experiment.networks, experiment.base.tokenizer.encode
    read = jax.jit(partial(text_context, n.condition))
    context = read(experiment.base.text, np.repeat(encode(texts), count, axis=0))
    against = read(experiment.base.text, encode([negative]))
    noise = jax.random.normal(seed_key(seed), (count, *experiment.base.latent_shape))
    noise = jnp.tile(noise, (len(texts), 1, 1, 1))
    draw = sampler.make_step_by_step(
        weights.params,
        context,
        against,
        unet=n.unet,
        schedule=n.schedule,
        flow=weights.flow,
        guidance=float(guidance),
        dtype=config.model.sampling_dtype,
    )
    compiling("the sampler", n.unet)
    with Progress("drawing", steps, "step") as progress:
        latents = draw(noise, steps, lambda done: progress.advance())
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


if __name__ == "__main__":
    options = {
        "prompt": ("a handwritten seven", "what to draw"),
        "prompts": ("", "text file with one prompt a line, instead of --prompt"),
        "negative": ("", "negative prompt; has an effect when guidance is not 1"),
        "stage": (2, "windows of the student's stage; 0: the base model", (0, 1000)),
        "steps": (
            0,
            "network evaluations, at least the stage's windows; 0: as many as windows, or 50 where there are none",
            (0, 1000),
        ),
        "guidance": (1.0, "classifier-free guidance scale; 1: none", (-1000, 1000)),
        "count": (8, "pictures of each prompt", (1, 4096)),
        "seed": (0, "of the noise", (0, LARGEST)),
        "out": ("samples.png", "PNG file to write"),
    }
    cli.start(sample, __doc__, "configs/digits.py", options)
