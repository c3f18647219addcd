"""The words in which `plan` says its numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.perf.chips import GIB
from proreflow_jax.perf.estimate import Target

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
WORK = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
CLASSES = ("state", "frozen", "batch", "tiles", "temporaries", "outputs")
OUTLINED = 5  # kinds of work that are named
SHOWN = GIB // 2000  # bytes below which a class of memory is not named


def header(config: ConfigDict, place: Target) -> str:
    """The first line."""
    chip = place.chip
    what = (
        f"{place.count} chip{'s' * (place.count > 1)}, of each {chip.memory / GIB:.2f} GiB and {chip.peak / 1e12:.0f} TFLOP/s"
    )
    several = f"{config.mesh.slices} x " if config.mesh.slices > 1 else ""
    return f"{config.name} on {several}{place.slice}: {what}. Memory and time are the TPU compiler's account; nothing ran."


def job(found: Mapping[str, Any]) -> str:
    """A job's paragraph."""
    lines = [f"\nstage {found['stage']}, {found['job']}: {found['images']} images a call, {found['at_once']} at once on a chip"]
    lines.append(f"  memory   {_memory(found)}")
    lines.append(f"  work     {scaled(found['useful_flops'], WORK)} that the method needs{_utilised(found)}")
    if "seconds" in found:
        lines += _time(found)
    return "\n".join(lines)


def _memory(found: Mapping[str, Any]) -> str:
    memory = found["memory"]
    parts = ", ".join(f"{name} {memory[name] / GIB:.3f}" for name in CLASSES if memory[name] >= SHOWN)
    most, free = max(memory["total"], found["saving"]), _free(found)
    said = f"fits, {free:.2f} free" if found["fits"] else f"DOES NOT FIT, {-free:.2f} too many"
    saving = f"; {most / GIB:.2f} when it is saved" if most > memory["total"] else ""
    return f"{memory['total'] / GIB:.2f} of {memory['available'] / GIB:.2f} GiB a chip ({parts}{saving}): {said}"


def _free(found: Mapping[str, Any]) -> float:
    """GiB of a chip that are left, while the job runs and while a state is saved."""
    return (found["memory"]["available"] - max(found["memory"]["total"], found["saving"])) / GIB


def _utilised(found: Mapping[str, Any]) -> str:
    return f", {100 * found['utilisation']:.1f} % of the chips' peak" if "utilisation" in found else ""


def _time(found: Mapping[str, Any]) -> list[str]:
    kinds = sorted(found["share"].items(), key=lambda item: -item[1])[:OUTLINED]
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in kinds)
    faster = f"{seconds(found['seconds_if_streaming_is_faster'])} if what only moves data is 2.2 times faster than it says"
    lines = [
        f"  time     {seconds(found['seconds'])} a call, {seconds(found['seconds_per_image'])} an image ({faster})",
        f"  of it    {shares}",
    ]
    if found["sent_bytes"]:
        sent = f"{scaled(found['sent_bytes'], UNITS)} a chip, {seconds(found['sent_seconds'])} at the links' full rate"
        lines.append(f"  between  {sent}, mostly behind the work, not in the time above")
    if found["kernels_at_their_floor"]:
        lines.append(f"  floors   {_counted(found['kernels_at_their_floor'])}: counted at the chip's peak, not estimated")
    if found["not_estimated"] or found["loops_of_unknown_length"]:
        loops = found["loops_of_unknown_length"]
        unknown = found["not_estimated"] | ({"loops counted once": loops} if loops else {})
        lines.append(f"  MISSING  in the time: {_counted(unknown)}")
    if found["calls"]:
        lines.append(f"  stage    {found['calls']:,} calls: {hours(found['hours'])}, {found['chip_hours']:.3g} chip hours")
    return lines


def change(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> str:
    """What would make a job fit, in one line."""
    if after is None:
        return "  change   none of the changes tried fits; --search tries more; or take a larger slice"
    took = f"was compiled too: {seconds(after['seconds_per_image'])} an image"
    return f"  change   {after['flags']} fits with {_free(after):.2f} GiB free ({took})"


def largest(found: Mapping[str, Any] | None) -> str:
    """The outcome of a search, in one line."""
    if found is None:
        return "  largest  not even one image at once fits"
    what = f"{found['at_once']} images at once on a chip ({_free(found):.2f} GiB free): {found['flags']}"
    return f"  largest  {what}: {seconds(found['seconds_per_image'])} an image, {100 * found['utilisation']:.1f} % of the peak"


def totals(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Hours, chip hours and bytes on the disk of all jobs together; a job that does not fit counts with its change."""
    sums: Counter[str] = Counter()
    stages = {result["stage"]: result["storage"] for result in found}
    for result in found:
        counted = result if "hours" in result else result.get("change") or {}
        sums[f"{result['job']}_hours"] += counted.get("hours", 0.0)
        sums["chip_hours"] += counted.get("chip_hours", 0.0)
    for storage in stages.values():
        sums.update({f"{name}_bytes": size for name, size in storage.items()})
    return dict(sums)


def summary(sums: Mapping[str, float]) -> str:
    """The last paragraph."""
    spent = ", ".join(f"{name} {hours(sums[f'{name}_hours'])}" for name in ("pairs", "train") if f"{name}_hours" in sums)
    disk = ", ".join(f"{name} {scaled(sums[f'{name}_bytes'], UNITS)}" for name in ("pairs", "checkpoints"))
    return f"\ntogether: {spent or 'no job of a stage'}; {sums['chip_hours']:.3g} chip hours; on the disk {disk}"


def seconds(value: float) -> str:
    """For people: "4.31 ms"."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def hours(value: float) -> str:
    """For people: "3.2 h", below one hour "12 min" or seconds."""
    if value >= 1:
        return f"{value:.3g} h"
    return f"{value * 60:.3g} min" if value * 60 >= 1 else seconds(value * 3600)


def scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """For people: "803 GFLOP"."""
    for unit, one in units:
        if value >= one:
            return f"{value / one:.3g} {unit}"
    return f"{value:.0f}{'' if units is WORK else ' B'}"


def _counted(names: Mapping[str, float]) -> str:
    return ", ".join(f"{name} x {count:g}" for name, count in sorted(names.items()))
