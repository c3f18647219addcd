"""A source that replaces a bad example by the next good one, counts bad examples and names them.

Item i of a source of n is its first good example among i, i + 1, ... (modulo n). That depends on the examples alone, so every
process, and a resumed run, reads the same; and how many threads read changes nothing either.
"""

import logging
import threading
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.data.images import Unusable

NAMED = 5  # bad examples that are named in the log and in the error; the others are only counted
PROBES = 16  # examples looked at when a source is opened

log = logging.getLogger(__name__)


def open_usable(source: Any, max_bad: float) -> "Usable":
    """`Usable` of a source that has good examples: it is probed first. Raises ValueError, one line, as `probe` does."""
    probe(source)
    return Usable(source, max_bad)


class Usable:
    """`source[i]`, or the next good example. `bad` is {index: defect} of the bad examples so far.

    Args:
        source: random access to examples, with a `name`; raises `Unusable` for one that is not good.
        max_bad: the share of its examples that may be bad; 0: the first one met is the end.

    Raises (where an example is taken): ValueError, one line that counts and names, once more than that share is bad. A source
    with no more bad examples than that never raises it, on any number of processes.
    """

    def __init__(self, source: Any, max_bad: float) -> None:
        self.name, self._source, self._max_bad = source.name, source, max_bad
        self._most = int(max_bad * len(source))
        self.bad: dict[int, str] = {}
        self._over = ""  # the end of the run, in words
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        while True:
            if index not in self.bad:
                try:
                    return self._source[index]
                except Unusable as error:
                    self._note(index, str(error))
            if self._over:  # found here, or by another thread
                raise UserError(self._over)
            index = (index + 1) % len(self)  # ends: where all are bad, more are than max_bad allows

    def _note(self, index: int, why: str) -> None:
        """Enters a bad example. The error that ends the run is set first, so every thread that sees the entry stops."""
        with self._lock:
            if index in self.bad:
                return
            count, reasons = len(self.bad) + 1, [*list(self.bad.values())[: NAMED - 1], why]
            if count > self._most or count == len(self):
                self._over = (
                    f"{count} of {len(self)} examples of {self.name} are bad, --config.data.max_bad={self._max_bad} allows "
                    f"{self._most}: {'; '.join(reasons)}"
                )
            self.bad[index] = why if count <= NAMED else ""
        if count <= NAMED and not self._over:
            last = f"; more are only counted, the run ends after {self._most}" if count == NAMED else ""
            log.warning("bad example, the next good one is read instead: %s%s", why, last)


def probe(source: Any) -> None:
    """Reads a few examples all over a source. Raises ValueError with the first defect if all of them are bad."""
    first, count = None, min(PROBES, len(source))
    for place in range(count):
        try:
            source[place * len(source) // count]
            return
        except Unusable as error:
            first = first or error
    if first is not None:
        raise UserError(f"none of {count} examples all over {source.name} is good, the first: {first}") from first
