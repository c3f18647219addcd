"""What the jobs that write records share: the shards that are missing, made batch by batch, by one process or many.

A shard's records depend on their numbers alone, so a killed job goes on with the same bytes and loses one shard at most.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from proreflow_jax import RunFailed
from proreflow_jax.data import loader, records
from proreflow_jax.runtime import mesh, stopping
from proreflow_jax.runtime.processes import broadcast, first, host_arrays, leads
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage.paths import Location

Rows = Mapping[str, np.ndarray]  # of a batch, by field


def begin_records(folder: Location, plan: dict[str, Any], flag: str = "--config.name") -> list[int]:
    """The shards that are missing, as process 0 sees them; its plan is fixed before the others go on.

    Raises ValueError, one line, if the folder holds another plan; `flag` names another folder.
    """

    def look() -> list[int]:
        records.fix_plan(folder, plan, flag)
        records.clean(folder)
        return records.missing_shards(folder, plan)

    missing, lacks = first(look), np.zeros(records.shard_count(plan), bool)
    lacks[missing or []] = True
    return [int(shard) for shard in np.flatnonzero(broadcast(lacks))]


def write_records(
    folder: Location,
    plan: dict[str, Any],
    missing: list[int],
    rows: Callable[[range], Iterator[Rows]],
    kept: Callable[[], None] = lambda: None,
) -> None:
    """Writes the missing shards and publishes the whole; the records of some numbers are `rows(numbers)`, one by one.

    kept: called after each shard.
    """
    for shard in missing:
        shard_rows = rows(records.shard_range(plan, shard))
        if leads():
            records.write_shard(folder, plan, shard, shard_rows)
        else:  # all processes compute the rows, one writes them
            deque(shard_rows, maxlen=0)
        kept()
    first(lambda: publish_records(folder, plan))


def records_there(plan: dict[str, Any], missing: list[int]) -> int:
    """Records in the shards that are not missing."""
    return plan["examples"] - sum(len(records.shard_range(plan, shard)) for shard in missing)


def publish_records(folder: Location, plan: dict[str, Any]) -> None:
    """Writes the manifest. Raises RuntimeError if a shard is missing."""
    if not records.publish(folder, plan):
        raise RunFailed(f"{folder}: shards are missing after the last one was made; run the same command again")


def batched(
    machine: Mesh,
    size: int,
    read: Callable[[np.ndarray], Rows],
    compute: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    numbers: range,
    progress: Progress,
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(what is computed of a batch, how many of its rows count), in order. Every batch has one shape; the last is filled up.

    read: numbers, which may lie behind the last -> this process's rows of a batch; in a thread. compute: on the devices.
    progress: counts the rows.
    """
    own = mesh.own_rows(machine, size)
    begins = range(numbers.start, numbers.stop, size)
    with loader.Ahead(lambda begin: read(begin + own), begins, depth=2) as batches:
        for begin, rows in zip(begins, batches, strict=True):
            stopping.stop_if_asked()
            arrays, count = host_arrays(compute(mesh.put_batch(machine, rows, size))), min(size, numbers.stop - begin)
            progress.advance(count)
            yield arrays, count
