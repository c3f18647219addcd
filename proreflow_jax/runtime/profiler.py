"""Traces of chosen steps by jax's profiler, on devices and host, for TensorBoard and xprof.

Only process 0 records, its own devices: all others run the same program. Python's own calls are left out, they would bury the
rest. An object store gets the files when the trace ends; until then they lie on this machine.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from proreflow_jax import UserError
from proreflow_jax.storage.gcs import ObjectPath
from proreflow_jax.storage.paths import parse_path as located

log = logging.getLogger(__name__)
FIELD = "--config.profile.steps"
STEP = "train"  # name of a step in the trace


def check_traced_steps(steps: Sequence[int]) -> None:
    """Raises ValueError, one line, unless `steps` is () or the (first, last) step that is traced."""
    whole = all(type(step) is int for step in steps)
    if len(steps) and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(f"{FIELD}={steps!r} must be () or the first and last step that is traced, as in {FIELD}='(10, 12)'")


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
