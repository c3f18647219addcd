"""What a base model is beside its denoiser's weights: a hash of each part, by what the parts are and not by where they lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proreflow_jax.flow.stock import FLOW_MATCH, model_shift
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.pretrained.sources import TEXT_ENCODERS
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import atomic

SCHEDULE = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
FILES = (  # of a tokenizer
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
)  # fmt: skip
PROVENANCE = ("architectures", "dtype", "torch_dtype", "transformers_version")  # of a config.json: they change no result


def base_identity(base: Pipeline) -> dict[str, str]:
    """{"base.<part>": hash}, by what the parts are and not by where they lie."""
    parts = {name: atomic.json_digest(_described(network.config)) for name, network in base.networks.items()}
    for name in ("vae", *base.text):
        parts[name] = atomic.json_digest([parts[name], fold(digest(base.params[name]))])
    parts["schedule"] = atomic.json_digest(_schedule(base.scheduler))
    parts["tokenizer"] = atomic.json_digest([_files(base.source.folder / name) for name in _tokenizers(base)])
    parts["index"] = atomic.json_digest(base.source.index.get("force_zeros_for_empty_prompt", False))
    return {f"base.{name}": value for name, value in parts.items()}


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's config decides the noise levels: of a rectified flow its shift alone."""
    if config.get("_class_name") == FLOW_MATCH:
        return {"shift": model_shift(config)}
    return {name: config.get(name) for name in SCHEDULE}


def _tokenizers(base: Pipeline) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in base.networks if name in TEXT_ENCODERS]


def _files(folder: Path) -> dict[str, str]:
    """{name: hash} of a tokenizer's files."""
    return {name: atomic.sha256(folder / name) for name in FILES if (folder / name).is_file()}


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what says whence it comes."""
    return {name: value for name, value in config.items() if name[:1] != "_" and name not in PROVENANCE}
