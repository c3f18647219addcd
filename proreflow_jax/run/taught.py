"""What a stage's plan.json says of its student, compared with a config and a base model by whoever reads the weights.

Compared is what the student is and was taught. Free is the amount of work and its form (how many pairs, in which batches,
kept or made in the step), and whatever says how to draw or to measure. Where the data lie is free too: a run may move. A
field that an older plan lacks says nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.run.check_config import flags
from proreflow_jax.storage.paths import Location

TAUGHT = ("conditioning", "student", "pairs")  # blocks of the config; `base.*` says all of the block `model`
WORK = ("pairs.mode", "pairs.examples", "pairs.shard_size", "pairs.batch", "pairs.storage")  # fields of them that are free
LORA = "student.lora"
BASE = "base."  # in front of a part of the base model
PARTS = {
    **{"unet": "UNet's config.json", "transformer": "transformer's config.json", "vae": "VAE", "text_encoder": "text encoder"},
    **{"text_encoder_2": "second text encoder", "text_encoder_3": "third text encoder"},
}


def check_settings(place: Location, plan: Mapping[str, Any], settings: Mapping[str, Any], stated: Collection[str] = ()) -> None:
    """Raises UserError, one line, if a student was trained with another value of a field that counts.

    Args:
      place: where the plan lies.
      settings: {field: value} of the config, as a plan has them.
      stated: further fields that count.
    """
    for name, value in settings.items():
        counts = name in stated or (name.partition(".")[0] in TAUGHT and name not in WORK)
        if not counts or name not in plan:
            continue
        if difference := _difference(name, plan[name], value):
            field, old, new = difference
            flag = flags({field: tuple(old) if isinstance(old, list) else old})
            raise UserError(
                f"{place}: this student was trained with {field} = {old}, the config says {new}: take {flag}, or name another "
                "run by --config.name"
            )


def check_base(place: Location, plan: Mapping[str, Any], identity: Mapping[str, str], config: ConfigDict) -> None:
    """Raises UserError, one line, if a part of the opened base model is not what the student's own had. identity: its parts."""
    parts = [name.removeprefix(BASE) for name, value in identity.items() if name in plan and plan[name] != value]
    if parts:
        words = ", ".join(PARTS.get(part, part) for part in parts)
        raise UserError(
            f"{place}: this student was taught by a base model with another {words} than --config.model.path="
            f"{config.model.path}: name its own by --config.model.path, with its vae, clip_skip and prediction_type"
        )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """(field, value in the plan, value in the config) of the first difference; None if there is none."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return None if old == new else (name, old, new)
    alone = name == LORA and not (old.get("rank") or new.get("rank"))  # all weights are trained: its other fields say nothing
    fields = ["rank"] if alone else [field for field in old if field in new]
    parts = (_difference(f"{name}.{field}", old.get(field), new.get(field)) for field in fields)
    return next((part for part in parts if part), None)
