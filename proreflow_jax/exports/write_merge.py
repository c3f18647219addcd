"""A student's delta onto another fine-tune of the same base, as a diffusers folder that says it is a merge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.exports.card import write_card
from proreflow_jax.exports.card_base import describe_base
from proreflow_jax.exports.formats import FILES, is_flow
from proreflow_jax.exports.write import check_copies, holds, write_folder
from proreflow_jax.flow.schedule import from_config, same_levels
from proreflow_jax.models.network import make_vae
from proreflow_jax.pretrained import lora_file, sources, weights
from proreflow_jax.pretrained.pipeline import make_denoiser, scheduler_config
from proreflow_jax.run import find_model
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import atomic, sealed
from proreflow_jax.storage.paths import Location


def write_merge(config: ConfigDict, delta: Path, target: Location, scale: float, overwrite: bool = False) -> str:
    """Writes the folder and returns a line about it; one that already holds this very merge is left as it is, or mended.

    Raises UserError, one line, if delta and model do not fit, or if the folder holds another export.
    """
    record = sealed.read_record(delta)
    sealed.check_undamaged(delta, record, "export the delta again, or copy it again")
    card = {name: value for name, value in record.items() if name not in (sealed.FILES, sealed.SEAL)}
    scheduler = atomic.read_json(delta / "scheduler" / "scheduler_config.json")
    base = find_model.find_base_model(config)
    taught = card.get("clip_skip", {}).get("diffusers", 0)
    if config.model.clip_skip != taught:
        raise UserError(f"{delta} is of a student taught with clip_skip={taught}: take {sources.CLIP_SKIP}={taught}")
    _check_same_diffusion(base, scheduler_config(base, config.model.prediction_type), scheduler, delta)
    check_copies(base)
    tensors = base.tensors(base.denoiser_name)
    merged = lora_file.merge_delta(tensors, weights.Tensors([delta / FILES["delta"]]), scale)
    onto, summed = (_digest(base, values) for values in (tensors, merged))
    name, dtype = find_model.title(config, base), str(next(iter(merged.values())).dtype)
    lineage = {name: value for name, value in card["lineage"].items() if name != "vae"}  # the delta's, which stays behind
    if base.vae:
        shapes = make_vae(base.config("vae")).shapes
        lineage["vae"] = fold(digest(weights.from_torch(base.tensors("vae"), shapes, str(base.vae.origin))))
    before = card.pop("about", {})
    card.pop("numbers", None)  # of the delta's own base
    card |= {
        "base": name,
        "about": _about(describe_base(config, base), before),
        "digest": summed,
        "format": {**card["format"], "form": "diffusers", "dtype": dtype},
        "lineage": lineage | {"onto": onto, "merged": summed},
        "merged": {"delta": card["digest"], "base": card["base"], "scale": scale},
    }
    if not overwrite and holds(target, card):
        return f"{target}: is there"
    with atomic.atomic_folder(target, overwrite=True) as draft:  # an export, or nothing: `check_out`
        write_folder(draft, base, merged, scheduler)
        write_card(draft, card)
    return f"{target}: {base.origin} + {scale:g} x the {card['windows']}-window delta of {delta}"


def _about(base: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of a merge says of both models. The licence only where it is one; pictures were drawn by neither."""
    licence = base["licence"] if base["licence"] == before.get("licence") else {}
    other = before.get("base_model", "")
    about = base | {"licence": licence, "delta_base_model": other if other != base["base_model"] else ""}
    return about | {name: before[name] for name in ("prompt", "credits") if name in before}


def _digest(base: sources.ModelSource, tensors: Mapping[str, np.ndarray]) -> str:
    """The digest of a denoiser's weights as a run takes it. Raises UserError, one line, for numbers that are not finite."""
    return fold(digest(weights.from_torch(tensors, make_denoiser(base).shapes, f"{base.origin}, merged")))


def _check_same_diffusion(base: sources.ModelSource, ours: Mapping[str, Any], theirs: Mapping[str, Any], delta: Path) -> None:
    """Raises UserError, one line, unless model and delta predict the same on the same schedule, and the model is no student."""
    flag = f"{sources.PATH}={base.origin}"
    if base.student:
        raise UserError(
            f"{flag} is a student of {base.student['windows']} windows already: name a fine-tune of the delta's base"
        )
    kinds = [config.get("prediction_type", "epsilon") for config in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{flag} predicts {kinds[0]}, the delta {delta} is of a model that predicts {kinds[1]}: they do not add up"
        )
    if not same_levels(from_config(ours), from_config(theirs)):
        what = "(shift)" if is_flow(ours) and is_flow(theirs) else "(betas)"
        raise UserError(f"{flag} has another noise schedule {what} than the model of the delta {delta}: they do not add up")
