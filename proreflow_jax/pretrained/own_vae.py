"""A VAE in the place of the model's own: a folder, a model's vae/, or one file, compared with the model before it is taken.

Latents are what the denoiser was trained on. Another VAE serves only if its latents are the same: as many channels, as small,
scaled alike, and of the same meaning, which no number states. So fine-tunes of the model's own VAE serve, and hardly any other.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proreflow_jax import MissingFile, UserError
from proreflow_jax.pretrained import config_fields, single_file, weights
from proreflow_jax.pretrained.chosen import Chosen
from proreflow_jax.pretrained.sources import INDEX, PATH, VAE, ModelSource, OwnVae, is_read
from proreflow_jax.storage import sealed

log = logging.getLogger(__name__)
MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
LEVEL = re.compile(r"encoder\.down(?P<today>_blocks)?\.(?P<number>\d+)\.")  # diffusers says down_blocks, CompVis down
DEFAULTS = {  # of config.json
    **{"layers_per_block": 1, "norm_num_groups": 32, "in_channels": 3, "out_channels": 3, "act_fn": "silu"},
    **{"scaling_factor": 0.18215, "use_quant_conv": True, "use_post_quant_conv": True},
}
LATENTS, CHANNELS = "encoder.conv_out.weight", "decoder.conv_in.weight"  # makes the latents; reads them
RELATED = 0.5  # cosine of two encoders' last weights; of fine-tunes near 1, of strangers near 0
RULE = f"{VAE} must name a VAE's folder, a diffusers folder with a vae/, a .safetensors file or a hub id"
CONFIG = "config.json"


def with_own_vae(source: ModelSource, path: Path, with_weights: bool = True) -> ModelSource:
    """The model with the VAE that lies at `path`, folder or file.

    With with_weights=False a folder's weights need not be there.

    Raises FileNotFoundError or ValueError, one line: no VAE, damaged, or one whose latents are not the model's.
    """
    try:
        vae = _open_file(path, source) if path.is_file() else _open_folder(path, source, with_weights)
    except UserError as error:
        raise type(error)(str(error).replace(PATH, VAE)) from None
    own = _own_config(source)
    if vae.stored is None:
        _check_fits(vae, source, own, vae.stated)
    if with_weights:
        _warn_of_strangers(vae, source)
    return source._replace(vae=vae)


def _open_folder(path: Path, source: ModelSource, with_weights: bool) -> OwnVae:
    """The folder of a VAE, or of a model with one; a folder that export wrote is compared with its record."""
    if not path.is_dir():
        raise MissingFile(f"{path} does not exist: {RULE}")
    folder = path if (path / CONFIG).is_file() else path / "vae"
    if not (folder / CONFIG).is_file():
        raise MissingFile(f"{path} holds neither {CONFIG} of a VAE nor vae/{CONFIG}: {RULE}")
    if (folder.parent / INDEX).is_file():
        skip = lambda name: not name.startswith("vae/") or not is_read(folder.parent, name, with_weights)
        sealed.check_undamaged(folder.parent, sealed.read_record(folder.parent), config_fields.DAMAGED, skip)
    stated = config_fields.read_config(folder, "vae")
    if source.denoiser_name == "unet":
        config_fields.check_unshifted(stated, folder / CONFIG)
    root = folder.parent if (folder.parent / INDEX).is_file() else folder
    return OwnVae(path, _in_words_of(stated, _own_config(source)), stated, folder, root)


def _open_file(path: Path, source: ModelSource) -> OwnVae:
    """One file, whole model or VAE alone, in diffusers' or CompVis' names; its config.json is that of the model's own."""
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{VAE}={path} is no .safetensors file; a pickle may run code: {RULE}")
    sealed.check_undamaged(path.parent, sealed.read_record(path.parent), config_fields.DAMAGED, lambda name: name != path.name)
    own, file = _own_config(source), weights.Tensors([path])
    if not own:
        raise UserError(f"{VAE}={path}: a file does not say how its VAE is built, and {source.folder} holds no vae/{CONFIG}")
    prefix = single_file.VAE if any(name.startswith(single_file.VAE) for name in file) else ""
    names = {name.removeprefix(prefix): name for name in file if name.startswith(tuple(prefix + part for part in MODULES))}
    levels = [match for match in map(LEVEL.match, names) if match]
    if not levels or CHANNELS not in names:
        raise UserError(f"{VAE}={path} holds no VAE: none of its {len(file)} names begins with {prefix}encoder.down: {RULE}")
    if not prefix and len(names) < len(file):
        log.info("%s: left out, no parts of a VAE: %s", path.name, _some(name for name in file if name not in names))
    facts = {"latent_channels": file.shape(names[CHANNELS])[1]}
    facts["block_out_channels"] = [0] * (1 + max(int(match["number"]) for match in levels))
    vae = OwnVae(path, own, own, stored=Chosen(file, names))
    _check_fits(vae, source, own, facts)
    if not levels[0]["today"]:
        original = Chosen(file, {single_file.VAE + name: there for name, there in names.items()})
        try:
            vae = vae._replace(stored=single_file.from_original("vae", original, own, source.family))
        except UserError as error:
            raise UserError(f"{VAE}={path}: {error}: {RULE}") from None
    log.info("%s: sizes and scaling_factor %s are those of the model's own VAE", path, own.get("scaling_factor", "0.18215"))
    return vae


