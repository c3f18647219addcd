"""How far a job is: a bar on a terminal, elsewhere a plain line now and then. The clock starts after the first item.

The first item of a job waits for the compiler: its time is told apart and is in no rate.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

import jax
from tqdm import tqdm

from proreflow_jax.runtime import stopping

log = logging.getLogger(__name__)
LINE_SECONDS = 30.0  # between plain lines where there is no terminal
TOLD_SECONDS = 1.0  # a first item that took longer is told


class Progress:
    """Counts the items of one job. Use it as a context manager.

    Args:
      title: of the job, in front of every line.
      total, done: items of the whole job, and those that earlier starts have done.
      unit: the name of one item, "step".
      bar: a bar on stderr, or plain lines; None: a bar if that is a terminal, on process 0.
      more: text behind a line, asked for when a line is shown.
      moved: called with this object after every count.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        done: int = 0,
        *,
        bar: bool | None = None,
        more: Callable[[], str] = lambda: "",
        moved: Callable[["Progress"], None] = lambda progress: None,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.opening: float | None = None  # seconds to the end of the first items, compilation included
        self._more, self._moved = more, moved
        self._began = self._last_line = time.monotonic()
        self._first = (done, self._began)  # items and time at which the clock starts
        self._bar = None
        if sys.stderr.isatty() and jax.process_index() == 0 if bar is None else bar:
            names = {"desc": title, "total": total, "initial": done, "unit": unit}
            self._bar = tqdm(**names, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, where there is one."""
        if self._bar is not None:
            self._bar.close()

    def restart(self) -> None:
        """The first item begins now: what went before is none of its time."""
        self._began = time.monotonic()

    def advance(self, items: int = 1, note: str = "") -> None:
        """So many items more are done, the job is alive. note: what else a line says, "loss 0.12"."""
        stopping.alive()
        self.done += items
        now = time.monotonic()
        if self.opening is None:
            self.opening, self._first = now - self._began, (self.done, now)
            if self.opening >= TOLD_SECONDS and self._bar is None:
                log.info(
                    "%s: the first %s was done after %s, compilation included", self.title, self.unit, duration(self.opening)
                )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{note}{self._more()}", refresh=False)
            self._bar.update(items)
        elif now - self._last_line >= LINE_SECONDS or self.done == self.total:
            self._last_line = now
            log.info("%s", self.line(note))
        self._moved(self)

    def counted(self) -> int:
        """Items since the clock has started."""
        return self.done - self._first[0] if self.opening is not None else 0

    def seconds_each(self) -> float | None:
        """Seconds an item, without the first ones; None if that is not known yet."""
        done, began = self._first
        return (time.monotonic() - began) / (self.done - done) if self.opening is not None and self.done > done else None

    def line(self, note: str = "") -> str:
        """`stage 8, training: 300 of 500 steps, loss 0.12, 12 steps/s, 0:00:16 left`."""
        text = f"{self.title}: {self.done} of {self.total} {self.unit}s{f', {note}' if note else ''}"
        if each := self.seconds_each():
            text += f", {1 / each:.3g} {self.unit}s/s"
            if self.done < self.total:
                text += f", {duration(each * (self.total - self.done))} left"
        return text + self._more()


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 0:01:05."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
