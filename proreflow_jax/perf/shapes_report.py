"""The page that `plan` prints of a slice by shapes: a table of all jobs, and from what each column is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

from proreflow_jax.perf.chips import GIB
from proreflow_jax.perf.estimate import Target
from proreflow_jax.perf.plan_report import UNITS, hours, scaled

HEAD = ("stage", "job", "images", "arrays", "sent", "host rows", "reads", "writes", "at the peak", "hours", "chip hours")


def page(name: str, place: Target, alike: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The whole page. alike: of `by_shapes.slice_numbers`; results: of `by_shapes.job_numbers`; name: the config's."""
    return "\n".join([*_about(name, place, alike), "", *_table([HEAD, *map(_row, results)]), "", *_legend(alike, results)])


def _about(name: str, place: Target, alike: Mapping[str, Any]) -> list[str]:
    chip, state, slices = place.chip, alike["state"], alike["slices"]
    axes = " x ".join(f"{axis} {size}" for axis, size in alike["mesh"].items())
    slice_ = f"{slices} x {place.slice}" if slices > 1 else place.slice
    return [
        f"{name} on {slice_}: {alike['chips']} chips of {alike['hosts']} hosts, each chip of"
        f" {chip.memory / GIB:.2f} GiB and {chip.peak / 1e12:.0f} TFLOP/s. Computed; nothing was compiled, nothing ran.",
        f"mesh     {axes}",
        f"state    {state['bytes'] / GIB:.3f} GiB a chip by shapes and shardings; its share by the mesh is "
        f"{state['promised'] / GIB:.3f}; {100 * state['whole']:.1f} % of the weights stay whole on each chip",
    ]


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    host, memory = result["host"], result["memory"]
    rate = lambda name: f"{scaled(host[name], UNITS)}/s" if name in host else "-"
    links = [100 * value / result["seconds"] for value in result["sent_seconds"] or ()]
    sent = [f"{scaled(size, UNITS)}, {part:.0f} %" for size, part in zip(result["sent_bytes"] or (), links, strict=True)]
    part = result["calls"] > 0
    return (
        str(result["stage"]),
        result["job"],
        f"{result['images']} ({result['at_once']})",
        f"{memory['total'] / GIB:.2f} of {memory['available'] / GIB:.2f} GiB" + ("" if result["fits"] else ": NO"),
        " to ".join(dict.fromkeys(sent)) or "-",
        f"{host['rows_per_second']:.3g}/s",
        rate("read_bytes_per_second"),
        rate("written_bytes_per_second"),
        hours(result["full_speed_hours"]) if part else "-",
        hours(result["hours"]) if part else "-",
        f"{result['chip_hours']:.3g}" if part else "-",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _legend(alike: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    share, slow = 100 * results[0]["share"], max(result["between_slices_bytes"] for result in results)
    lines = [
        "images     of a call, and at once on a chip: from the config and the mesh",
        "arrays     all that lives on a chip, by shapes and shardings; NO: does not fit, or not with its state twice, as saves "
        "need. The compiler alone knows temporaries and tiles: plan a smaller slice at as many images at once",
        "sent       weights and gradients' sums that a chip receives a call, by the size of results, from shapes: the least "
        "if gathered weights last for the call, the most if each forward gathers its own; and its time at the links' full rate "
        "as a share of the call's, behind which it may hide",
        "host       rows that one host reads a second, and their bytes; of pairs the bytes that it writes, if all hosts write. "
        "From shapes, at the pace of the hours",
        f"hours      FLOPs of the method, counted from shapes, at the chips' peak, and at {share:.0f} % of it, an assumption "
        "(--share; plan compiles a smaller slice to find it)",
    ]
    if slow:
        lines.append(f"slices     a chip sends {scaled(slow, UNITS)} of gradients' sums a call to the others, from shapes")
    copied = [(result["stage"], result["host"]["copied_bytes"]) for result in results if "copied_bytes" in result["host"]]
    if copied:
        sizes = ", ".join(f"stage {stage} {scaled(size, UNITS)}" for stage, size in copied)
        lines.append(
            f"copies     of pairs on a bucket, by the host that reads most, before training, from shapes: {sizes} "
            f"(--config.train.groups={alike['groups']})"
        )
    return lines
