"""Make one stage's pairs: the teacher crosses every window and the states at the bounds are written as records.

Run the same command again to resume; at most one shard is made twice.
"""

import logging
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from proreflow_jax import cli
from proreflow_jax.data import loader, records
from proreflow_jax.experiment import (
    Experiment,
    check_ready,
    frozen_arrays,
    load_weights,
    open_experiment,
    open_source,
    pair_recipe,
    parent_stage,
    stage_plan,
    teacher_flow,
)
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.stages import Stage, find_stage
from proreflow_jax.reflow.teacher import Flow
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.processes import first, host_arrays, leads, lock, told

log = logging.getLogger(__name__)
PLANNED = ("pairs", "student", "data", "model", "conditioning")


def make_pairs(config: ConfigDict, stage: int) -> None:
    """The verb: all records of one stage, published when the last one is there."""
    experiment = open_experiment(config)
    chosen = find_stage(experiment.stages, stage)
    if config.pairs.mode != "stored":
        raise ValueError("--config.pairs.mode=online makes pairs inside the train step: there is nothing to store")
    check_ready(experiment, chosen)
    with lock(chosen.folder):
        run_stage(experiment, chosen)


def run_stage(experiment: Experiment, stage: Stage) -> None:
    """Makes what is missing of a stage's pairs. The caller holds the stage's lock."""
    config, folder = experiment.config, stage.folder / "pairs"
    by_base = teacher_flow(experiment, stage).windows == 0
    teacher = load_weights(experiment, None if by_base else parent_stage(experiment, stage))
    plan = stage_plan(experiment, stage, teacher.digest, PLANNED)
    missing = _begin(folder, plan)
    if not missing:
        first(lambda: records.publish(folder, plan))
        log.info("stage %d: %d pair records are there", stage.windows, config.pairs.examples)
        return

    recipe = pair_recipe(experiment, stage)
    maker = "base model" if by_base else f"{teacher.flow.windows}-window student"
    count = config.pairs.examples
    log.info("stage %d: %d pair records by the %s, %d steps a window", stage.windows, count, maker, recipe.steps)
    source = open_source(experiment)
    frozen = frozen_arrays(experiment, teacher.params, stage, with_vae=recipe.start == "data")
    jitted = jit_pairs(experiment, stage, teacher.flow)
    with tqdm(total=len(missing) * config.pairs.shard_size, unit="pair", disable=None, desc="pairs") as bar:
        for shard in missing:
            rows = _rows(experiment, source, jitted, frozen, records.shard_range(plan, shard), bar)
            if leads():
                records.write_shard(folder, plan, shard, rows)
            else:  # the rows are made together, and written once
                deque(rows, maxlen=0)
    first(lambda: _publish(folder, plan))


def _begin(folder: Path, plan: dict[str, Any]) -> list[int]:
    """The shards that are missing, as process 0 sees them; its plan is fixed before the others go on."""

    def look() -> list[int]:
        records.fix_plan(folder, plan)
        records.clean(folder)
        return records.missing_shards(folder, plan)

    seen, lacks = first(look), np.zeros(records.shard_count(plan), bool)
    lacks[seen or []] = True
    return [int(shard) for shard in np.flatnonzero(told(lacks))]


def _publish(folder: Path, plan: dict[str, Any]) -> None:
    if not records.publish(folder, plan):
        raise RuntimeError(f"{folder}: shards are missing after the last one was made; run the same command again")


def jit_pairs(experiment: Experiment, stage: Stage, flow: Flow) -> Any:
    """(frozen, batch) -> the batch's pairs, jitted with the shardings of the mesh; `flow` is how the teacher is read."""
    made = partial(pairs.make_pairs, recipe=pair_recipe(experiment, stage), flow=flow, networks=experiment.networks)
    whole, batches = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    return jax.jit(made, in_shardings=(None, batches), out_shardings=whole)


def _rows(
    experiment: Experiment, source: loader.Source, jitted: Any, frozen: pairs.Frozen, ids: range, bar: tqdm
) -> Iterator[dict[str, np.ndarray]]:
    """The records of one shard in order. Every batch has one shape; the last is filled up and cut."""
    config, size = experiment.config, experiment.config.pairs.batch
    own = mesh.own_rows(experiment.mesh, size)
    begins = range(ids.start, ids.stop, size)
    read = lambda begin: read_rows(experiment, source, begin + own)
    with loader.Ahead(read, begins, depth=2) as inputs:
        for begin, rows in zip(begins, inputs, strict=True):
            made = host_arrays(jitted(frozen, mesh.put_batch(experiment.mesh, rows, size)))
            made["states"] = made["states"].astype(jnp.dtype(config.pairs.storage))
            count = min(size, ids.stop - begin)
            bar.update(count)
            for i in range(count):
                yield {name: values[i] for name, values in made.items()}


def read_rows(experiment: Experiment, source: loader.Source, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of examples by their number: number p reads item p of the source's shuffled epochs.

    Returns index (b,), ids (b, s), and image (b, h, w, 3) uint8 if pairs start from data.
    """
    config = experiment.config
    items = loader.read(source, loader.places(numbers, config.seed, len(source)))
    rows = {"index": numbers.astype(np.int32), "ids": experiment.base.tokenizer.encode([item["caption"] for item in items])}
    if config.pairs.start == "data":
        rows["image"] = np.stack([item["image"] for item in items])
    return rows


if __name__ == "__main__":
    cli.start(make_pairs, __doc__, "configs/digits.py", {"stage": (8, "windows of the stage whose pairs are made")}, pod=True)
