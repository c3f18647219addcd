"""Host memory that a save would keep: what orbax's libraries lose, and what the C library does not give back."""

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import tensorstore

REMEMBERED = 16  # specs; a save has one for each folder that it writes to


def give_back() -> None:
    """Freed memory goes back to the system where the C library can do it (glibc).

    The threads of a save leave theirs in pieces over many heaps, and the process would grow with every save.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def remember_specs() -> None:
    """`KvStore.Spec.to_json` of tensorstore works out an equal spec once, and gives a copy of that from then on.

    tensorstore (0.1.72 to 0.1.86) never frees what the method gives back, and orbax calls it for every array of every save,
    with the same spec for all arrays of a save.
    """
    spec = tensorstore.KvStore.Spec
    if not hasattr(spec.to_json, "remembered"):
        spec.to_json = _remembering(spec.to_json)


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
