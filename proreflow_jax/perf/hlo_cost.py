"""The cost of a program by the TPU compiler's text: cycles by kind of work, kernels, communication. See `program_text`.

The compiler writes "estimated_cycles" beside every operation that it schedules. Operations inside a fusion belong to it. A
loop's body is written once and counts as often as the loop's condition says. Pallas kernels have no estimate: splash attention
counts as its floor (matrix products at peak, a head's width filled up to the matrix unit), `narrow_kernel` as its last schedule
(`chips`), others are listed by name.
Transfers between chips have no estimate either: their bytes are counted. One that starts and ends apart (`-start`), works
meanwhile, or is spread over the program in several parts hides behind the work, as does one that a SparseCore carries out;
while any other runs the chip waits, and it counts as its bytes at the links' full rate. What travels to VMEM and back while the
chip works counts as the time that it is late (`prefetch`); other data movement without an estimate as the time of reading and
writing the data.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from proreflow_jax.perf import prefetch
from proreflow_jax.perf.chips import Chip
from proreflow_jax.perf.hlo_text import Op, bytes_of, fused, hlo_shapes, parse, trips
from proreflow_jax.perf.schedule import Schedule

MATRIX = (
    "convolutions",
    "linears",
    "attention",
    "kernels",
)  # the compiler's estimates of these are right
PESSIMISM = 2.2  # by which its estimates of all other kinds are too slow

_ATTENTION = re.compile(r"BTNH|BNTS|attention|splash")
_TRANSFER = re.compile(r"(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?$")
_FREE = {  # operations that take no time of their own, or whose time is another's: layouts, ends of asynchronous ones
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id", "iota"),
    *("copy-start", "opt-barrier", "domain", "broadcast", "reshape"),
    *("slice-start", "slice-done", "dynamic-slice-start", "dynamic-slice-done", "add-dependency"),
}
_SCALAR = 1024  # bytes below which an operation without an estimate is bookkeeping, as loops' counters are
_FREE_CALLS = (
    "AllocateBuffer",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "NopReturnToken",  # of what a SparseCore carries out
)
NARROW = "narrow_mha"  # begins the names of models/narrow_kernel.py's kernels
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products of a splash kernel, by a part of its name


class Cost(NamedTuple):
    """The cost of one call of a program on one chip; numbers are floats since loops multiply them."""

    cycles: dict[str, float]  # by kind, splash attention among "kernels"
    kernels: dict[str, float]  # calls of kernels that have a floor, by name
    unknown: dict[str, float]  # calls of operations without an estimate, by name
    communication: float  # bytes that a chip sends
    waited: float  # of these, bytes of transfers for which the chip waits
    unread_loops: int  # loops whose length was not found: counted once
    scheduled: dict[str, float] = {}  # cycles by kind by libtpu's last schedule, empty where that is not known
    unscheduled: float = 0.0  # of these, estimated cycles of operations whose schedule is not known

    def scheduled_seconds(self, chip: Chip) -> float | None:
        """By the last schedule, with what the chip waits; None where that is not known."""
        return sum(self.scheduled.values()) / chip.clock + self.waited / (chip.links or 1.0) if self.scheduled else None

    def seconds(self, chip: Chip) -> tuple[float, float]:
        """(the compiler's estimate, the same with what is estimated but MATRIX faster by PESSIMISM); both with the waits."""
        right = sum(value for kind, value in self.cycles.items() if kind in (*MATRIX, "prefetches"))
        rest = sum(self.cycles.values()) - right
        waits = self.waited / chip.links if self.waited else 0.0
        return (right + rest) / chip.clock + waits, (right + rest / PESSIMISM) / chip.clock + waits


def cost(text: str, chip: Chip, bundles: Mapping[str, int] | None = None) -> Cost:
    """The cost of the entry and all computations that it calls; see the top of the file. bundles: of `schedule.bundles`."""
    computations, entry = parse(text)
    schedule = Schedule(bundles or {}, computations, chip)
    cycles, kernels, unknown, spared = Counter(), Counter(), Counter(), Counter()
    tally, sent = Counter(), {}
    queues = [prefetch.Queue(chip.bandwidth / chip.clock) for _ in range(2)]  # by the estimates; by the schedule

    def walk(name: str, times: float, behind: bool = False) -> None:
        types = {op.name: op.type for op in computations[name]}
        for op in computations[name]:
            if op.kind == "while":
                length = trips(computations[op.called["condition"][0]])
                tally["loops"] += length is None
                walk(op.called["body"][0], times * (length or 1), behind)
            elif size := prefetch.traffic(op, computations):
                for queue in queues:
                    queue.send(op.name, size)
            elif op.kind in ("call", "conditional", "async-start") or "elsewhere" in op.called:
                for called in _branches(op, computations):
                    walk(called, times, behind or op.kind == "async-start")
            else:
                note(op, types, times, behind or op.kind.endswith("-start") or op.cycles is not None)

    def took(op: Op, types: dict[str, str], times: float, kind: str, estimated: float, scheduled: float) -> None:
        cycles[kind] += times * estimated
        spared[kind] += times * (estimated - scheduled)
        moved = schedule.traffic(op, types)
        for queue, busy in zip(queues, (estimated, scheduled), strict=True):
            queue.work(busy, moved)

    def note(op: Op, types: dict[str, str], times: float, behind: bool) -> None:
        inside = list(fused(op, computations))
        sends = [part for part in inside if _TRANSFER.match(part.kind)]
        kind = _class(op, inside)
        for part in sends:
            again = part.channel in sent
            sent[part.channel] = (sent[part.channel][0], True) if again else (times * _sent(part), behind)
        if op.cycles is not None:
            scheduled = schedule.cycles(op, types)
            took(op, types, times, kind, op.cycles, op.cycles if scheduled is None else scheduled)
            tally["unscheduled"] += times * op.cycles if scheduled is None else 0.0
        elif op.kind == "custom-call":
            if op.target not in _FREE_CALLS:
                known = _splash(op, types, chip) or _narrow(op, types, chip)
                label = _label(op)
                (kernels if known else unknown)[label] += times
                took(op, types, times, "kernels", known or 0.0, known or 0.0)
        elif op.kind in ("async-update", "async-done", "copy-done"):
            estimated, scheduled = (queue.wait(op) for queue in queues)
            cycles["prefetches"] += times * estimated
            spared["prefetches"] += times * (estimated - scheduled)
        elif sends or op.kind in _FREE or op.kind.endswith("-done") or bytes_of(op.type) <= _SCALAR:
            return
        elif op.kind in prefetch.MOVES or (op.kind == "fusion" and kind not in MATRIX):
            busy = _moved(op, types) / chip.bandwidth * chip.clock
            took(op, types, times, kind, busy, busy)
        else:
            unknown[op.kind] += times

    walk(entry, 1.0)
    last = {kind: value - spared[kind] for kind, value in cycles.items()} if bundles else {}
    return Cost(
        cycles=dict(cycles),
        kernels=dict(kernels),
        unknown=dict(unknown),
        communication=float(sum(size for size, _ in sent.values())),
        waited=float(sum(size for size, behind in sent.values() if not behind)),
        unread_loops=int(tally["loops"]),
        scheduled=last,
        unscheduled=float(tally["unscheduled"]) if bundles else 0.0,
    )


def _branches(op: Op, computations: dict[str, list[Op]]) -> tuple[str, ...]:
    """Computations that an operation runs; of a conditional only the branch with the most operations."""
    names = tuple(name for key, value in op.called.items() for name in value)
    return names if op.kind != "conditional" else (max(names, key=lambda name: len(computations[name])),)


def _class(op: Op, inside: list[Op]) -> str:
    products = [part for part in inside if part.kind.startswith(("convolution", "dot"))]
    if products:
        words = " ".join([op.op_name, *(part.op_name for part in products)])
        if _ATTENTION.search(words):
            return "attention"
        return "convolutions" if "conv_general_dilated" in words else "linears"
    kinds = {part.kind for part in inside if part.kind not in ("parameter", "constant", "bitcast", "fusion", "tuple")}
    if "reduce" in kinds or "reduce-window" in kinds:
        return "norms and sums"
    if kinds <= {"copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast"}:
        return "copies"
    return "pads" if "pad" in kinds and kinds <= {"pad", "maximum", "copy", "convert", "reshape"} else "elementwise"


def _moved(op: Op, types: dict[str, str]) -> int:
    """Bytes that an operation without an estimate reads and writes; of an update in place only the update."""
    if op.kind == "dynamic-update-slice":
        return 2 * bytes_of(types.get(op.operands[1], ""))
    read = sum(bytes_of(types.get(name, "")) for name in op.operands) if op.kind == "fusion" else bytes_of(op.type)
    return read + bytes_of(op.type)


def _sent(op: Op) -> int:
    """Bytes of a transfer's result: gathered arrays, sums, a permuted block. The type of a start holds its inputs too."""
    sizes = sorted((bytes_of(f"{dtype}[{','.join(map(str, sides))}]") for dtype, sides in hlo_shapes(op.type)), reverse=True)
    if op.kind in ("all-gather-start", "collective-permute-start", "reduce-scatter-start"):
        return sum(sizes[: max(1, len(sizes) // 2)]) if op.kind == "all-gather-start" else sizes[0]
    return sum(sizes)


def _label(op: Op) -> str:
    name = re.sub(r"[.]\d+$", "", op.name)
    return name if op.target == "tpu_custom_call" else f"{op.target} {name}"


def _splash(op: Op, types: dict[str, str], chip: Chip) -> float | None:
    """Cycles of a splash-attention kernel at its floor; None for any other custom call.

    q (.., heads, s, d) and k (.., heads, t, d) are its first two floating-point arrays of three axes or more; the forward has
    2 matrix products of s x t x d, the gradient of q 3, that of k and v 4, of all three in one 5; d is filled up to the matrix
    unit.
    """
    if not op.name.startswith("splash_mha"):
        return None
    arrays = [shape for name in op.operands for dtype, shape in hlo_shapes(types.get(name, "")) if dtype in ("bf16", "f32")]
    q, k = [shape for shape in arrays if len(shape) >= 3][:2]
    products = next((count for part, count in _PRODUCTS.items() if f"_{part}" in op.name), None)
    if products is None:
        return None
    outputs = [shape for _, shape in hlo_shapes(op.type) if len(shape) >= len(q)]
    products += "_dkv" in op.name and len(outputs) == 3  # the gradient of q too, from the same scores
    filled = -(-q[-1] // chip.lanes) * chip.lanes
    flops = 2 * products * math.prod(q[:-1]) * k[-2] * filled
    return flops / chip.peak * chip.clock


def _narrow(op: Op, types: dict[str, str], chip: Chip) -> float | None:
    """Cycles of models/narrow_kernel.py by its schedule; None for any other custom call, and where that is not known.

    Its rows of sums, (b, heads, 1, s), say how many queries its parts have together, its operands, q, k and v of each part, how
    many keys all of them see: fewer are a text's. Columns (heads, d, 1) are biases and norms: a joint attention's.
    """
    if not op.name.startswith(NARROW):
        return None
    arrays = hlo_shapes(" ".join([op.type, *(types.get(name, "") for name in op.operands)]))
    rows = [shape for dtype, shape in arrays if dtype == "f32" and len(shape) == 4 and shape[2] == 1]
    width = next(shape[2] for _, shape in arrays if len(shape) == 4 and shape[2] > 1)
    joint = any(len(shape) == 3 and shape[2] == 1 for _, shape in arrays)
    heads = [shape for name in op.operands for _, shape in hlo_shapes(types.get(name, "")) if len(shape) == 4 and shape[2] > 1]
    queries, keys = (sum(shape[3] for shape in part) for part in (rows, heads[len(rows) : 2 * len(rows)]))
    known = chip.joint if joint else (chip.narrow if keys == queries else chip.cross).get(width, (0.0, 0.0))
    scores = math.prod(rows[0][:2]) * queries * keys
    return scores / 1e6 * known["_bwd" in op.name] or None
