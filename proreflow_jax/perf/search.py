"""Search for a change that makes a job fit, and for the largest batch that fits; every candidate is compiled."""

import logging
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.perf import make_it_fit
from proreflow_jax.perf.estimate import Target, estimate, opener
from proreflow_jax.run import check_config

log = logging.getLogger(__name__)
TRIES, SEARCHED = 2, 8  # changes that are compiled, without and with --search
LARGEST = 4096  # images at once on a chip


def find_change(config: ConfigDict, place: Target, result: dict[str, Any], tries: int) -> dict[str, Any] | None:
    """The first change after which the job fits, compiled; None if no change that was tried does."""
    changes = make_it_fit.smaller(config, result["job"], place.count, result)
    for change, _ in zip(changes, range(tries), strict=False):
        log.info("it does not fit; trying %s", check_config.flags(change))
        candidate = _estimate_changed(config, place, result, change)
        if candidate and candidate["fits"]:
            return candidate
    return None


def find_largest(config: ConfigDict, place: Target, result: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers at the largest power of two times the images at once that fits; None if not even one image does."""
    best, images, rising = None, make_it_fit.outlook(result), True
    for _ in range(SEARCHED):
        change = make_it_fit.at_once(config, result["job"], place.count, images)
        candidate = _estimate_changed(config, place, result, change)
        fits = bool(candidate and candidate["fits"])
        if fits and (best is None or candidate["at_once"] > best["at_once"]):
            best = candidate
        if best is None and images > 1:
            images, rising = images // 2, False
        elif fits and rising and images < LARGEST:
            images *= 2
        else:
            break
    return best


def _estimate_changed(
    config: ConfigDict, place: Target, result: dict[str, Any], change: check_config.Change
) -> dict[str, Any] | None:
    """The job's numbers after a change; None if the changed config is not valid."""
    other = check_config.changed(config, change)
    try:
        candidate = estimate(other, place, opener(other, place), result["stage"], result["job"])
    except ValueError as error:
        log.info("%s: %s", check_config.flags(change), error)
        return None
    return candidate | {"flags": check_config.flags(change)}
