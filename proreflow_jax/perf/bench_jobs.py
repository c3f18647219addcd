"""The jobs of a config, timed on the machine at hand with random weights and data."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.perf import bench_report, input_rate, measure, output_rate
from proreflow_jax.perf.estimate import outlines, ticking
from proreflow_jax.perf.jobs import choose_jobs, jobs
from proreflow_jax.run import cli
from proreflow_jax.run.stages import find_stage
from proreflow_jax.storage import atomic

RIVALS = ("diffusers",)


def bench_jobs(
    config: ConfigDict,
    *,
    stage: int,
    jobs: str,
    steps: int,
    warmup: int,
    json: str,
    input: bool,
    output: bool,
    rate: float,
    against: str,
    rows: int,
) -> Iterator[str]:
    """Gives each result in words as soon as it is measured. Raises ValueError for flags that do not fit together.

    The parameters are the flags of `bench`, which explains them.
    """
    _check(rate, input, output)
    cli.make_place(json, "--json")
    if against:
        cli.choose(against, RIVALS, "--against")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is shared with torch
    chosen = choose_jobs(config, stage, jobs)
    report: dict[str, Any] = {"config": config.name, "machine": _machine()}
    yield bench_report.bench_header(config.name, report["machine"])
    if against:
        report["against"] = yield from _compare(config, rows, steps)
    else:
        report["jobs"] = yield from _jobs(config, chosen, steps=steps, warmup=warmup, input=input, output=output, rate=rate)
    if json:
        atomic.write_json(json, report)


def _jobs(
    config: ConfigDict, chosen: list[tuple[int, str]], *, steps: int, warmup: int, input: bool, output: bool, rate: float
) -> Generator[str, None, list[dict[str, Any]]]:
    """The numbers of every job; with --rate only those of its input or its output."""
    experiment, plain = outlines(config, jax.devices())
    results = []
    for windows, name in chosen:
        stage, result = find_stage(experiment.stages, windows), {"stage": windows, "job": name}
        if not rate:
            job = jobs(experiment, stage, plain)[name]
            with ticking(f"stage {windows}, {name}: compiling and running"):
                result = measure.time_job(experiment, job, steps, warmup)
            yield bench_report.bench_job(result)
        if input and name in input_rate.JOBS:
            reads = input_rate.rate(experiment, stage, name, steps)
            result["input"] = input_rate.against(reads, rate or result["images_per_second_in_a_row"])
            yield bench_report.fed(result["input"])
        if output and name == "pairs":
            per_chip = rate or result["images_per_second_in_a_row"] / len(jax.devices())
            result["output"] = output_rate.output_rate(experiment, stage, per_chip)
            yield bench_report.written(result["output"])
        results.append(result)
    return results


def _compare(config: ConfigDict, rows: int, turns: int) -> Generator[str, None, dict[str, Any]]:
    """The denoiser's forward, ours and that of torch."""
    from proreflow_jax.perf import against_diffusers

    with ticking("forward, ours and diffusers' in turns"):
        result = against_diffusers.compare(config, rows, turns)
    yield bench_report.compared(result)
    return result


def _machine() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def _check(rate: float, input: bool, output: bool) -> None:
    if rate and input == output:
        raise UserError(f"--rate={rate} is of the whole job with --input, of one chip with --output: add one of them")