def _own_config(source: ModelSource) -> dict[str, Any]:
    """config.json of the model's own VAE; {} where its folder has none."""
    return source.config("vae") if (source.folder / "vae" / CONFIG).is_file() else {}


def _in_words_of(stated: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with the fields in which the other differs: the same VAE, written by two versions of diffusers, is the same."""
    value = lambda config, field: config.get(field, DEFAULTS.get(field))
    fields = config_fields.TABLE["vae"]
    return {**(own or stated), **{name: value(stated, name) for name in fields if value(stated, name) != value(own, name)}}


def _check_fits(vae: OwnVae, source: ModelSource, own: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises UserError, one line, unless latents have the shape and the scale of the model's.

    own: config.json of the model's own VAE, {} if there is none. facts: fields of the other's that are known.
    """
    flag, taken = f"{VAE}={vae.origin}", source.config(source.denoiser_name)["in_channels"]
    what = "UNet" if source.denoiser_name == "unet" else source.denoiser_name
    channels, mend = facts["latent_channels"], f"name a fine-tune of the VAE of {source.origin}, or leave {VAE} out"
    if channels != taken:
        raise UserError(f"{flag} makes latents of {channels} channels, the {what} of {source.origin} takes {taken}: {mend}")
    sides = [2 ** (len(config["block_out_channels"]) - 1) for config in (facts, own or facts)]
    if sides[0] != sides[1]:
        raise UserError(f"{flag} makes pictures {sides[0]} times smaller, the model's own VAE {sides[1]} times: {mend}")
    if vae.stored is not None or not own:
        return
    shifts = [config.get("shift_factor") or 0.0 for config in (facts, own)]
    if not np.isclose(*shifts, rtol=1e-6):
        raise UserError(
            f"{flag} shifts its latents by {shifts[0]:g}, the model's own VAE by {shifts[1]:g}: no such latents: {mend}"
        )
    scales = [config.get("scaling_factor", DEFAULTS["scaling_factor"]) for config in (facts, own)]
    if not np.isclose(scales[0], scales[1], rtol=1e-6):
        raise UserError(
            f"{flag} scales its latents by {scales[0]:g}, the model's own VAE by {scales[1]:g}: their latents are not the same "
            f"(SD's VAEs have 0.18215, SDXL's 0.13025, SD 3's 1.5305): {mend}"
        )


def _warn_of_strangers(vae: OwnVae, source: ModelSource) -> None:
    """Logs a warning if two encoders do not descend from each other: their latents would hardly mean the same.

    The model's own VAE may be missing or damaged, which is a reason to name another: then nothing is compared.
    """
    if LATENTS not in (tensors := vae.tensors()):
        return
    try:
        own = source.tensors("vae")[LATENTS]
    except (UserError, KeyError):
        return
    one, other = (side.astype(np.float64).ravel() for side in (tensors[LATENTS], own))
    cosine = one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30) if one.shape == other.shape else 0.0
    if cosine < RELATED:
        log.warning(
            "%s is no fine-tune of the model's own VAE (its encoder's last weights: cosine %.2f): unless its latents mean the "
            "same, every picture is wrong: look at sample --stage=0",
            vae.origin,
            cosine,
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted({name.split(".")[0] for name in names})
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
