"""showcase.png: a few prompts in large cells, so that one sees what is lost in few steps and what a student wins back.

Rows: the teacher in many steps and in few, the student of fewest windows, and how far the last two are from the first. Noise is
the same in a column; rows are named by their network calls, of which guidance takes two a step.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from proreflow_jax.evaluation import report
from proreflow_jax.jobs.emoji_pictures import PictureRow, PromptRows, read_prompts
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.storage.paths import Location

FILE = "showcase.png"
CELL = 112  # pixels of a picture
NOISE = 2_000_000  # number of the first one's noise: no picture of the table shares it
Draw = Callable[[PictureRow, PromptRows], UInt8[np.ndarray, "n h w 3"]]


def write_showcase(experiment: Experiment, rows: Sequence[PictureRow], draw: Draw) -> Location | None:
    """Writes the picture into the run's folder and returns its path; None if the config names no prompts for it.

    rows: of the table, the teacher's and those of finished students. draw: of a row's pictures for prompts.
    """
    gate = experiment.config.evaluate.gate
    if not gate.showcase:
        return None
    prompts = read_prompts(experiment, "shown", tuple(gate.showcase), NOISE)
    shown = _shown(rows, gate.showcase_steps)
    pictures = [draw(row, prompts) for row in shown]
    lines = [(f"{row.method}\n{row.calls} network calls", images) for row, images in zip(shown, pictures, strict=True)]
    lines += [
        (f"{row.method}'s difference\nfrom the first row", _apart(images, pictures[0]))
        for row, images in zip(shown[1:], pictures[1:], strict=True)
    ]
    path = experiment.run / FILE
    report.picture(path, lines, gate.showcase, CELL)
    return path


def _shown(rows: Sequence[PictureRow], steps: tuple[int, int]) -> list[PictureRow]:
    """The table's teacher in many and in few steps, and the student of fewest windows in as many steps."""
    teacher = next(row for row in rows if not row.windows)
    students = [row for row in rows if row.windows and row.steps == row.windows]
    return [teacher._replace(steps=count) for count in steps] + sorted(students, key=lambda row: row.windows)[:1]


def _apart(images: UInt8[np.ndarray, "n h w 3"], first: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """White where they are equal, darker and coloured by the absolute difference."""
    return 255 - np.abs(images.astype(np.int16) - first).astype(np.uint8)
