"""Looks for a change that makes a job fit, and for the most images that fit; every candidate is compiled."""

import logging
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.perf import make_it_fit
from proreflow_jax.perf.estimate import Target, estimate, opener
from proreflow_jax.run import config_fields

log = logging.getLogger(__name__)
TRIES, SEARCHED = 2, 8  # changes that are compiled, by itself and with --search
LARGEST = 4096  # images at once on a chip


def _tried(config: ConfigDict, place: Target, result: dict[str, Any], change: config_fields.Change) -> dict[str, Any] | None:
    """The job's numbers after a change; None if the changed config is none that a job could carry out."""
    other = config_fields.changed(config, change)
    try:
        found = estimate(other, place, opener(other, place), result["stage"], result["job"])
    except UserError as error:
        log.info("%s: %s", config_fields.flags(change), error)
        return None
    return found | {"flags": config_fields.flags(change)}


def _mend(config: ConfigDict, place: Target, result: dict[str, Any], tries: int) -> dict[str, Any] | None:
    """The first change after which the job fits, compiled; None if none of those that were tried does."""
    offered = make_it_fit.smaller(config, result["job"], place.count, result)
    for change, _ in zip(offered, range(tries), strict=False):
        log.info("it does not fit; trying %s", config_fields.flags(change))
        found = _tried(config, place, result, change)
        if found and found["fits"]:
            return found
    return None


def _largest(config: ConfigDict, place: Target, result: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers at the largest power of two times the images at once that fits; None if not even one image does."""
    best, images, rising = None, make_it_fit.outlook(result), True
    for _ in range(SEARCHED):
        found = _tried(config, place, result, make_it_fit.at_once(config, result["job"], place.count, images))
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
