"""A stage's pair records as its training reads them: every process copies, checks and reads the shards of its own rows alone.

With --config.train.groups=1 any row may be of any shard: each process has all, and hashes its share of them. In more groups the
rows of a process are of few groups, and so are its shards.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proreflow_jax.data import record_plan, records
from proreflow_jax.data.loader import row_group
from proreflow_jax.run.experiment import PLANNED, Experiment, handed_on, stage_plan
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths


def open_pairs(experiment: Experiment, stage: Stage) -> records.PairRecords:
    """Pair records of this very config. Raises UserError or MissingFile, one line, for others and for damaged ones."""
    config, folder = experiment.config, stage.folder / "pairs"
    plan = stage_plan(experiment, stage, handed_on(experiment, stage.maker), PLANNED)
    readers = group_readers(experiment.mesh, config.train.batch, config.train.groups)
    read, hashed = process_shards(plan, readers, jax.process_index())
    names = {record_plan.PLAN, records.MANIFEST, *(record_plan.shard_name(plan, shard) for shard in read)}
    folder = paths.local_copy(folder, names=None if len(read) == record_plan.shard_count(plan) else names)
    record_plan.check_plan(folder, plan)
    return records.PairRecords(folder, verify=hashed, shards=read)


def group_readers(machine: Mesh, batch: int, groups: int) -> dict[int, list[int]]:
    """{group: the processes whose devices hold rows of it}, both ascending."""
    readers: dict[int, set[int]] = {group: set() for group in range(groups)}
    for device, (part,) in mesh.batch_sharding(machine).devices_indices_map((batch,)).items():
        first, last = part.start or 0, (part.stop or batch) - 1
        for group in range(row_group(first, batch, groups), row_group(last, batch, groups) + 1):
            readers[group].add(device.process_index)
    return {group: sorted(by) for group, by in readers.items()}


def process_shards(plan: dict[str, Any], readers: dict[int, list[int]], process: int) -> tuple[list[int], list[int]]:
    """(shards that a process reads, those among them that it hashes: each shard is one of its readers' to hash)."""
    own, groups = {group: by for group, by in readers.items() if process in by}, len(readers)
    read = [(shard, by) for group, by in own.items() for shard in record_plan.group_shards(plan, groups, group)]
    return [shard for shard, _ in read], [shard for shard, by in read if by[shard % len(by)] == process]


def widened(experiment: Experiment, stage: Stage, batches: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    """Batches on the mesh; trajectories are filled up by zeros to as many states as the widest stage has: one shape for all."""
    config, rows = experiment.config, mesh.batch_sharding(experiment.mesh)
    missing = 0 if stage.online or config.pairs.start != "noise" else max(config.stages) - stage.windows
    if not missing:
        yield from batches
        return
    fill = jax.jit(lambda states: jnp.pad(states, ((0, 0), (0, missing), *[(0, 0)] * 3)), out_shardings=rows)
    for step, batch in batches:
        yield step, {**batch, "states": fill(batch["states"])}
