"""Cycles of a program's operations by libtpu's last schedule, beside the estimates that its compiler works with.

An estimate is made before there is a schedule. For a v5e's products both agree within 5 %. A v6e's are estimated 1.1 to 1.6
times as long, since the estimate adds up what goes on side by side; what only moves data 2 to 6 times as long, on either chip.
The schedule is instructions in bundles, one a cycle unless something stalls. libtpu counts them for each operation while it
compiles (`counting`), in a file of one line a bundle.

An operation works through its arrays window by window: its bundles are one window's, and run for each of them. Meanwhile
windows travel between the chip's memory and its registers' own (VMEM), all but the first and the last. So an operation takes
the longer of its bundles and its bytes at the memory's full rate (published), and one window's bytes with their latency. Not
counted: a window that is fetched again, and a transfer that falls short of the full rate.
"""

import atexit
import importlib.metadata
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from proreflow_jax.perf.chips import Chip
from proreflow_jax.perf.hlo_text import Op, bytes_of

LATENCY = 2000  # cycles until a first window is there and the last one gone, as the compiler counts them
VERSION = "0.0.51"  # of the libtpu whose flags and files are known; another might end the process over a flag
FLAGS = (  # the counts alone: texts of the schedules themselves are ten times as large
    *("--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_html=false", "--xla_jf_emit_annotations=true"),
    "--xla_jf_dump_llo_pass_label_regex=final_hlo.*",
)
ARGUMENTS = "LIBTPU_INIT_ARGS"  # libtpu reads it once, when it is loaded
_COUNTS = "*-final_hlo-static-per-bundle-utilization.txt"
_NAME = re.compile(r"^\d+-(.*)-\d+-final_hlo-static")
_BUNDLE = re.compile(r"^\d[\d ]*$", re.MULTILINE)
_ARRAY = re.compile(r"\b(?:pred|[suf]\d+|bf16|f8\w+)\[[\d,]*\](?:\{[^}]*\})?")
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')  # of an operation's windows: how many there are
_ELSEWHERE = re.compile(r"S\(\d+\)")  # in an array's layout: it lies in VMEM, or another place that is not the chip's memory


@cache
def folder() -> Path:
    """Where libtpu leaves its counts, as long as this process lives."""
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@contextmanager
def counting() -> Iterator[None]:
    """A block that loads libtpu does so with the flags that make it count; a libtpu that is loaded already stays as it is.

    They stand in the environment for the block alone: jax's keys of compiled programs take it in.
    """
    before = os.environ.get(ARGUMENTS)
    if importlib.metadata.version("libtpu") == VERSION:
        os.environ[ARGUMENTS] = " ".join([before or "", f"--xla_jf_dump_to={folder()}", *FLAGS]).strip()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ARGUMENTS, None)
        else:
            os.environ[ARGUMENTS] = before


def clear() -> None:
    """Forgets the counts so far: operations of two programs may have the same name."""
    for path in folder().iterdir():
        path.unlink()


def bundles(place: Path) -> dict[str, int]:
    """Bundles of each operation by its name, from the files in a folder. Of operations that are alike one is there."""
    return {
        match[1]: len(_BUNDLE.findall(path.read_text())) for path in place.glob(_COUNTS) if (match := _NAME.match(path.name))
    }


class Schedule:
    """The operations of one program, scheduled."""

    def __init__(self, counts: Mapping[str, int], computations: Mapping[str, Sequence[Op]], chip: Chip) -> None:
        self._counts, self._computations, self._chip = counts, computations, chip
        self._alike: dict[tuple[str, ...], int] = {}
        for ops in computations.values():
            types = {op.name: op.type for op in ops}
            self._alike |= {_key(op, types): counts[op.name] for op in ops if op.name in counts}

    def cycles(self, op: Op, types: Mapping[str, str]) -> float | None:
        """Cycles of an operation that works in windows; None if its bundles are not known. `types` by names of operands."""
        count = self._counts.get(op.name, self._alike.get(_key(op, types)))
        bounds = _BOUNDS.search(op.windows)
        if count is None or bounds is None:
            return None
        turns = math.prod(int(n) for n in re.findall(r"\d+", bounds[1]))
        moved = self.traffic(op, types) / self._chip.bandwidth * self._chip.clock
        return max(count * turns, moved) + (LATENCY + moved / turns if moved else 0.0)

    def traffic(self, op: Op, types: Mapping[str, str]) -> int:
        """Bytes that an operation reads from the chip's memory and writes to it, each number once; of slices only these."""
        sizes = [in_memory(types.get(name, "")) for name in op.operands]
        body = self._computations.get(op.called.get("calls", ("",))[0])
        if body is None:
            update = types.get(op.operands[1], "") if op.kind == "dynamic-update-slice" else ""
            return 2 * in_memory(update) if update else sum(sizes) + in_memory(op.type)
        return sum(self._read(body, str(i), size) for i, size in enumerate(sizes)) + self._written(body, op.type)

    def _read(self, body: Sequence[Op], index: str, whole: int) -> int:
        """Bytes that a fusion reads of its operand `index`, of `whole` bytes."""
        names, total = {op.name for op in body if op.kind == "parameter" and op.operands == (index,)}, 0
        for op in body:
            places = [i for i, name in enumerate(op.operands) if name in names]
            if not places or op.kind == "parameter" or (op.kind == "dynamic-update-slice" and places == [0]):
                continue
            inner = self._computations.get(op.called.get("calls", ("",))[0])
            if op.kind == "bitcast":
                names.add(op.name)
            elif op.kind in ("dynamic-slice", "slice"):
                total += bytes_of(op.type)
            elif inner is not None:
                total += sum(self._read(inner, str(i), whole) for i in places)
            else:
                return whole
        return min(total, whole)

    def _written(self, body: Sequence[Op], type_: str) -> int:
        """Bytes that a fusion of this type writes: of an array that is updated in place its update."""
        by_name, root, arrays = {op.name: op for op in body}, body[-1], _ARRAY.findall(type_)
        results = [by_name[name] for name in root.operands] if root.kind == "tuple" else [root]
        if len(results) != len(arrays):
            return in_memory(type_)
        total = 0
        for array, result in zip(arrays, results, strict=True):
            while result.kind == "bitcast" and result.operands[0] in by_name:
                result = by_name[result.operands[0]]
            inner = self._computations.get(result.called.get("calls", ("",))[0])
            if result.kind == "dynamic-update-slice":
                total += min(in_memory(array), bytes_of(by_name[result.operands[1]].type))
            else:
                total += in_memory(array) if inner is None else self._written(inner, array)
        return total


def in_memory(type_: str) -> int:
    """Bytes of those arrays of a type that lie in the chip's memory."""
    return sum(bytes_of(array) for array in _ARRAY.findall(type_) if not _ELSEWHERE.search(array))


def _key(op: Op, types: Mapping[str, str]) -> tuple[str, ...]:
    """What two operations that libtpu schedules once have in common."""
    return (op.kind, op.type, op.windows, *(types.get(name, "") for name in op.operands))
