"""What a single file says of itself beside its weights: marks, metadata, buffers. Each is understood, refused, or listed.

UIs and trainers write how a model is read in several forms: empty tensors (ComfyUI, A1111), the header's metadata (ModelSpec,
ComfyUI's predict_key, kohya's ss_ fields), the schedule's table as a tensor (CompVis).
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.pretrained.single_file import LAYER, OPTIONAL, PREFIXES, UNET
from proreflow_jax.pretrained.sources import STUDENT
from proreflow_jax.pretrained.weights import Tensors

log = logging.getLogger(__name__)
PREDICTION, ZERO_SNR = "prediction_type", "rescale_betas_zero_snr"
MARKS = {"v_pred": (PREDICTION, "v_prediction"), "ztsnr": (ZERO_SNR, True)}  # tensors without numbers
FOREIGN = {  # tensors of samplers that are no DDPM -> their name
    **dict.fromkeys(("edm_mean", "edm_std"), "EDM (as Playground 2.5)"),
    **dict.fromkeys(("edm_vpred.sigma_max", "edm_vpred.sigma_min"), "EDM's v_prediction (as CosXL)"),
}
TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
TRUE = ("true", "1")
WORDS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")  # metadata: the type in a word
FLAGS = {  # metadata: true or false
    "ss_v_parameterization": (PREDICTION, "v_prediction"),
    "ss_zero_terminal_snr": (ZERO_SNR, True),
}
NOTED = ("modelspec.timestep_range", "modelspec.encoder_layer", "ss_clip_skip")  # metadata that is shown if it is not the usual
USUAL = ("0,1000", "1", "none", "")
HEARD = {"format", STUDENT, *WORDS, *FLAGS, *NOTED}  # all other metadata is listed by name
TABLE = "alphas_cumprod"
KINDS = {9: "a model for inpainting", 8: "a model for editing (as InstructPix2Pix)", 5: "a model for depth maps"}
LCM = f"{UNET}time_embed.cond_proj.weight"
INPUT = f"{UNET}input_blocks.0.0.weight"
WHOLE = "UIs draw with a part of their own in its place, here the file must hold all"
BAKED = "take the one with its VAE baked in, or name a VAE by --config.model.vae"
ANOTHER = "name another --config.model.path"


def stated(stored: Tensors, path: Path) -> dict[str, Any]:
    """Fields of a scheduler's config that the file states. Raises UserError, one line: a contradiction, a foreign kind."""
    if foreign := [name for name in FOREIGN if name in stored]:
        raise UserError(f"{path} is a model of {FOREIGN[foreign[0]]}, its tensor {foreign[0]} says so: {ANOTHER}")
    statements = [(name, *MARKS[name]) for name in MARKS if name in stored]
    for name in WORDS:
        if word := stored.metadata.get(name, "").strip().lower():
            if word not in TYPES:
                raise UserError(f"{path}: its metadata says {name}={word[:40]!r}, known: {', '.join(TYPES)}: {ANOTHER}")
            statements.append((name, PREDICTION, TYPES[word]))
    statements += [(name, *row) for name, row in FLAGS.items() if stored.metadata.get(name, "").strip().lower() in TRUE]
    fields: dict[str, Any] = {}
    for _, field, value in statements:
        if fields.setdefault(field, value) != value:
            both = " and ".join(f"{name}: {word}" for name, where, word in statements if where == field)
            raise UserError(f"{path} contradicts itself on {field} ({both}): {ANOTHER}")
    if windows := stored.metadata.get(STUDENT, ""):
        fields[STUDENT] = int(windows) if windows.isdecimal() else windows
    return fields


def table(stored: Tensors, path: Path) -> np.ndarray | None:
    """The file's own table of noise levels, (1000,) float64; None where it has none. One that falls nowhere is logged."""
    if TABLE not in stored:
        return None
    levels = stored[TABLE].astype(np.float64)
    if levels.shape == (1000,) and np.all(np.diff(levels) <= 0) and 0 <= levels[-1] < levels[0] <= 1:
        return levels
    log.warning("%s: its tensor %s is no table of noise levels, it is left out", path, TABLE)
    return None


def count_layers(stored: Tensors, family: str, component: str) -> int:
    """How many layers of a text encoder the file holds."""
    prefix = PREFIXES[family][component]
    names = [LAYER.match(name.removeprefix(prefix)) for name in stored if name.startswith(prefix)]
    return max((int(match[1]) + 1 for match in names if match), default=0)


def check_layout(stored: Tensors, family: str, path: Path, with_vae: bool = True) -> None:
    """Raises UserError, one line that says what the file is, if it is no whole text-to-image model. Nothing is read.

    With with_vae=False its VAE is not asked for.
    """
    if LCM in stored:
        raise UserError(f"{path} is an LCM, a model that is distilled already (it has {LCM}): distil its base model, {ANOTHER}")
    channels = stored.shape(INPUT)[1] if INPUT in stored and len(stored.shape(INPUT)) == 4 else 4
    if channels != 4:
        what = KINDS.get(channels, "no text-to-image model")
        raise UserError(f"{path} is {what}: its UNet takes {channels} channels, the VAE gives 4: {ANOTHER}")
    for component, prefix in PREFIXES[family].items():
        needed = with_vae if component == "vae" else family != "sd3" or component not in OPTIONAL
        if needed and not any(name.startswith(prefix) for name in stored):
            mend = f"{BAKED}, or {ANOTHER}" if component == "vae" else ANOTHER
            raise UserError(f"{path} holds no {component}, no name that begins with {prefix}: {WHOLE}: {mend}")


def log_left_out(stored: Tensors, family: str, path: Path) -> None:
    """Lists what no component of the family claims and `stated` does not hear: weights, buffers, networks, metadata."""
    claimed = (*PREFIXES[family].values(), *MARKS, TABLE)
    left = Counter(name.split(".")[0] for name in stored if not name.startswith(claimed))
    noted = {name: stored.metadata[name] for name in NOTED if stored.metadata.get(name, "").strip().lower() not in USUAL}
    if left:
        log.info("%s: left out, for no part of the model has a place for them: %s", path.name, _counted(left))
    rest = _counted({ascii(name)[1:-1][:60]: 1 for name in stored.metadata if name not in HEARD})
    if noted:
        shown = ", ".join(f"{name}={value[:40]!r}" for name, value in noted.items())
        log.warning("%s: its metadata is not followed in %s%s", path.name, shown, f"; not read: {rest}" if rest else "")
    elif rest:
        log.info("%s: metadata that is not read: %s", path.name, rest)


def _counted(names: Mapping[str, int], most: int = 12) -> str:
    rows = [f"{name} ({count})" if count > 1 else name for name, count in sorted(names.items())]
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
