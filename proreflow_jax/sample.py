"""Draw pictures: prompts -> one PNG, or one file a picture, from a stage's student or from the base model (--stage=0)."""

import logging

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data.prompts import Prompts
from proreflow_jax.run import cli, pictures
from proreflow_jax.run.experiment import load_weights
from proreflow_jax.run.image_model import ImageModel, check_texts, count_steps
from proreflow_jax.run.open import open_experiment, title
from proreflow_jax.run.stages import LARGEST, find_stage
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)


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
    labels: bool,
) -> None:
    """Writes a grid: one row a prompt, `count` seeds in columns. Column j starts from the same noise in every row and call."""
    experiment = open_experiment(config, base_alone=not stage)
    chosen = find_stage(experiment.stages, stage) if stage else None
    texts = _read_texts(prompt, prompts)
    check_texts(negative, "--negative")
    _, single = pictures.parse_out(out, "--out")
    if labels and single:
        raise UserError(f"--labels is for a grid, --out={out} is a folder of single pictures: name a .png file")
    count_steps(steps, chosen.student if chosen else experiment.flow)
    name = f"{config.name}-{chosen.folder.name}" if chosen else title(config, experiment.base.source)
    draw = ImageModel.of(experiment, load_weights(experiment, chosen), name)
    images = draw(texts, negative=negative, steps=steps, guidance=guidance, count=count, seed=seed)
    files = pictures.save_pictures(images, out, columns=count, labels=labels, flag="--out")
    log.info(
        "wrote %s: %d prompts x %d seeds, %d steps, guidance %g, %s",
        files[0] if len(files) == 1 else f"{files[0]} to {files[-1].name}",
        len(texts), count, count_steps(steps, draw.flow), guidance, config.model.sampling_dtype,
    )  # fmt: skip


def _read_texts(prompt: str, prompts: str) -> list[str]:
    """The prompts of the text file, or else the one. Raises UserError, one line."""
    if prompts:
        listed = Prompts(paths.local_copy(paths.parse_path(prompts, "--prompts"), "--prompts"), "--prompts")
        return [listed[i]["caption"] for i in range(len(listed))]
    if not prompt:
        raise UserError("--prompt is empty: say what to draw, or name a text file by --prompts")
    return check_texts(prompt, "--prompt")


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
        "out": ("samples.png", "PNG file to write; a folder (its name without an ending): one numbered file a picture"),
        "labels": (False, "prompts beside the grid's rows, seeds above its columns"),
    }
    cli.start(sample, __doc__, "configs/digits.py", options)
