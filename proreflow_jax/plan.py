"""Will it fit, and what will it take: compile a config's jobs for a TPU slice that nobody has rented yet.

    python -m proreflow_jax.plan --config=configs/sd15.py --slice=v5e:4x4 --json=plan.json

Needs the TPU compiler (pip install libtpu==0.0.51, the extra `plan`), no TPU, and of the base model only its config.json files.
Compiling a real model takes minutes a job; results are kept and read again. Exit code 1: something does not fit.
"""

import logging
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import changes, plan_text
from proreflow_jax.estimates import Target, estimate, opener, target
from proreflow_jax.planning import JOBS, wanted
from proreflow_jax.run import cli, config_fields
from proreflow_jax.runtime import aot
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
TRIES, SEARCHED = 2, 8  # changes that are compiled, by itself and with --search
LARGEST = 4096  # images at once on a chip


def plan(config: ConfigDict, slice: str, stage: int, jobs: str, search: bool, json: str, cache: str) -> None:
    """The verb: prints a table of every job; raises RuntimeError if one does not fit."""
    place = target(slice, cache, config.mesh.slices)
    cli.check_place(json, "--json")
    aot.prepare()
    asked = wanted(config, stage, jobs)
    opened, found = opener(config, place), []
    print(plan_text.header(config, place))
    for windows, name in asked:
        result = estimate(config, place, opened, windows, name)
        print(plan_text.job(result), flush=True)
        if not result["fits"]:
            result["change"] = _mend(config, place, result, SEARCHED if search else TRIES)
            print(plan_text.change(result, result["change"]), flush=True)
        if search:
            result["largest"] = _largest(config, place, result)
            print(plan_text.largest(result["largest"]), flush=True)
        found.append(result)
    totals = plan_text.totals(found)
    print(plan_text.summary(totals))
    if json:
        atomic.write_json(json, {"slice": slice, "chips": place.count, "config": config.name, "jobs": found, "totals": totals})
    short = sum(not result["fits"] for result in found)
    if short:
        raise RuntimeError(f"{short} of {len(found)} jobs do not fit {slice}: see the changes above, or take a larger slice")


def _tried(config: ConfigDict, place: Target, result: dict[str, Any], change: config_fields.Change) -> dict[str, Any] | None:
    """The job's numbers after a change; None if the changed config is none that a job could carry out."""
    other = config_fields.changed(config, change)
    try:
        found = estimate(other, place, opener(other, place), result["stage"], result["job"])
    except ValueError as error:
        log.info("%s: %s", config_fields.flags(change), error)
        return None
    return found | {"flags": config_fields.flags(change)}


def _mend(config: ConfigDict, place: Target, result: dict[str, Any], tries: int) -> dict[str, Any] | None:
    """The first change after which the job fits, compiled; None if none of those that were tried does."""
    offered = changes.smaller(config, result["job"], place.count, result)
    for change, _ in zip(offered, range(tries), strict=False):
        log.info("it does not fit; trying %s", config_fields.flags(change))
        found = _tried(config, place, result, change)
        if found and found["fits"]:
            return found
    return None


def _largest(config: ConfigDict, place: Target, result: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers at the largest power of two times the images at once that fits; None if not even one image does."""
    best, images, rising = None, changes.outlook(result), True
    for _ in range(SEARCHED):
        found = _tried(config, place, result, changes.at_once(config, result["job"], place.count, images))
        fits = bool(found and found["fits"])
        if fits and (best is None or found["at_once"] > best["at_once"]):
            best = found
        if best is None and images > 1:
            images, rising = images // 2, False
        elif fits and rising and images < LARGEST:
            images *= 2
        else:
            break
    return best


if __name__ == "__main__":
    options = {
        "slice": ("v5e:4x4", "TPU slice, chip and topology"),
        "stage": (0, "windows of the one stage to plan; 0: all stages"),
        "jobs": (",".join(JOBS), "which jobs to compile, by commas"),
        "search": (False, "look for the largest batch on a chip that fits, and try more changes where something does not"),
        "json": ("", "file to write every number to"),
        "cache": ("~/.cache/proreflow_jax/plan", "folder where results are kept; empty: nowhere"),
    }
    cli.start(plan, __doc__, "configs/digits.py", options)
