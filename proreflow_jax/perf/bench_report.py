"""The words in which `bench` says its numbers."""

from collections.abc import Mapping
from typing import Any

from proreflow_jax.perf.chips import GIB
from proreflow_jax.perf.plan_report import WORK, scaled, seconds

Numbers = Mapping[str, Any]


def bench_header(config: str, machine: Numbers) -> str:
    """The first line."""
    devices = f"{machine['devices']} x {machine['kind']}"
    where = f"{devices}, {machine['cores']} cores, jax {machine['jax']}"
    return f"{config} on {where}. Weights and data are made up; times are measured."


def bench_job(found: Numbers) -> str:
    """A job's paragraph."""
    row = f"{seconds(found['seconds_in_a_row'])} in a row: {found['images_per_second_in_a_row']:.3g} images/s"
    times, image = found["seconds"], found["seconds"]["median"] / found["images"]
    lines = [
        f"\nstage {found['stage']}, {found['job']}: {found['images']} images a call, {found['at_once']} at once on a device",
        f"  compile  {seconds(found['compile_seconds'])}",
        f"  time     {median(times)} a call, {seconds(image)} an image: {found['images_per_second']:.3g} images/s; {row}",
        f"  work     {scaled(found['useful_flops'], WORK)} that the method needs, {_utilised(found)}",
        f"  memory   {_memory(found['memory'])}",
        f"  host     {median(found['host_seconds'])} until a call comes back; "
        f"{median(found['host_seconds_of_arguments'])} with {found['arrays']:,} such arrays and nothing to compute",
    ]
    return "\n".join(lines)


def median(times: Numbers) -> str:
    """Median and quartiles, for people."""
    low, high = times["quartiles"]
    return f"{seconds(times['median'])} ({seconds(low)} .. {seconds(high)}, quartiles of {times['count']})"


def _utilised(found: Numbers) -> str:
    rate = f"{scaled(found['flops_per_second'], WORK)}/s"
    share = found["utilisation"]
    return f"{rate}, peak unknown" if share is None else f"{rate}, {100 * share:.1f} % of the peak in bfloat16"


def _memory(memory: Numbers) -> str:
    what = f"{memory['compiled'] / GIB:.3f} GiB a device by the compiler, {memory['temporaries'] / GIB:.3f} of it temporaries"
    if memory["peak"] is not None:
        what += f"; the allocator's highest so far {memory['peak'] / GIB:.3f}"
    return f"{what}; the process's highest on the host so far {memory['process_peak'] / GIB:.2f}"


def fed(found: Numbers) -> str:
    """What a job's input gives, in one line."""
    said = "keeps up" if found["ratio"] >= 1 else "STARVES THE STEP"
    rates = f"{found['rows_per_second']:.4g} rows/s against {found['wanted_per_second']:.4g} images/s"
    return f"  input    {found['input']}: {rates}, {found['ratio']:.3g} times: {said}"


def compared(found: Numbers) -> str:
    """The comparison with diffusers."""
    ratio, (low, high) = found["ratio"], found["ratio"]["quartiles"]
    where = f"{found['device']}, {found['dtype']}, {found['threads']} threads"
    rival = f"torch {found['torch']}, diffusers {found['diffusers']}"
    return "\n".join(
        [
            f"\nUNet forward, {found['images']} image(s): {where}; {rival}, in turns",
            f"  ours     {median(found['ours'])}, {scaled(found['flops_per_second'], WORK)}/s",
            f"  theirs   {median(found['theirs'])}",
            f"  ratio    {ratio['median']:.3f} ours / theirs (quartiles {low:.3f} .. {high:.3f}, "
            f"{ratio['least']:.3f} to {ratio['most']:.3f}, of {ratio['count']} turns)",
            f"  results  differ by {found['largest_difference']:.1e} at most",
        ]
    )
