"""The report that `plan` prints."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.perf import hlo_cost, program_text, resident
from proreflow_jax.perf.chips import GIB
from proreflow_jax.perf.estimate import Target

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
WORK = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
CLASSES = (*resident.CLASSES, "tiles", "temporaries")
OUTLINED = 5  # kinds of work that are named
SHOWN = GIB // 2000  # bytes below which a class of memory is not named


def header(config: ConfigDict, place: Target) -> str:
    """The first line."""
    chip = place.chip
    each = f"of each {chip.memory / GIB:.2f} GiB and {chip.peak / 1e12:.0f} TFLOP/s"
    slices = f"{config.mesh.slices} x " if config.mesh.slices > 1 else ""
    chips = f"{place.count} chip{'s' * (place.count > 1)}"
    return (
        f"{config.name} on {slices}{place.slice}: {chips}, {each}. Memory and time are the TPU compiler's account; nothing ran."
    )


def job(result: Mapping[str, Any]) -> str:
    """A job's paragraph."""
    batch = f"{result['images']} images a call, {result['at_once']} at once on a chip"
    head = f"\nstage {result['stage']}, {result['job']}: {batch}"
    lines = [head, f"  memory   {_memory(result)}"]
    lines.append(f"  work     {scaled(result['useful_flops'], WORK)} that the method needs{_utilisation(result)}")
    if "no_time" in result:
        return "\n".join([*lines, f"  time     unknown, because {result['no_time']}"])
    return "\n".join([*lines, *_time(result)])


def _memory(result: Mapping[str, Any]) -> str:
    memory = result["memory"]
    parts = ", ".join(f"{name} {memory[name] / GIB:.3f}" for name in CLASSES if memory[name] >= SHOWN)
    most, free = max(memory["total"], result["saving"]), _free(result)
    verdict = f"fits, {free:.2f} free" if result["fits"] else f"DOES NOT FIT, {-free:.2f} too many"
    saving = f"; {most / GIB:.2f} when it is saved" if most > memory["total"] else ""
    return f"{memory['total'] / GIB:.2f} of {memory['available'] / GIB:.2f} GiB a chip ({parts}{saving}): {verdict}"


def _free(result: Mapping[str, Any]) -> float:
    """GiB of a chip that are left, while the job runs and while a state is saved."""
    return (result["memory"]["available"] - max(result["memory"]["total"], result["saving"])) / GIB


def _utilisation(result: Mapping[str, Any]) -> str:
    return f", {100 * result['utilisation']:.1f} % of the chips' peak" if "utilisation" in result else ""


def _time(result: Mapping[str, Any]) -> list[str]:
    kinds = sorted(result["share"].items(), key=lambda item: -item[1])[:OUTLINED]
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in kinds)
    faster = f"{seconds(result['seconds_if_streaming_is_faster'])} if what only moves data is 2.2 times faster than it says"
    lines = [
        f"  time     {seconds(result['seconds'])} a call, {seconds(result['seconds_per_image'])} an image ({faster})",
        f"  of it    {shares}",
        f"  schedule {_schedule(result)}",
    ]
    if result["sent_bytes"]:
        sent = f"{scaled(result['sent_bytes'], UNITS)} a chip, {seconds(result['sent_seconds'])} at the links' full rate"
        waits = f"{scaled(result['waited_bytes'], UNITS)} of it, {seconds(result['waited_seconds'])} in the time above"
        lines.append(f"  between  {sent} ({scaled(result['links'], UNITS)}/s, published); the chip waits for {waits}")
    ours = {name: count for name, count in result["kernels_at_their_floor"].items() if name.startswith(hlo_cost.NARROW)}
    if floors := {name: count for name, count in result["kernels_at_their_floor"].items() if name not in ours}:
        lines.append(f"  floors   {_counted(floors)}: counted at the chip's peak, not estimated")
    if ours:
        lines.append(f"  kernels  {_counted(ours)}: counted by their last schedule")
    if result["not_estimated"] or result["loops_of_unknown_length"]:
        loops = result["loops_of_unknown_length"]
        unknown = result["not_estimated"] | ({"loops counted once": loops} if loops else {})
        lines.append(f"  MISSING  in the time: {_counted(unknown)}")
    if result["calls"]:
        lines.append(f"  stage    {result['calls']:,} calls: {hours(result['hours'])}, {result['chip_hours']:.3g} chip hours")
    return lines


def _schedule(result: Mapping[str, Any]) -> str:
    if "scheduled_seconds" not in result:
        return f"unknown: only {program_text.LIBTPU} is known to count it"
    share = f"{100 * result['scheduled_utilisation']:.1f} % of the chips' peak"
    left = result["unscheduled_seconds"]
    estimated = f", {seconds(left)} of it estimated" if left > 0.005 * result["scheduled_seconds"] else ""
    return f"{seconds(result['scheduled_seconds'])} a call by libtpu's last schedule, {share}{estimated}"


def change(result: Mapping[str, Any] | None) -> str:
    """The change of the config after which a job fits, in one line."""
    if result is None:
        return "  change   none of the changes tried fits; --search tries more; or take a larger slice"
    return f"  change   {result['flags']} fits with {_free(result):.2f} GiB free (was compiled too: {_pace(result)})"


def largest(result: Mapping[str, Any] | None) -> str:
    """The outcome of a search, in one line."""
    if result is None:
        return "  largest  not even one image at once fits"
    batch = f"{result['at_once']} images at once on a chip ({_free(result):.2f} GiB free): {result['flags']}"
    share = f", {100 * result['utilisation']:.1f} % of the peak" if "utilisation" in result else ""
    return f"  largest  {batch}: {_pace(result)}{share}"


def _pace(result: Mapping[str, Any]) -> str:
    return f"{seconds(result['seconds_per_image'])} an image" if "seconds" in result else "its time is unknown"


def totals(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Hours, chip hours and bytes on the disk of all jobs together, and of how many jobs the time is unknown.

    A job that does not fit counts with its change.
    """
    sums: Counter[str] = Counter()
    stages = {result["stage"]: result["storage"] for result in results}
    for result in results:
        counted = result if "hours" in result else result.get("change") or {}
        sums[f"{result['job']}_hours"] += counted.get("hours", 0.0)
        sums["chip_hours"] += counted.get("chip_hours", 0.0)
        sums["jobs_of_unknown_time"] += "hours" not in counted
    for storage in stages.values():
        sums.update({f"{name}_bytes": size for name, size in storage.items()})
    return dict(sums)


def summary(sums: Mapping[str, float]) -> str:
    """The last paragraph."""
    spent = ", ".join(f"{name} {hours(sums[f'{name}_hours'])}" for name in ("pairs", "train") if f"{name}_hours" in sums)
    disk = ", ".join(f"{name} {scaled(sums[f'{name}_bytes'], UNITS)}" for name in ("pairs", "checkpoints"))
    unknown = f", not counting {sums['jobs_of_unknown_time']} jobs of unknown time" if sums["jobs_of_unknown_time"] else ""
    return f"\ntogether: {spent or 'no job of a stage'}; {sums['chip_hours']:.3g} chip hours{unknown}; on the disk {disk}"


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
