"""The block `data` of a config as a job reads it: copied from an object store, written by the job, of this base model."""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import kinds, records
from proreflow_jax.data.loader import Source, epoch_places, read_items
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.pretrained.tokenizer import PromptTokenizer
from proreflow_jax.runtime.checkpoint import digest, fold
from proreflow_jax.runtime.processes import first
from proreflow_jax.storage import paths

DATA = "--config.data.path"
FREE = kinds.UNCOUNTED  # fields of the block `data` that a resumed stage may change
PROBES = ("", "a", "Dogs", "ö 12")  # prompts by which tokenizers are told apart; few tokens each


def open_source(config: ConfigDict, base: Pipeline) -> Source:
    """The captions, and images or their latents, of the config, as random access.

    Raises UserError, one line, for bad data, and for a cache that another base model made.
    """
    data = _here(config.data)
    if kinds.is_digits(data):  # process 0 writes them
        first(partial(kinds.open_data, data))
    source = kinds.open_data(data)
    if kinds.has_latents(data):
        check_cache(records.read_plan(data.path), base, data.path)
        if config.pairs.start == "data" and kinds.LATENTS[0] not in cached_fields(config):
            raise UserError(f"{data.path} is a cache of text without latents: take --config.pairs.start=noise, or cache images")
    return source


def cached_fields(config: ConfigDict) -> tuple[str, ...]:
    """What examples of a cache hold beside their caption, of kinds.LATENTS and kinds.TEXTS; () of data that are no cache."""
    if not kinds.has_latents(config.data):
        return ()
    plan = records.read_plan(_here(config.data).path)
    return (kinds.LATENTS if "latent" in plan.get("model", {}) else ()) + (kinds.TEXTS if plan.get("cache.text") else ())


def check_source(config: ConfigDict, base: Pipeline) -> None:
    """Raises as `open_source`, and writes nothing: the digits are written by the job itself."""
    if kinds.is_digits(config.data):
        paths.parse_local(config.data.path, DATA)
    else:
        open_source(config, base)


def identity(config: ConfigDict) -> dict[str, Any]:
    """What a stage's plan says of the data, beside the block `data`: hashes of what the pairs depend on."""
    return kinds.data_identity(_here(config.data))


def _here(data: ConfigDict) -> ConfigDict:
    """The block `data` with a path of this machine: a file or folder of an object store is copied."""
    if "://" not in data.path or data.kind in kinds.SHARDED:  # no copy is made of shards, and `kinds` says so
        return data
    location = paths.parse_path(data.path, DATA)
    local = data.copy_and_resolve_references().unlock()
    local.path = str(paths.parse_local(data.path, DATA) if kinds.is_digits(data) else paths.local_copy(location, DATA))
    return local


def encodes(config: ConfigDict) -> bool:
    """Whether pairs are made from images, which the autoencoder has to encode."""
    return config.pairs.start == "data" and not kinds.has_latents(config.data)


def read_rows(config: ConfigDict, tokenizer: PromptTokenizer, source: Source, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of examples by their number: number p reads item p of the source's shuffled epochs.

    Returns index (b,), ids (b, s); if pairs start from data image (b, h, w, 3) uint8, or of a cache mean and std (b, h, w, c);
    and the text states that a cache holds, text (b, s, d) and pooled (b, p).
    """
    items = read_items(source, epoch_places(numbers, config.seed, len(source)))
    rows = {"index": numbers.astype(np.int32), "ids": tokenizer.encode([item["caption"] for item in items])}
    fields = kinds.TEXTS + (("image", *kinds.LATENTS) if config.pairs.start == "data" else ())
    return rows | {name: np.stack([item[name] for item in items]) for name in fields if name in items[0]}


def read_captions(config: ConfigDict, source: Source, numbers: Iterable[int]) -> list[str]:
    """The captions of examples by their number, as `read_rows` reads them."""
    return [item["caption"] for item in read_items(source, epoch_places(numbers, config.seed, len(source)))]


def made_by(base: Pipeline, text: bool, latents: bool = True) -> dict[str, Any]:
    """What a cache of this model depends on: shape of latents and autoencoder; tokenizer and text encoders."""
    facts = {"latent": list(base.latent_shape), "vae": fold(digest(base.params["vae"]))} if latents else {}
    if text:
        ids = base.tokenizer.encode(PROBES)
        facts |= {"tokenizer": hashlib.sha256(ids.tobytes()).hexdigest(), "text": fold(digest(base.text))}
    return facts


def check_cache(plan: dict[str, Any], base: Pipeline, path: str) -> None:
    """Raises ValueError, one line, if a cache (by its plan) is not what this base model would make."""
    words = {"latent": "the latents' shape", "vae": "the autoencoder", "tokenizer": "the tokenizer", "text": "a text encoder"}
    recorded = plan.get("model", {})
    for name, value in made_by(base, "text" in recorded, "latent" in recorded or "text" not in recorded).items():
        if recorded.get(name) != value:
            raise UserError(
                f"{path} was cached with another base model, {words[name]} differs: make the cache anew with this block "
                f"--config.model (path, vae, clip_skip), or name another {DATA}"
            )
