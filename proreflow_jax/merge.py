"""Put a student's delta onto another fine-tune of the same base: --config.model.path + --delta -> a diffusers folder.

The delta is a folder that `export --form=delta` wrote. Nothing is trained; how well it serves depends on how far the
fine-tune has gone from the base, so look at its pictures.
"""

import logging

from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.exports.card import CARD, PAGE, card_page
from proreflow_jax.exports.formats import FILES
from proreflow_jax.exports.write import write_folder
from proreflow_jax.pretrained import lora_file, weights
from proreflow_jax.run import cli, open
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)


def merge(config: ConfigDict, delta: str, out: str, scale: float, overwrite: bool) -> None:
    """The verb. Raises ValueError or FileNotFoundError, one line, if the two are not of the same network."""
    if not delta or not out:
        raise UserError("--delta (a folder that export --form=delta wrote) and --out (the folder to write) must both be given")
    target, source = paths.parse_path(out, "--out"), paths.local_copy(paths.parse_path(delta, "--delta"), "--delta")
    if not (source / FILES["delta"]).is_file():
        raise MissingFile(f"--delta={delta} holds no {FILES['delta']}: write it by export --form=delta")
    base = open.find_base_model(config)
    card, scheduler = atomic.read_json(source / CARD), atomic.read_json(source / "scheduler" / "scheduler_config.json")
    merged = lora_file.merge_delta(base.tensors("unet"), weights.Tensors([source / FILES["delta"]]), scale)
    with atomic.atomic_folder(target, overwrite) as draft:
        write_folder(draft, base, merged, scheduler)
        dtype = str(next(iter(merged.values())).dtype)
        card |= {"base": open.title(config, base), "format": {**card["format"], "form": "diffusers", "dtype": dtype}}
        atomic.write_json(draft / CARD, {**card, "merged": {"delta": card["digest"], "scale": scale}})
        (draft / PAGE).write_text(card_page(card), encoding="utf-8")
    log.info("%s: %s + %g x the %d-window delta of %s", out, base.origin, scale, card["windows"], delta)


if __name__ == "__main__":
    options = {
        "delta": ("", "folder that export --form=delta wrote"),
        "out": ("", "folder to write"),
        "scale": (1.0, "factor of the delta", (-100, 100)),
        "overwrite": (False, "replace an existing folder"),
    }
    cli.start(merge, __doc__, "configs/digits.py", options)
