"""A job that stands still ends: the stacks of all threads are printed, and the process exits with 1.

A deadlock is no lost process: heartbeats go on. The timer is C's (faulthandler), so that it needs no Python thread to be alive.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_limits: list[float] = []  # seconds, of the watches under way


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Ends the process if `alive` is not called for so long inside the block; 0: never."""
    _limits.append(seconds)
    alive()
    try:
        yield
    finally:
        _limits.pop()
        faulthandler.cancel_dump_traceback_later()
        alive()


def alive() -> None:
    """Something was done: a step, a batch."""
    if _limits and _limits[-1]:
        faulthandler.dump_traceback_later(_limits[-1], exit=True, file=sys.__stderr__)
