"""Times a config's jobs on the machine at hand: the same functions that `plan` compiles.

    proreflow bench --config=sd15 --stage=8 --json=bench.json

Of the base model only the config.json files are needed: weights and data are random, with the true shapes and shardings.
--input also times reading, --output the writing of pairs. --against=diffusers times the UNet's forward against torch's instead
of the jobs.
"""

from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.run import cli


def bench(config: ConfigDict, **flags: Any) -> None:
    """The verb: prints each result as soon as it is measured."""
    from proreflow_jax.perf.bench_jobs import bench_jobs

    for text in bench_jobs(config, **flags):
        print(text, flush=True)


if __name__ == "__main__":
    options = {
        "stage": (0, "windows of the one stage to run; 0: all stages", (0, 1000)),
        "jobs": ("pairs,train,sample", "which jobs to run, by commas"),
        "steps": (10, "calls that are timed alone, and again in a row; turns of --against", (1, 1_000_000)),
        "warmup": (1, "calls before them, after a first one that is never counted", (0, 1_000_000)),
        "json": ("", "file to write every number to"),
        "input": (False, "also how many rows a second the input gives, against the step's images a second"),
        "output": (False, "also how fast pairs are written, and how long 4 to 256 chips would wait for that"),
        "rate": (0.0, "images a second, of one chip for --output, instead of running the job; 0: the job's own", (0, 1e9)),
        "against": ("", "diffusers: the UNet's forward beside torch's, instead of the jobs"),
        "rows": (1, "images at once of --against", (1, 65536)),
    }
    cli.start(bench, __doc__, "emoji", options)
