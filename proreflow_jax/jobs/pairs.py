"""Makes the pairs of a stage: the teacher crosses every window, shard by shard."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.data import loader, records
from proreflow_jax.jobs.write_records import Maker, begin_records, records_there, write_records
from proreflow_jax.reflow import pairs
from proreflow_jax.run.compiler_options import compiler_options
from proreflow_jax.run.dataset import encodes, open_source, read_captions, read_rows
from proreflow_jax.run.experiment import PLANNED, Experiment, frozen_arrays, handed_on, load_weights, stage_plan
from proreflow_jax.run.outlook import PAIRS, Outlook, compiling
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.runtime.processes import first

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
    made_by = stage._replace(teacher=teacher.flow)
    jitted = jit_pairs(made_by, experiment.networks, experiment.mesh, config)
    with outlook.part(PAIRS, stage.windows, records_there(plan, missing)) as progress:
        compiling("the teacher's steps", experiment.networks.denoiser)
        read = partial(read_rows, config, experiment.base.tokenizer, source)
        recorded = partial(_records, config, source)
        maker = Maker(experiment.mesh, config.pairs.batch, read, partial(jitted, frozen), recorded)
        write_records(folder, plan, missing, maker, progress, outlook.keep)


def jit_pairs(stage: Stage, networks: pairs.Networks, machine: Mesh, config: ConfigDict) -> Any:
    """(frozen, batch) -> what is fetched of the batch's pairs, jitted with the shardings of the mesh.

    It is `pairs.RECORD` with states in the dtype --config.pairs.storage, as the host would round them, and of each row whether
    its states are finite numbers: `finite` as computed, `fits` as stored. The arrays are whole on every device.
    """
    whole, batches, storage = mesh.replicated(machine), mesh.batch_sharding(machine), config.pairs.storage
    options = compiler_options(networks.denoiser, machine, config)

    def make(frozen: pairs.Frozen, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = pairs.cross_windows(frozen, batch, recipe=stage.pairs, flow=stage.teacher, networks=networks)
        states = jax.lax.optimization_barrier(rows["states"])  # so that the rounding changes nothing before it
        stored = jax.lax.with_sharding_constraint(states.astype(storage), batches)  # rounded before it is gathered
        finite = lambda values: jnp.isfinite(values).all(axis=(1, 2, 3, 4))
        kept = {name: rows[name] for name in pairs.RECORD} | {"states": stored}
        return kept | {"finite": finite(states), "fits": finite(stored)}

    return jax.jit(make, in_shardings=(None, batches), out_shardings=whole, compiler_options=options)


def _records(
    config: ConfigDict, source: loader.Source, numbers: range, batch: dict[str, np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """The records of some examples, in order. Raises FloatingPointError for one whose states are no finite numbers."""
    for i, number in enumerate(numbers):
        if not batch["fits"][i]:
            field = "pairs.storage" if batch["finite"][i] else "model.teacher_dtype"
            mend = f"take --config.{field}=float32, or another --config.model.path"
            check_finite_rows([False], read_captions(config, source, [number]), f"{mend} (example {number})")
        yield {name: batch[name][i] for name in pairs.RECORD}
