"""Metrics of a run: a JSON object per logged step, TensorBoard, the stop at a number that is none, traces.

metrics.jsonl is the record; everything else is a view. After a resume the lines past the restored step are dropped,
so the file of a killed run equals that of a run never killed. A line's numbers are means over the steps since the line before.
The loop dispatches step n and then hands in the numbers of step n - 1: nothing here touches the device.

An object store cannot append. There the files are written on this machine, and `publish` puts them whole before every
checkpoint and at the end. A kill loses the lines past the last checkpoint, which the resumed run writes again.
"""

import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from proreflow_jax import UserError
from proreflow_jax.runtime.curves import Curves
from proreflow_jax.runtime.tracker import NOWHERE, Tracker
from proreflow_jax.storage.atomic import drafted, path_named
from proreflow_jax.storage.gcs import ObjectPath
from proreflow_jax.storage.paths import parse_path as located

log = logging.getLogger(__name__)
NAMED = 3  # prompts in an error
IN_FLOAT32 = "take --config.model.sampling_dtype=float32, or another --config.model.path"
WINDOW = re.compile(r"(?:^|/)window/(\d+)(?:/|$)")
PROFILE = "--config.profile.steps"
STEP = "train"  # name of a step in the trace


class Metrics:
    """Writes metrics.jsonl (and TensorBoard's files) to `folder`, on process 0 only. Use it as a context manager.

    Args:
      folder: the stage's.
      start_step: steps done before this process.
      tensorboard: whether its files are written.
      offset: steps of the stages before this one, for the axis that all stages share.
      about: the config as text, for TensorBoard.
      tracker: where the numbers and pictures go too.
    """

    def __init__(
        self,
        folder: str | Path | ObjectPath,
        start_step: int,
        *,
        tensorboard: bool = True,
        offset: int = 0,
        about: str = "",
        tracker: Tracker = NOWHERE,
    ) -> None:
        folder = located(folder)
        self._home = folder if isinstance(folder, ObjectPath) else None
        self._scratch = tempfile.TemporaryDirectory() if self._home else None
        self.path = Path(self._scratch.name if self._scratch else folder) / "metrics.jsonl"
        self._put: dict[Path, int] = {}
        self._active = jax.process_index() == 0
        self._tracker, self._offset = tracker, offset
        self._file = self._curves = None
        if not self._active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._home and (self._home / self.path.name).is_file():
            self.path.write_bytes((self._home / self.path.name).read_bytes())
        keep_until(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self._curves = Curves(self.path.parent / "tensorboard", start_step, offset, about)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close all files; their lines stay."""
        for resource in (self._curves, self._file):
            if resource is not None:
                with path_named(self.path):
                    resource.close()
        if self._scratch is None:
            return
        try:
            self._upload()
        except OSError as problem:
            if error is None:
                raise
            log.warning("the last metrics are not in %s: %s", self._home, problem)
        finally:
            self._scratch.cleanup()

    def publish(self) -> None:
        """In an object store, put the files as they are now. Elsewhere do nothing."""
        if self._home and self._active:
            if self._curves is not None:
                self._curves.flush()
            self._upload()

    def _upload(self) -> None:
        """Every file that has grown since it was put."""
        for file in sorted(file for file in self.path.parent.rglob("*") if file.is_file()):
            if (size := file.stat().st_size) != self._put.get(file):
                (self._home / file.relative_to(self.path.parent).as_posix()).upload(file)
                self._put[file] = size

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of `step` (steps done so far). Host floats: a device array here would be waited for."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step, **{name: v if math.isfinite(v) else str(v) for name, v in numbers.items()}}
        with path_named(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._curves is not None:
            self._curves.write(step, numbers)
        self._tracker.numbers(self._offset + step, numbers)

    def picture(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Show a picture that was drawn at `step`."""
        if self._curves is not None:
            self._curves.picture(step, image)
        if self._active:
            self._tracker.picture(self._offset + step, image)


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises FloatingPointError in one line, naming the step, the numbers that are none and their windows.

    A window is read from keys like `window/3/loss`.
    """
    wrong = {name: float(value) for name, value in metrics.items() if not math.isfinite(value)}
    if not wrong:
        return
    windows = sorted({int(match[1]) for name in wrong if (match := WINDOW.search(name))})
    where = f" in window {', '.join(map(str, windows))}" if windows else ""
    values = ", ".join(f"{name}={value}" for name, value in wrong.items())
    raise FloatingPointError(f"step {step}{where}: {values}; lower --config.optimizer.learning_rate or clip_norm")


def check_finite_rows(finite: Sequence[bool], prompts: Sequence[str], mend: str = IN_FLOAT32) -> None:
    """Raises FloatingPointError in one line with the prompts, unless the latents of every row are finite numbers.

    finite: of each row. prompts: of each row.
    """
    wrong = [prompt for whole, prompt in zip(finite, prompts, strict=True) if not whole]
    if wrong:
        shown = ", ".join(repr(prompt) for prompt in list(dict.fromkeys(wrong))[:NAMED])
        raise FloatingPointError(f"latents of {len(wrong)} of {len(prompts)} pictures are not finite, of {shown}: {mend}")


def keep_until(path: str | Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl past `step`, and a last line that a kill cut in half; atomic."""
    path = Path(path)
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step_of(line) <= step]
    with drafted(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a line; infinity if it is no whole record."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_traced_steps(steps: Sequence[int]) -> None:
    """Raises ValueError, one line, unless `steps` is () or the (first, last) step that is traced."""
    whole = all(type(step) is int for step in steps)
    if len(steps) and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f"{PROFILE}={steps!r} must be () or the first and last step that is traced, as in {PROFILE}='(10, 12)'")


class Trace:
    """Records the steps from first to last into `folder`/plugins/profile/<time>. A context manager: its end stops the trace.

    A run that resumes between the two records the remaining steps. A run that resumes later records nothing.

    Args:
      folder: where the trace goes; made when it begins.
      steps: (first, last), as `check_traced_steps` wants them; the first step of a run is 1. (): nothing is recorded.
    """

    def __init__(self, folder: str | Path | ObjectPath = "", steps: Sequence[int] = ()) -> None:
        check_traced_steps(steps)
        self._folder, self._steps = located(folder), tuple(steps)
        self._open: ExitStack | None = None  # of the trace under way

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the dispatch of a step: it is named in the trace, which begins here if it is time."""
        if self._open is None and self._steps and self._steps[0] <= number <= self._steps[1] and jax.process_index() == 0:
            self._open = ExitStack()
            self._open.enter_context(_recording(self._folder))
        with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
            yield

    def sent(self, number: int, result: Any) -> None:
        """After the dispatch: behind the last step the trace ends, once the devices have made `result`."""
        if self._open is not None and number >= self._steps[1]:
            jax.block_until_ready(result)
            self._end()

    def _end(self) -> None:
        if self._open is not None:
            self._steps = ()
            self._open.close()
            self._open = None


OFF = Trace()


@contextmanager
def _recording(folder: Path | ObjectPath) -> Iterator[None]:
    """Records into a folder, by way of this machine's disk where it lies in an object store."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as scratch:
        place = folder if isinstance(folder, Path) else Path(scratch)
        jax.profiler.start_trace(place, profiler_options=options)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
            if not isinstance(folder, Path):
                for file in sorted(file for file in place.rglob("*") if file.is_file()):
                    (folder / file.relative_to(place).as_posix()).upload(file)
    log.info("the trace of the chosen steps is in %s", folder)
