"""Draw pictures: prompts -> one PNG, or one file a picture, from a stage's student or from the base model (--stage=0)."""

from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.run import cli
from proreflow_jax.run.ranges import LARGEST


def sample(config: ConfigDict, **flags: Any) -> None:
    """The verb: one grid of pictures, or one file a picture."""
    from proreflow_jax.jobs.draw_pictures import draw_pictures

    draw_pictures(config, **flags)


if __name__ == "__main__":
    options = {
        "prompt": ("an octopus, fluent 3d style", "what to draw"),
        "prompts": ("", "text file with one prompt a line, instead of --prompt"),
        "negative": ("", "negative prompt; has an effect when guidance is not 1"),
        "stage": (
            -1,
            "windows of the student's stage; 0: the base model; -1: the last finished, the base if none is",
            (-1, 1000),
        ),
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
    cli.start(sample, __doc__, "emoji", options)
