"""Encodes a dataset once: its images as latents, its captions as text states if wished; of prompts their text states alone."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import cached, kinds, loader, records
from proreflow_jax.jobs.write_records import Maker, begin_records, publish_records, records_there, write_records
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import weights
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.pairs import text_context
from proreflow_jax.run import dataset
from proreflow_jax.run.check_config import check_data_resolution
from proreflow_jax.run.dataset import made_by, open_source
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_experiment
from proreflow_jax.run.outlook import compiling
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.processes import first, job_lock
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.runtime.stopping import watching
from proreflow_jax.storage import paths
from proreflow_jax.storage.gcs import LOCK

log = logging.getLogger(__name__)
OUT = "--out"


def cache(config: ConfigDict, out: str) -> None:
    """The records of all examples in the folder `out`, published when the last one is there."""
    folder = _folder(config, out)
    experiment = open_experiment(config)
    check_cacheable(experiment)
    source = open_source(config, experiment.base)
    plan = cache_plan(experiment, len(source))
    records.shard_count(plan)
    with job_lock(folder), watching(config.watchdog):
        missing = begin_records(folder, plan, OUT)
        if missing:
            log.info("%d of %d shards are to be made", len(missing), records.shard_count(plan))
            compiling("the encoder", experiment.networks.vae)
            with Progress("cache", plan["examples"], "image", records_there(plan, missing)) as progress:
                read = partial(_read, experiment, source)
                recorded = partial(_records, config.cache.storage)
                maker = Maker(experiment.mesh, config.cache.batch, read, make_encode(experiment), recorded)
                write_records(folder, plan, missing, maker, progress)
        else:
            first(lambda: publish_records(folder, plan))
    log.info("%d examples: --config.data.kind=%s --config.data.path=%s", len(source), kinds.CACHED, folder)


def _folder(config: ConfigDict, out: str) -> paths.Location:
    """Where the cache goes. Raises ValueError, one line, for none, and for a folder that holds something else."""
    if not out:
        raise UserError(f"{OUT} is empty: name the folder of the cache")
    captions = kinds.has_captions_alone(config.data)
    if not kinds.has_images(config.data) and not (captions and config.cache.text):
        more = ", or cache the prompts' text states by --config.cache.text=True" if captions else ""
        raise UserError(f"--config.data.kind={config.data.kind} has no images to cache: name a dataset with images{more}")
    folder = paths.parse_path(out, OUT)
    paths.check_reachable(folder)
    first(partial(_check_free, folder))
    return folder


def _check_free(folder: paths.Location) -> None:
    if folder.exists() and not (folder / records.PLAN).exists():
        if not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(f"{OUT}={folder} holds other files: name a new folder")


def check_cacheable(experiment: Experiment) -> None:
    """Raises ValueError, one line, for what cannot be encoded by this model on this mesh."""
    if kinds.has_images(experiment.config.data):
        check_data_resolution(experiment.config, experiment.base.resolution)
    mesh.check_split(experiment.config.cache.batch, "--config.cache.batch", experiment.mesh)


def cache_plan(experiment: Experiment, examples: int) -> dict[str, Any]:
    """What may not change while a cache is under way, and what its readers compare: the data, the model, the records."""
    c = experiment.config
    data = {f"data.{name}": value for name, value in c.data.items() if f"data.{name}" not in dataset.FREE}
    model = made_by(experiment.base, c.cache.text, kinds.has_images(c.data))
    settings = {"cache.storage": c.cache.storage, "cache.text": c.cache.text, "model": model}
    shards = {"records": cached.NAME, "examples": examples, "shard_size": c.cache.shard_size}
    return shards | settings | data | dataset.identity(c)


def make_encode(experiment: Experiment) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """batch -> what is kept of it: one compiled function, its weights on every device.

    batch: image (b, h, w, 3) uint8 unless data are prompts, ids (b, s), caption (b, n) uint8, which passes by.
    """
    networks, base, c = experiment.networks, experiment.base, experiment.config.cache

    def encode(vae: Params, text: dict[str, Params], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        posterior = pairs.posterior(networks, vae, batch["image"]) if "image" in batch else ()
        arrays = dict(zip(kinds.LATENTS, posterior, strict=bool(posterior)))
        if c.text:
            states = text_context(networks.condition, text, batch["ids"])
            arrays |= {name: value for name, value in zip(kinds.TEXTS, states, strict=False) if value is not None}
        stored = {name: value.astype(jnp.dtype(c.storage)) for name, value in arrays.items()}
        return stored | {"caption": batch["caption"]}

    whole, batches = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    jitted = jax.jit(encode, in_shardings=(None, None, batches), out_shardings=whole)
    put = partial(jax.device_put, device=whole)
    return partial(jitted, put(base.params["vae"]), put(base.text) if c.text else {})


def _read(experiment: Experiment, source: loader.Source, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Examples by their numbers, as `make_encode` takes them; numbers behind the last begin anew."""
    items = loader.read_items(source, [int(row) % len(source) for row in rows])
    captions = [item["caption"] for item in items]
    images = {"image": np.stack([item["image"] for item in items])} if "image" in items[0] else {}
    return {**images, "ids": experiment.base.tokenizer.encode(captions), "caption": cached.padded(captions)}


def _records(storage: str, numbers: range, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The records of some examples, in order. Raises FloatingPointError for one that its dtype `storage` does not hold."""
    for i, number in enumerate(numbers):
        row = {name: values[i] for name, values in batch.items()}
        if bad := [name for name in row if not weights.finite(row[name])]:
            raise FloatingPointError(f"example {number}: {bad[0]} is no finite {storage}: take --config.cache.storage=float32")
        yield cached.record(number, row)
