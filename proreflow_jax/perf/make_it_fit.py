"""Changes of a config that make a job fit a slice, or fill it: first those that cost nothing, last those that cost quality.

`plan` compiles each changed config, so nothing is guessed. Only changes that can't be enough are left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.run.check_config import Change, field_value, has_field

REMAT = ("none", "products", "attention", "inputs")  # --config.train.remat, from most memory to least
ROOM = 0.97  # share of a chip's memory that a prediction may fill


def batch_ways(config: ConfigDict, chips: int) -> int:
    """Number of devices that a batch is split over; `chips` counts all slices."""
    m = config.mesh
    return chips // m.tensor if -1 in (m.data, m.fsdp) else m.slices * m.data * m.fsdp


def smaller(config: ConfigDict, job: str, chips: int, result: Mapping[str, Any]) -> Iterator[Change]:
    """Changes that take less memory than `result`, the estimate of a job that does not fit; the cheapest first.

    Order: fewer images at once (accumulation, smaller batches), the state split as `mesh.sharing` says, both, activations
    recomputed (if the config has the field), no average of the weights.
    """
    fewer = list(_fewer(config, job, batch_ways(config, chips)))
    yield from _worth(fewer, result)
    if job != "train":
        return
    split = {} if config.mesh.fsdp == -1 else {"mesh.data": -1, "mesh.fsdp": -1}
    least = fewer[-1][0] if fewer else {}
    if split:
        yield split
        yield split | least
    for policy in _sparing(config):
        yield {"train.remat": policy}
        yield {"train.remat": policy} | split | least
    if config.train.ema:
        yield {"train.ema": 0.0} | split | least


def _sparing(config: ConfigDict) -> tuple[str, ...]:
    """Policies that take less memory than the config's, in order; () if the config has no such field."""
    if not has_field(config, "train.remat") or config.train.remat not in REMAT:
        return ()
    return REMAT[REMAT.index(config.train.remat) + 1 :]


def _fewer(config: ConfigDict, job: str, split: int) -> Iterator[tuple[Change, float]]:
    """(change, share of the images at once on a chip after the change)."""
    field = {"pairs": "pairs.batch", "sample": "evaluate.batch"}.get(job)
    if field:
        now = field_value(config, field)
        for parts in range(2, now // split + 1):
            if now % (parts * split) == 0:
                yield {field: now // parts}, 1 / parts
        return
    now, batch = config.train.accumulation, config.train.batch
    for count in range(now + 1, batch // split + 1):
        if batch % (count * split) == 0:
            yield {"train.accumulation": count}, now / count


def _worth(fewer: list[tuple[Change, float]], result: Mapping[str, Any]) -> list[Change]:
    """Changes after which the temporaries fit, if they shrink in proportion; the last change if none does."""
    memory = result["memory"]
    fixed, moving = memory["total"] - memory["temporaries"], memory["temporaries"]
    fits = [change for change, share in fewer if fixed + moving * share <= ROOM * memory["available"]]
    return fits or [change for change, _ in fewer[-1:]]


def at_once(config: ConfigDict, job: str, chips: int, images: int) -> Change:
    """The change to `images` images at once on a chip; the global batch stays the same if possible."""
    total = images * batch_ways(config, chips)
    if job == "sample":
        return {"evaluate.batch": total}
    if job == "pairs":
        size = config.pairs.shard_size
        alike = size % total == 0 or total % size == 0
        return {"pairs.batch": total} | ({} if alike else {"pairs.shard_size": total * max(1, size // total)})
    if config.train.batch % total == 0:
        return {"train.accumulation": config.train.batch // total}
    return {"train.batch": total, "train.accumulation": 1}


def outlook(result: Mapping[str, Any]) -> int:
    """Images at once that would fill the chip if temporaries grew in proportion: a power of two times the present."""
    memory, images = result["memory"], result["at_once"]
    fixed = memory["total"] - memory["temporaries"]
    room = max(memory["available"] * ROOM - fixed, 0.0) / max(memory["temporaries"], 1)
    factor = 1.0
    while factor * 2 <= room:
        factor *= 2
    while factor > room and images * factor > 1:
        factor /= 2
    return max(1, int(images * factor))
