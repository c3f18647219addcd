"""A run's numbers for TensorBoard: all stages on one axis, windows grouped in one chart, the config as text, pictures.

Tags: "loss", "learning_rate", ...; of window k "loss_by_window/k", so that TensorBoard shows the windows of a number together;
its page Custom Scalars draws them as one chart each. The axis counts the steps of the whole run: a stage begins where the
one before ends. A stage is one of TensorBoard's runs, `stage-8/tensorboard`.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

WINDOW = re.compile(r"window/(\d+)/(.+)")
SAMPLES = "samples"  # the tag of pictures
UNUSED = ("torch", "google.cloud.storage")  # of what tensorboardX imports where it is installed


class Curves:
    """Writes to `folder`.

    Args:
      start: steps of this stage done before; what was written past them is dropped by TensorBoard.
      offset: steps of the stages before this one.
      about: the config as text; "": none.
    """

    def __init__(self, folder: Path, start: int, offset: int = 0, about: str = "") -> None:
        self._offset, self._grouped = offset, False
        self._writer = _summary_writer()(str(folder), purge_step=offset + start + 1)
        if about:
            self._writer.add_text("config", about, offset + start)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step of this stage."""
        tags = {name: tag_of(name) for name in numbers}
        charts = sorted({tag.partition("/")[0] for tag in tags.values() if "/" in tag})
        if charts and not self._grouped:
            self._grouped = True  # it can be said once
            self._writer.add_custom_scalars({"windows": {chart: ["Multiline", [f"{chart}/.*"]] for chart in charts}})
        for name, value in numbers.items():
            self._writer.add_scalar(tags[name], value, self._offset + step)

    def picture(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture of a step of this stage."""
        self._writer.add_image(SAMPLES, image, self._offset + step, dataformats="HWC")

    def flush(self) -> None:
        """Puts what is buffered into the file."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported without torch and google-cloud-storage: seconds, and hundreds of megabytes."""
    absent = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None: importing the name raises ImportError, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in absent:
            del sys.modules[name]
    return SummaryWriter


def tag_of(name: str) -> str:
    """The tag of a number of metrics.jsonl: `window/3/loss` is `loss_by_window/3`."""
    match = WINDOW.fullmatch(name)
    return f"{match[2]}_by_window/{match[1]}" if match else name


def as_text(fields: Mapping[str, object]) -> str:
    """A config's fields, by dotted names, as a table in Markdown."""
    rows = [f"| {name} | `{value!r}` |" for name, value in fields.items()]
    return "\n".join(["| field | value |", "|---|---|", *rows])
