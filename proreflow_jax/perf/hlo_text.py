"""The text in which libtpu describes a compiled program, as operations by computation; `program_text` is its door.

A fusion's operations stand in a computation of their own, a loop's body and condition too.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from proreflow_jax import UserError

NO_ESTIMATE = 2**62  # cycles from which a number is none: the compiler writes 2^63 - 1 beside what a SparseCore does

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_KIND = re.compile(r" ([a-z][a-z\-]*)\(([^)]*)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ELSEWHERE = re.compile(r"\bcalled_computations=\{%?([\w.\-]+)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TYPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_WINDOWS = re.compile(r'"window_config":\{([^}]*)\}')
_BROKEN = re.compile(r"(?<=kernel_metadata=\{)\n|\n(?=\}\})")  # line ends inside a kernel's metadata


class Op(NamedTuple):
    """One operation, a line of a computation."""

    name: str
    kind: str
    type: str
    operands: tuple[str, ...]  # of a constant its value
    cycles: int | None
    op_name: str
    called: dict[str, tuple[str, ...]]
    target: str  # of a custom call
    channel: str  # of a transfer between chips: its number, which all parts of one that is spread over the program share
    windows: str  # of what works through its arrays window by window: their sizes and how many there are


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
    """(computations by name, the entry's name) of a program's text. Raises UserError if it has no entry or no estimate."""
    computations: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in _BROKEN.sub("", text).splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            current.append(_op(*match.groups()))
    if not entry:
        raise UserError("the text has no ENTRY")
    if not any(op.cycles for lines in computations.values() for op in lines):
        raise UserError("no operation has an estimate of cycles")
    return computations, entry


def _op(name: str, rest: str) -> Op:
    kind = _KIND.search(f" {rest}")
    patterns = (_CYCLES, _OP_NAME, _TARGET, _CHANNEL, _WINDOWS)
    cycles, op_name, target, channel, windows = (pattern.search(rest) for pattern in patterns)
    called: dict[str, tuple[str, ...]] = {key: (value,) for key, value in _CALLED.findall(rest)}
    if branches := _BRANCHES.search(rest):
        called["branches"] = tuple(word.strip().lstrip("%") for word in branches[1].split(","))
    if elsewhere := _ELSEWHERE.search(rest):
        called["elsewhere"] = (elsewhere[1],)
    operands = tuple(re.findall(r"%([\w.\-]+)", kind[2])) if kind else ()
    if kind and kind[1] in ("constant", "parameter"):
        operands = (kind[2],)
    return Op(
        name=name,
        kind=kind[1] if kind else "",
        type=rest[: rest.find(f"{kind[1]}({kind[2]})")] if kind else rest,
        operands=operands,
        cycles=int(cycles[1]) if cycles and int(cycles[1]) < NO_ESTIMATE else None,
        op_name=op_name[1] if op_name else "",
        called=called,
        target=target[1] if target else "",
        channel=channel[1] if channel else name,
        windows=windows[1] if windows else "",
    )


def hlo_shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in a type, a tuple's too."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _TYPE.findall(type_)]


def bytes_of(type_: str) -> int:
    """Bytes of all arrays in a type."""
    width = lambda dtype: 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) // 8
    return sum(width(dtype) * math.prod(shape) for dtype, shape in hlo_shapes(type_))


def trips(condition: list[Op]) -> int | None:
    """How often a loop runs that counts from 0: the only number in its condition; None if there are several."""
    numbers = [op.operands[0] for op in condition if op.kind == "constant" and op.type.startswith(("s32[]", "u32[]"))]
    return int(numbers[0]) if len(numbers) == 1 else None


def fused(op: Op, computations: dict[str, list[Op]]) -> Iterator[Op]:
    """The operation and, of a fusion, everything that was fused into it."""
    yield op
    if op.kind == "fusion":
        for name in op.called.get("calls", ()):
            for part in computations.get(name, ()):
                yield from fused(part, computations)
