"""What libraries log or print beside a verb's own lines is turned off, once a verb starts: no import does so."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

NOISY = ("orbax", "jax", "etils")  # their warnings are for programmers, their errors are shown
SAID_BY_US = ("gcsfs", "fsspec", "google")  # their errors come back as a line of ours
ONE_A_LEAF = ("absl", "asyncio", "concurrent.futures")  # a traceback a leaf of one failed save, which is a line of ours


def quiet_libraries() -> None:
    """For the whole process: a verb's. Log records of the levels that matter still come through."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in (*SAID_BY_US, *ONE_A_LEAF):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """An unraisablehook without the errors of a save that was given up: its coroutines find their event loop closed."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)
