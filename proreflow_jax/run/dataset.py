"""The block `data` of a config as a job reads it: copied from an object store, written by the demo, of this base model."""

import hashlib
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import kinds, records
from proreflow_jax.data.loader import Source
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.runtime.checkpoint import digest, fold
from proreflow_jax.runtime.processes import first
from proreflow_jax.storage import paths

DATA = "--config.data.path"
PROBES = ("", "a", "Dogs", "ö 12")  # prompts by which tokenizers are told apart; few tokens each


def open_source(config: ConfigDict, base: Pipeline) -> Source:
    """The captions, and images or their latents, of the config, as random access.

    Raises ValueError or FileNotFoundError, one line, for bad data, and for a cache that another base model made.
    """
    data = here(config.data)
    if kinds.is_demo(data):  # it writes them
        first(partial(kinds.open_data, data))
    source = kinds.open_data(data)
    if kinds.has_latents(data):
        check_cache(records.read_plan(data.path), base, data.path)
    return source


def here(data: ConfigDict) -> ConfigDict:
    """The block `data` with a path of this machine: what lies on an object store as one file or folder is copied."""
    if "://" not in data.path or data.kind in kinds.SHARDED:  # which no copy is made of, and `sources` says so
        return data
    location = paths.parse_path(data.path, DATA)
    local = data.copy_and_resolve_references().unlock()
    local.path = str(paths.parse_local(data.path, DATA) if kinds.is_demo(data) else paths.local_copy(location, DATA))
    return local


def encodes(config: ConfigDict) -> bool:
    """Whether pairs are made from images, which the autoencoder has to encode."""
    return config.pairs.start == "data" and not kinds.has_latents(config.data)


def made_by(base: Pipeline, text: bool) -> dict[str, Any]:
    """What a cache of this model depends on: shape of latents, autoencoder; with `text` also tokenizer and text encoders."""
    facts = {"latent": list(base.latent_shape), "vae": fold(digest(base.params["vae"]))}
    if text:
        ids = base.tokenizer.encode(PROBES)
        facts |= {"tokenizer": hashlib.sha256(ids.tobytes()).hexdigest(), "text": fold(digest(base.text))}
    return facts


def check_cache(plan: dict[str, Any], base: Pipeline, path: str) -> None:
    """Raises ValueError, one line, if a cache (by its plan) is not what this base model would make."""
    words = {"latent": "the latents' shape", "vae": "the autoencoder", "tokenizer": "the tokenizer", "text": "a text encoder"}
    held = plan.get("model", {})
    for name, value in made_by(base, "text" in held).items():
        if held.get(name) != value:
            raise UserError(
                f"{path} was cached with another base model, {words[name]} differs: make the cache anew with this "
                f"--config.model.path, or name another {DATA}"
            )
