"""Memory and time of a config's jobs on a TPU slice, by compiling them; no TPU is needed.

    proreflow plan --config=sd15 --slice=v5e:4x4 --json=plan.json

Needs the base model's config.json files, and the TPU compiler: pip install libtpu (the extra `plan`). Compiling a real model
takes minutes a job; results are cached. Exit code 1: a job does not fit.
"""

import logging

from ml_collections import ConfigDict

from proreflow_jax import RunFailed
from proreflow_jax.run import cli
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)


def plan(
    config: ConfigDict, *, slice: str, stage: int, jobs: str, search: bool, table: bool, share: float, json: str, cache: str
) -> None:
    """The verb: prints the account of every job; raises RuntimeError if one does not fit."""
    from proreflow_jax.perf import by_shapes, chips, plan_report, shapes_report, tpu_compile
    from proreflow_jax.perf.estimate import estimate, opener, target
    from proreflow_jax.perf.jobs import choose_jobs
    from proreflow_jax.perf.search import SEARCHED, TRIES, find_change, find_largest

    place = target(slice, cache, config.mesh.slices)
    cli.make_place(json, "--json")
    tpu_compile.prepare_compiler()
    chosen = choose_jobs(config, stage, jobs)
    opened, results, alike = opener(config, place), [], {}
    if table or chips.is_large(slice):
        alike, results = by_shapes.numbers(opened(), place, chosen, share)
        print(shapes_report.page(config.name, place, alike, results))
        chosen = []
    else:
        print(plan_report.header(config, place))
    for windows, name in chosen:
        result = estimate(config, place, opened, windows, name)
        print(plan_report.job(result), flush=True)
        if not result["fits"]:
            result["change"] = find_change(config, place, result, SEARCHED if search else TRIES)
            print(plan_report.change(result["change"]), flush=True)
        if search:
            result["largest"] = find_largest(config, place, result)
            print(plan_report.largest(result["largest"]), flush=True)
        results.append(result)
    totals = plan_report.totals(results)
    print(plan_report.summary(totals))
    if json:
        numbers = {"slice": slice, "chips": place.count, "config": config.name, "jobs": results, "totals": totals}
        atomic.write_json(json, numbers | ({"by_shapes": alike} if alike else {}))
    short = sum(not result["fits"] for result in results)
    if short:
        raise RunFailed(f"{short} of {len(results)} jobs do not fit {slice}: see the changes above, or take a larger slice")


if __name__ == "__main__":
    options = {
        "slice": ("v5e:4x4", "TPU slice, chip and topology"),
        "stage": (0, "windows of the one stage to plan; 0: all stages", (0, 1000)),
        "jobs": ("pairs,train,sample", "which jobs to compile, by commas"),
        "search": (False, "look for the largest batch on a chip that fits, and try more changes where something does not"),
        "table": (False, "a table by shapes alone, without compiling: a minute; always so for slices of 256 chips and more"),
        "share": (0.4, "share of the chips' peak with which the table counts hours", (0.001, 1)),
        "json": ("", "file to write every number to"),
        "cache": ("~/.cache/proreflow_jax/plan", "folder where results are kept; empty: nowhere"),
    }
    cli.start(plan, __doc__, "emoji", options)
