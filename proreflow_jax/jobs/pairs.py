"""Makes the pairs of a stage: the teacher crosses every window, shard by shard."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax.data import kinds, loader, records
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs.write_records import batched, begin_records, write_records
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.run.dataset import encodes
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.lineage import load_weights, stage_plan
from proreflow_jax.run.open import open_source
from proreflow_jax.run.recipes import pair_recipe, parent_stage, teacher_flow
from proreflow_jax.run.train_state import frozen_arrays
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.processes import first

log = logging.getLogger(__name__)
PLANNED = ("pairs", "student", "data", "model", "conditioning")


def make_stage_pairs(experiment: Experiment, stage: Stage) -> None:
    """Makes what is missing of a stage's pairs. The caller holds the stage's lock."""
    config, folder = experiment.config, stage.folder / "pairs"
    by_base = teacher_flow(experiment, stage).windows == 0
    teacher = load_weights(experiment, None if by_base else parent_stage(experiment, stage))
    plan = stage_plan(experiment, stage, teacher.digest, PLANNED)
    missing = begin_records(folder, plan)
    if not missing:
        first(lambda: records.publish(folder, plan))
        log.info("stage %d: %d pair records are there", stage.windows, config.pairs.examples)
        return

    recipe = pair_recipe(experiment, stage)
    maker = "base model" if by_base else f"{teacher.flow.windows}-window student"
    count = config.pairs.examples
    log.info("stage %d: %d pair records by the %s, %d steps a window", stage.windows, count, maker, recipe.steps)
    source = open_source(experiment)
    frozen = frozen_arrays(experiment, teacher.params, stage, with_vae=encodes(config))
    rows = partial(_rows, experiment, source, jit_pairs(experiment, stage, teacher.flow), frozen)
    write_records(folder, plan, missing, rows, unit="pair")


def jit_pairs(experiment: Experiment, stage: Stage, flow: Parameterization) -> Any:
    """(frozen, batch) -> the batch's pairs, jitted with the shardings of the mesh; `flow` is how the teacher is read."""
    recipe, networks = pair_recipe(experiment, stage), experiment.networks

    def made(frozen: pairs.Frozen, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = pairs.cross_windows(frozen, batch, recipe=recipe, flow=flow, networks=networks)
        return {name: found[name] for name in pairs.RECORD}

    whole, batches = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    return jax.jit(made, in_shardings=(None, batches), out_shardings=whole)


def _rows(
    experiment: Experiment, source: loader.Source, jitted: Any, frozen: pairs.Frozen, numbers: range
) -> Iterator[dict[str, np.ndarray]]:
    """The records of some examples, in order."""
    config, read = experiment.config, partial(read_rows, experiment, source)
    for made, count in batched(experiment.mesh, config.pairs.batch, read, partial(jitted, frozen), numbers):
        made["states"] = made["states"].astype(jnp.dtype(config.pairs.storage))
        for i in range(count):
            yield {name: values[i] for name, values in made.items()}


def read_rows(experiment: Experiment, source: loader.Source, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of examples by their number: number p reads item p of the source's shuffled epochs.

    Returns index (b,), ids (b, s); if pairs start from data image (b, h, w, 3) uint8, or of a cache mean and std (b, h, w, c);
    and the text states that a cache holds, text (b, s, d) and pooled (b, p).
    """
    config = experiment.config
    items = loader.read_items(source, loader.epoch_places(numbers, config.seed, len(source)))
    rows = {"index": numbers.astype(np.int32), "ids": experiment.base.tokenizer.encode([item["caption"] for item in items])}
    wanted = kinds.TEXTS + (("image", *kinds.LATENTS) if config.pairs.start == "data" else ())
    return rows | {name: np.stack([item[name] for item in items]) for name in wanted if name in items[0]}
