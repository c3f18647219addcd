"""Rows a second of a job's input on this machine, including decoding, tokenizing and the transfer to the devices.

The input is read by the job's own iterators while nothing else is computed. Pair records that do not exist yet are replaced by
random ones of the same format and size, in a temporary folder.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from proreflow_jax.data import loader, records
from proreflow_jax.jobs import train
from proreflow_jax.perf import jobs
from proreflow_jax.pretrained import tokenizer
from proreflow_jax.pretrained.sources import TEXT_ENCODERS
from proreflow_jax.run.dataset import open_source, read_rows
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)
JOBS = ("pairs", "train")  # jobs with an input
LEAST = 20  # batches that are timed, at least: a few are read before the clock starts
RANDOM = 4  # batches of random records


def rate(experiment: Experiment, stage: Stage, job: str, steps: int) -> dict[str, Any]:
    """{"input", "rows", "rows_per_second"} of a job's input, timed over `steps` batches, at least 20.

    Raises FileNotFoundError or ValueError, one line, where the data or the tokenizer is not there.
    """
    steps = max(steps, LEAST)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stored = job == "train" and not stage.online
        source, what = _records(experiment, stage, Path(folder)) if stored else _captions(experiment)
        rows = experiment.config.train.batch if job == "train" else experiment.config.pairs.batch
        open_ = train.batches_from(experiment, stage, source, 0) if stored else _prompts(_tokenizing(experiment), source, rows)
        per_second = loader.rows_per_second(_arrived(stack.enter_context(open_)), steps, rows)
    return {"input": what, "rows": steps * rows, "rows_per_second": per_second}


def against(reads: Mapping[str, Any], needed: float) -> dict[str, Any]:
    """The same, with the images a second that the step or the user needs."""
    return {**reads, "wanted_per_second": needed, "ratio": reads["rows_per_second"] / needed}


def _arrived(batches: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    for _, batch in batches:
        yield jax.block_until_ready(batch)


@contextmanager
def _prompts(experiment: Experiment, source: loader.Source, b: int) -> Iterator[Iterator[tuple[int, Any]]]:
    """Numbered prompts (and images) on the mesh, as pairs are made of them."""
    own = mesh.own_rows(experiment.mesh, b)
    read = lambda step: read_rows(experiment.config, experiment.base.tokenizer, source, step * b + own)
    with loader.Ahead(read, count(), depth=2) as batches:
        yield ((step, mesh.put_batch(experiment.mesh, rows, b)) for step, rows in enumerate(batches))


def _captions(experiment: Experiment) -> tuple[loader.Source, str]:
    config, images = experiment.config, " and images" if experiment.config.pairs.start == "data" else ""
    return open_source(config, experiment.base), f"captions{images}, --config.data.kind={config.data.kind}"


def _tokenizing(experiment: Experiment) -> Experiment:
    """The experiment with its model's tokenizer, which an outline leaves closed; without one it warns, and ids are zeros."""
    base = experiment.base
    encoders = [name for name in base.networks if name in TEXT_ENCODERS]
    folders = [base.source.folder / name.replace("text_encoder", "tokenizer") for name in encoders]
    if not all(folder.is_dir() for folder in folders):
        log.warning("%s has no tokenizer: prompts are read, but not tokenized", base.source.folder)
        return experiment
    return experiment._replace(
        base=base._replace(
            tokenizer=tokenizer.load_tokenizer(*folders, encoders=[base.networks[name].config for name in encoders])
        )
    )


def _records(experiment: Experiment, stage: Stage, folder: Path) -> tuple[loader.Source, str]:
    """The stage's own pairs, or a few batches of such records, written into `folder`."""
    own = stage.folder / "pairs"
    if (own / records.MANIFEST).is_file():
        return records.PairRecords(paths.local_copy(own), verify=False), "the stage's pair records"
    b = experiment.config.train.batch
    plan, rows = {"examples": RANDOM * b, "shard_size": b}, jobs.record_shapes(experiment, stage)
    draws = np.random.default_rng(0)
    one = lambda: {name: _noise(draws, rows[name]) for name in rows}
    records.fix_plan(folder, plan)
    for shard in range(records.shard_count(plan)):
        records.write_shard(folder, plan, shard, (one() for _ in records.shard_range(plan, shard)))
    records.publish(folder, plan)
    return records.PairRecords(folder, verify=False), "random pair records of the same size"


def _noise(draws: np.random.Generator, rows: jax.ShapeDtypeStruct) -> np.ndarray:
    """One row."""
    shape = rows.shape[1:]
    return (draws.standard_normal(shape) if shape and len(shape) > 1 else np.zeros(shape)).astype(rows.dtype)
