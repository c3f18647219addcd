"""Host memory that a save would keep: what orbax's libraries lose, and what the C library does not give back."""

import copy
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import tensorstore

WRITER, COUNTER = "orbax.checkpoint._src.serialization.tensorstore_utils", "get_tensorstore_raw_bytes"
REMEMBERED = 16  # specs; a save has one for each folder that it writes to


def give_back() -> None:
    """Freed memory goes back to the system where the C library can do it (glibc).

    The threads of a save leave theirs in pieces over many heaps, and the process would grow with every save.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_nothing() -> None:
    """Keeps orbax from asking tensorstore over and over for what is never freed (0.1.72 to 0.1.86): any JSON it gives back.

    An equal spec is worked out once and copied from then on: orbax wants it for every array of every save, the same for all of
    a save. Counters of bytes, which orbax wants twice a save for a log that nobody reads, are 0.
    """
    spec = tensorstore.KvStore.Spec
    if not hasattr(spec.to_json, "remembered"):
        spec.to_json = _remembering(spec.to_json)
    if hasattr(orbax := sys.modules.get(WRITER), COUNTER):
        setattr(orbax, COUNTER, lambda *_, **__: 0)


def _remembering(to_json: Callable[..., Any]) -> Callable[..., Any]:
    answers: dict[tuple[str, str], Any] = {}

    def remembered(spec: tensorstore.KvStore.Spec, *args: Any, **kw: Any) -> Any:
        key = (repr(spec), repr((args, kw)))
        answer = answers.get(key)
        if answer is None:
            if len(answers) >= REMEMBERED:
                answers.clear()
            answer = answers[key] = to_json(spec, *args, **kw)
        return copy.deepcopy(answer)

    remembered.remembered = True
    return remembered
