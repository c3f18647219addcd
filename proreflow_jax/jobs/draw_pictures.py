"""Pictures of prompts as one PNG, or as one file a picture, by a stage's student or by the base model."""

import logging

import jax
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data.prompts import Prompts
from proreflow_jax.run import pictures
from proreflow_jax.run.check_config import changed, few_times
from proreflow_jax.run.experiment import load_weights, newest_weights
from proreflow_jax.run.find_model import title
from proreflow_jax.run.image_model import ImageModel, check_texts, count_steps
from proreflow_jax.run.open import open_experiment
from proreflow_jax.run.outlook import compiling
from proreflow_jax.run.stages import DONE, find_stage, stage_folder
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)


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
    labels: bool,
) -> None:
    """Writes a grid: one row a prompt, `count` seeds in columns. Column j starts from the same noise in every row and call.

    The parameters are the flags of `sample`, which explains them.
    """
    if stage < 0:
        stage, config = _best(config)
    experiment = open_experiment(config, base_alone=not stage)
    chosen = find_stage(experiment.stages, stage) if stage else None
    texts = _read_texts(prompt, prompts)
    check_texts(negative, "--negative")
    _, single = pictures.parse_out(out, "--out")
    if labels and single:
        raise UserError(f"--labels is for a grid, --out={out} is a folder of single pictures: name a .png file")
    taken = count_steps(steps, chosen.student if chosen else experiment.flow)
    if chosen and (warning := few_times(config, stage, taken)):
        log.warning(warning)
    weights, trained = newest_weights(experiment, chosen) if chosen else (load_weights(experiment, None), 0)
    if chosen and trained < config.train.steps:
        log.info("stage %d is not finished: its student after %d of %d steps draws", stage, trained, config.train.steps)
    name = f"{config.name}-{chosen.folder.name}" if chosen else title(config, experiment.base.source)
    draw = ImageModel.of(experiment, weights, name)
    compiling("the sampler", experiment.networks.denoiser)
    with Progress("drawing", taken, "step") as progress:
        told = lambda step: (jax.block_until_ready(step.latents), progress.advance())
        images = draw(texts, negative=negative, steps=steps, guidance=guidance, count=count, seed=seed, callback=told)
    files = pictures.save_pictures(images, out, columns=count, labels=labels, flag="--out")
    log.info(
        "wrote %s: %d prompts x %d seeds, %d steps, guidance %g, %s",
        files[0] if len(files) == 1 else f"{files[0]} to {files[-1].name}",
        len(texts), count, taken, guidance, config.model.sampling_dtype,
    )  # fmt: skip


def _best(config: ConfigDict) -> tuple[int, ConfigDict]:
    """The windows of the last finished stage of the config's run, 0 if there is none; and the config of what draws.

    Without a stage that is the student that comes with the base model (`model.student`), read like any model, or else the base.
    """
    run, ready = paths.parse_path(config.root) / config.name, config.model.get("student")
    last = next((count for count in reversed(config.stages) if (stage_folder(run, count) / DONE).is_file()), 0)
    if last:
        log.info("%s: the %d-window student draws", run, last)
    elif ready:
        log.info("%s: no finished stage here, the student in %s draws", run, ready)
        config = changed(config, {"model.path": ready})
    else:
        log.info("%s: no finished stage here, the base model draws", run)
    return last, config


def _read_texts(prompt: str, prompts: str) -> list[str]:
    """The prompts of the text file, or else the one. Raises UserError, one line."""
    if prompts:
        listed = Prompts(paths.local_copy(paths.parse_path(prompts, "--prompts"), "--prompts"), "--prompts")
        return [listed[i]["caption"] for i in range(len(listed))]
    if not prompt:
        raise UserError("--prompt is empty: say what to draw, or name a text file by --prompts")
    return check_texts(prompt, "--prompt")
