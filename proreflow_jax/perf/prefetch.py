"""Arrays that travel between a chip's memory and its VMEM while it works, and how long it waits for them in the end.

XLA sends for what an operation will need while others still work (`copy-start`, of a slice `async-start`), and takes it when
the operation begins (`copy-done`, `async-done`); results go back in the same way. Here they travel one after the other, at the
memory's published rate as far as the operations at work leave it: an operation's own arrays come first.
"""

from collections.abc import Mapping, Sequence

from proreflow_jax.perf.hlo_text import Op, bytes_of
from proreflow_jax.perf.schedule import in_memory

MOVES = ("copy", "dynamic-update-slice", "dynamic-slice", "slice", "transpose", "concatenate")  # which compute nothing


def traffic(op: Op, computations: Mapping[str, Sequence[Op]]) -> int:
    """Bytes that an operation sends for, read from the chip's memory or written to it; 0 if it does not do that."""
    if op.kind == "copy-start":
        return in_memory(op.type)
    if op.kind != "async-start" or "calls" not in op.called:
        return 0
    body = [part for part in computations[op.called["calls"][0]] if part.kind != "bitcast"]
    types = {part.name: part.type for part in body}
    work = [part for part in body if part.kind not in ("parameter", "constant")]
    if any(part.kind not in MOVES for part in work):
        return 0
    total = 0
    for part in work:
        size = bytes_of(types.get(part.operands[1], "") if part.kind == "dynamic-update-slice" else part.type)
        total += size * sum(in_memory(type_) > 0 for type_ in (part.type, types.get(part.operands[0], "")))
    return total


class Queue:
    """What is on its way. rate: bytes a cycle."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._sent, self._there = 0.0, 0.0  # bytes since the start
        self._due: dict[str, float] = {}  # bytes that are there when what was sent under a name is

    def send(self, name: str, size: int) -> None:
        """`size` bytes go at the queue's end."""
        self._sent += size
        self._due[name] = self._sent

    def work(self, cycles: float, moved: int) -> None:
        """The chip works for so many cycles, and moves so many bytes for that itself."""
        self._there = min(self._sent, self._there + max(0.0, cycles * self._rate - moved))

    def wait(self, op: Op) -> float:
        """Cycles until what the operation asks for is there; an `async-update` stands for what it was given."""
        name = op.operands[0] if op.operands else ""
        if op.kind.endswith("-update"):
            self._due[op.name] = self._due.pop(name, 0.0)
            return 0.0
        missing = max(0.0, self._due.pop(name, 0.0) - self._there)
        self._there += missing
        return missing / self._rate
