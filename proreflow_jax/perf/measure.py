"""Time and memory of a job on the machine at hand: the job is compiled, run on random arrays and timed.

Calls are timed in two ways. Alone: the host waits for each call; this is a call's time. In a row: the host sends a call before
it waits for the previous one, as the training loop does; this is the rate. Host time ends when a call returns to Python.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax.perf import chips, dummy_arrays, tpu_compile
from proreflow_jax.perf.jobs import Job
from proreflow_jax.perf.resident import STATE
from proreflow_jax.run.experiment import Experiment

HOST_CALLS, HOST_WARMUP = 50, 5  # of the empty program


class Caller:
    """A compiled job that is called repeatedly; each call consumes the state that the call before returned."""

    def __init__(self, program: Any, job: Job, arguments: tuple[Any, ...]) -> None:
        self._program, self._arguments, self._passes = program, arguments, STATE in job.classes

    def __call__(self) -> Any:
        """Sends one call; returns outputs to wait for, which no later call consumes."""
        out = self._program(*self._arguments)
        if not self._passes:
            return out
        state, numbers = out
        self._arguments = state, *self._arguments[1:]
        return numbers


def time_job(experiment: Experiment, job: Job, steps: int, warmup: int) -> dict[str, Any]:
    """The numbers of one job: seconds, images and FLOPs a second, bytes of one device, seconds that a call keeps the host.

    Args:
      job: from `perf.jobs.jobs`, on this machine's devices.
      steps: calls that are timed, first alone, then in a row.
      warmup: calls before these, after a first one that is never counted.

    Raises jax's RuntimeError if the job does not fit the device.
    """
    device, start = experiment.mesh.devices.flat[0], perf_counter()
    program = job.jitted.lower(*job.arguments).compile()
    compiled = perf_counter() - start
    call = Caller(program, job, job.hold(dummy_arrays.filled(experiment, job.rest or job.arguments)))
    for _ in range(warmup + 1):
        jax.block_until_ready(call())
    alone, (row, host) = each_alone(call, steps), in_a_row(call, steps)
    memory = device_memory(program, device)
    del call
    median = float(np.median(alone))
    result = {
        "stage": job.windows,
        "job": job.name,
        "images": job.images,
        "at_once": job.at_once,
        "arrays": len(jax.tree.leaves(job.arguments)),
        "compile_seconds": compiled,
        "seconds": run_spread(alone),
        "seconds_in_a_row": row,
        "images_per_second": job.images / median,
        "images_per_second_in_a_row": job.images / row,
        "memory": memory,
        "host_seconds": run_spread(host),
        "host_seconds_of_arguments": run_spread(host_times(job)),
    }
    return result | work(job.useful(), median, experiment.mesh.size, chips.chip_of(device.device_kind))


def each_alone(call: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each call; the host waits for each."""
    times = []
    for _ in range(steps):
        start = perf_counter()
        jax.block_until_ready(call())
        times.append(perf_counter() - start)
    return times


def in_a_row(call: Callable[[], Any], steps: int) -> tuple[float, list[float]]:
    """(seconds a call, seconds until each call returned), each call sent before the host waits for the previous one."""
    sent, before, begin = [], None, perf_counter()
    for _ in range(steps):
        start = perf_counter()
        after = call()
        sent.append(perf_counter() - start)
        jax.block_until_ready(before)
        before = after
    jax.block_until_ready(before)
    return (perf_counter() - begin) / steps, sent


def host_times(job: Job) -> list[float]:
    """Seconds of a jitted call on the host for its arguments alone: an empty program, as many arrays, the same names."""
    arguments = dummy_arrays.tiny(job.arguments)
    passes = STATE in job.classes
    places = jax.tree.map(lambda array: array.sharding, arguments)

    def nothing(*arrays: Any) -> Any:
        return (jax.lax.optimization_barrier(arrays[0]), jnp.zeros(())) if passes else jnp.zeros(())

    out_places = (places[0], None) if passes else None
    options = {"donate_argnums": 0} if passes else {}
    jitted = jax.jit(nothing, in_shardings=places, out_shardings=out_places, keep_unused=True, **options)
    call, times = Caller(jitted, job, arguments), []
    for _ in range(HOST_WARMUP + HOST_CALLS):
        start = perf_counter()
        waits = call()
        times.append(perf_counter() - start)
        jax.block_until_ready(waits)
    return times[HOST_WARMUP:]


def work(useful: float, seconds: float, devices: int, chip: chips.Chip | None) -> dict[str, float | None]:
    """FLOPs of one call that the method needs, FLOP/s of all devices, and the share of their peak (None if not known)."""
    rate = useful / seconds
    return {"useful_flops": useful, "flops_per_second": rate, "utilisation": rate / devices / chip.peak if chip else None}


def device_memory(program: Any, device: jax.Device) -> dict[str, int | None]:
    """Bytes of one device by the compiler, the allocator's peak since the process began (None if it has none), and the host's
    peak.
    """
    compiled, stats = tpu_compile.memory_of(program), device.memory_stats() or {}
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "compiled": compiled.total,
        "temporaries": compiled.temporaries,
        "peak": stats.get("peak_bytes_in_use"),
        "process_peak": highest * (1 if sys.platform == "darwin" else 1024),
    }


def run_spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least, most and count of some numbers."""
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {
        "median": median,
        "quartiles": [low, high],
        "least": float(min(values)),
        "most": float(max(values)),
        "count": len(values),
    }
