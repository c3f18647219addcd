"""The report that `bench` prints."""

from collections.abc import Mapping
from typing import Any

from proreflow_jax.perf.chips import GIB
from proreflow_jax.perf.plan_report import UNITS, WORK, scaled, seconds

Numbers = Mapping[str, Any]


def bench_header(config: str, machine: Numbers) -> str:
    """The first line."""
    devices = f"{machine['devices']} x {machine['kind']}"
    where = f"{devices}, {machine['cores']} cores, jax {machine['jax']}"
    return f"{config} on {where}. Weights and data are random; times are measured."


def bench_job(result: Numbers) -> str:
    """A job's paragraph."""
    row = f"{seconds(result['seconds_in_a_row'])} in a row: {result['images_per_second_in_a_row']:.3g} images/s"
    times, image = result["seconds"], result["seconds"]["median"] / result["images"]
    batch = f"{result['images']} images a call, {result['at_once']} at once on a device"
    lines = [
        f"\nstage {result['stage']}, {result['job']}: {batch}",
        f"  compile  {seconds(result['compile_seconds'])}",
        f"  time     {median(times)} a call, {seconds(image)} an image: {result['images_per_second']:.3g} images/s; {row}",
        f"  work     {scaled(result['useful_flops'], WORK)} that the method needs, {_utilised(result)}",
        f"  memory   {_memory(result['memory'])}",
        f"  host     {median(result['host_seconds'])} until a call comes back; "
        f"{median(result['host_seconds_of_arguments'])} with {result['arrays']:,} such arrays and nothing to compute",
    ]
    return "\n".join(lines)


def median(times: Numbers) -> str:
    """Median and quartiles, for people."""
    low, high = times["quartiles"]
    return f"{seconds(times['median'])} ({seconds(low)} .. {seconds(high)}, quartiles of {times['count']})"


def _utilised(result: Numbers) -> str:
    rate = f"{scaled(result['flops_per_second'], WORK)}/s"
    share = result["utilisation"]
    return f"{rate}, peak unknown" if share is None else f"{rate}, {100 * share:.1f} % of the peak in bfloat16"


def _memory(memory: Numbers) -> str:
    what = f"{memory['compiled'] / GIB:.3f} GiB a device by the compiler, {memory['temporaries'] / GIB:.3f} of it temporaries"
    if memory["peak"] is not None:
        what += f"; the allocator's highest so far {memory['peak'] / GIB:.3f}"
    return f"{what}; the process's highest on the host so far {memory['process_peak'] / GIB:.2f}"


def fed(result: Numbers) -> str:
    """The rate of a job's input, in one line."""
    said = "keeps up" if result["ratio"] >= 1 else "STARVES THE STEP"
    rates = f"{result['rows_per_second']:.4g} rows/s against {result['wanted_per_second']:.4g} images/s"
    return f"  input    {result['input']}: {rates}, {result['ratio']:.3g} times: {said}"


def written(result: Numbers) -> str:
    """The rate of the pairs' writer, and the chips' idle share, two lines."""
    each = result["write"] + result["finish"]
    rates = f"{1 / each:.4g} rows/s by one process, {scaled(result['bytes'] / each, UNITS)}/s"
    ends = f"{seconds(result['finish'] * result['shard_size'])} of it at the end of a shard of {result['shard_size']:,}"
    idle = ", ".join(f"{chips} {100 * share:.2g} %" for chips, share in result["idle"].items())
    return "\n".join(
        [
            f"  output   {rates}; {ends}; fetched at {scaled(result['bytes'] / result['fetch'], UNITS)}/s",
            f"  idle     chips that wait for their hosts, computed for {result['per_chip']:.3g} pairs/s a chip: {idle}",
        ]
    )


def compared(result: Numbers) -> str:
    """The comparison with diffusers."""
    ratio, (low, high) = result["ratio"], result["ratio"]["quartiles"]
    where = f"{result['device']}, {result['dtype']}, {result['threads']} threads"
    rival = f"torch {result['torch']}, diffusers {result['diffusers']}"
    return "\n".join(
        [
            f"\n{result['network']} forward, {result['images']} image(s): {where}; {rival}, in turns",
            f"  ours     {median(result['ours'])}, {scaled(result['flops_per_second'], WORK)}/s",
            f"  theirs   {median(result['theirs'])}",
            f"  ratio    {ratio['median']:.3f} ours / theirs (quartiles {low:.3f} .. {high:.3f}, "
            f"{ratio['least']:.3f} to {ratio['most']:.3f}, of {ratio['count']} turns)",
            f"  results  differ by {result['largest_difference']:.1e} at most",
        ]
    )
