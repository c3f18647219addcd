"""Makes the pairs of a stage: the teacher crosses every window, shard by shard."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proreflow_jax.data import loader, records
from proreflow_jax.jobs.write_records import batched, begin_records, records_there, write_records
from proreflow_jax.pretrained import weights
from proreflow_jax.reflow import pairs
from proreflow_jax.run.dataset import encodes, open_source, read_captions, read_rows
from proreflow_jax.run.experiment import PLANNED, Experiment, frozen_arrays, handed_on, load_weights, stage_plan
from proreflow_jax.run.outlook import PAIRS, Outlook, compiling
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.runtime.processes import first
from proreflow_jax.runtime.progress import Progress

log = logging.getLogger(__name__)


def make_stage_pairs(experiment: Experiment, stage: Stage, outlook: Outlook) -> None:
    """Makes what is missing of a stage's pairs. The caller holds the stage's lock; `outlook` counts the pairs."""
    config, folder = experiment.config, stage.folder / "pairs"
    plan = stage_plan(experiment, stage, handed_on(experiment, stage.maker), PLANNED)
    missing = begin_records(folder, plan)
    if not missing:
        first(lambda: records.publish(folder, plan))
        log.info("stage %d: %d pair records are there", stage.windows, config.pairs.examples)
        outlook.finished(PAIRS, stage.windows)
        return

    teacher = load_weights(experiment, stage.maker)
    maker = f"{teacher.flow.windows}-window student" if stage.maker else "base model"
    count, steps = config.pairs.examples, stage.pairs.steps
    log.info("stage %d: %d pair records by the %s, %d steps a window", stage.windows, count, maker, steps)
    source = open_source(config, experiment.base)
    frozen = frozen_arrays(experiment, stage, teacher.params, with_vae=encodes(config))
    if stage.maker:
        experiment.denoiser.free()  # `frozen` holds what is needed
    jitted = jit_pairs(stage._replace(teacher=teacher.flow), experiment.networks, experiment.mesh)
    with outlook.part(PAIRS, stage.windows, records_there(plan, missing)) as progress:
        compiling("the teacher's steps", experiment.networks.denoiser)
        rows = partial(_rows, experiment, source, partial(jitted, frozen), progress=progress)
        write_records(folder, plan, missing, rows, outlook.keep)


def jit_pairs(stage: Stage, networks: pairs.Networks, machine: Mesh) -> Any:
    """(frozen, batch) -> the batch's pairs, jitted with the shardings of the mesh."""

    def make(frozen: pairs.Frozen, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = pairs.cross_windows(frozen, batch, recipe=stage.pairs, flow=stage.teacher, networks=networks)
        return {name: rows[name] for name in pairs.RECORD}

    whole, batches = mesh.replicated(machine), mesh.batch_sharding(machine)
    return jax.jit(make, in_shardings=(None, batches), out_shardings=whole)


def _rows(
    experiment: Experiment, source: loader.Source, compute: Any, numbers: range, progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """The records of some examples, in order. Raises FloatingPointError for one whose states are no finite numbers."""
    config, index = experiment.config, iter(numbers)
    read = partial(read_rows, config, experiment.base.tokenizer, source)
    for batch, count in batched(experiment.mesh, config.pairs.batch, read, compute, numbers, progress):
        with np.errstate(over="ignore"):
            stored = batch["states"].astype(jnp.dtype(config.pairs.storage))
        for i in range(count):
            number = next(index)
            if not weights.finite(stored[i]):
                field = "pairs.storage" if np.isfinite(batch["states"][i]).all() else "model.teacher_dtype"
                mend = f"take --config.{field}=float32, or another --config.model.path"
                check_finite_rows([False], read_captions(config, source, [number]), f"{mend} (example {number})")
            yield {name: values[i] for name, values in (batch | {"states": stored}).items()}
