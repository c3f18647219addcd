"""Every config file of a model, read by one table: each field that the package uses, and the kind of its value.

Converters and hands leave numbers as text, sizes as lists, null for a length. Such a value is refused when its file is read,
in one line with file, field and value. A whole number may be written as a decimal: JSON has one kind of number.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from proreflow_jax import MissingFile, UserError

KNOWN = "only SD 1.x, SD 2.x, SDXL base, SD 3, SD 3.5 and their fine-tunes are distilled"
CLASSES = {  # of the networks, in model_index.json and in their own config.json
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "transformer": ("SD3Transformer2DModel",),
    "text_encoder_3": ("T5EncoderModel",),
}
SHIFTED = ("latents_mean", "latents_std")  # fields of autoencoders that move each channel of the latents
CONFIG_NAMES = ("config.json", "scheduler_config.json")
MEND = "name another --config.model.path"
DAMAGED = f"copy or download it again, or {MEND}"
TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
SHOWN = 100  # characters of a value in an error
ABSENT = object()


class FieldKind(NamedTuple):
    """A kind of value. `read` gives the value as it is used, or raises ValueError, TypeError or OverflowError."""

    words: str  # behind "must be"
    read: Callable[[Any], Any]
    required: bool = False


def _whole(least: int, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise ValueError
    return int(value)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return value


def _instance(kinds: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kinds):
        raise TypeError
    return value


def _choice(values: tuple, value: Any) -> Any:
    if isinstance(value, bool) or value not in values:
        raise ValueError
    return values[values.index(value)]


def _square(value: Any) -> int:
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return _whole(1, value)


def _token(value: Any) -> str:
    return _instance(str, value.get("content") if isinstance(value, Mapping) else value)


def _list_of(kind: FieldKind, value: Any) -> list:
    return [kind.read(item) for item in _instance((list, tuple), value)]


COUNT = FieldKind("a whole number of at least 1", lambda value: _whole(1, value))
INDEX = FieldKind("a whole number of at least 0", lambda value: _whole(0, value))
POSITIVE = FieldKind("a number above 0", _positive)
FLAG = FieldKind("true or false", lambda value: _instance(bool, value))
WORD = FieldKind("a word", lambda value: _instance(str, value))
COUNTS = FieldKind("a list of whole numbers of at least 1", lambda value: _list_of(COUNT, value))
WORDS = FieldKind("a list of words", lambda value: _list_of(WORD, value))
EACH = FieldKind(  # of the UNet's levels
    "a whole number of at least 1, or a list of them",
    lambda value: (COUNTS if isinstance(value, list | tuple) else COUNT).read(value),
)
SQUARE = FieldKind("one whole number of at least 1: only squares are drawn", _square)
SHIFT = FieldKind("a whole number", lambda value: _whole(-(2**31), value))
NUMBER = FieldKind("a number", _number)
INDICES = FieldKind("a list of whole numbers of at least 0", lambda value: _list_of(INDEX, value))
TOKEN = FieldKind("a token", _token)
OBJECT = FieldKind("an object", lambda value: _instance(Mapping, value))


def _need(kind: FieldKind) -> FieldKind:
    return kind._replace(required=True)


def _or_null(kind: FieldKind) -> FieldKind:
    return FieldKind(f"{kind.words}, or null", lambda value: None if value is None else kind.read(value))


def _one_of(*values: Any) -> FieldKind:
    return FieldKind(" or ".join(map(str, values)), lambda value: _choice(values, value))


TEXT = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"), _need(COUNT)
    ),
    **{"max_position_embeddings": COUNT, "projection_dim": COUNT, "layer_norm_eps": POSITIVE, "hidden_act": WORD},
    **{"eos_token_id": INDEX, "architectures": _or_null(WORDS)},
}
TABLE: dict[str, dict[str, FieldKind]] = {
    "unet": {
        **{"block_out_channels": _need(COUNTS), "down_block_types": _need(WORDS), "up_block_types": _need(WORDS)},
        **{"attention_head_dim": _need(EACH), "num_attention_heads": _or_null(EACH), "transformer_layers_per_block": EACH},
        **{"layers_per_block": EACH, "in_channels": _need(COUNT), "out_channels": _need(COUNT)},
        **{"cross_attention_dim": _need(COUNT), "sample_size": _need(SQUARE), "norm_num_groups": COUNT, "norm_eps": POSITIVE},
        **{"use_linear_projection": FLAG, "flip_sin_to_cos": FLAG, "freq_shift": SHIFT},
        **{"addition_time_embed_dim": _or_null(COUNT), "projection_class_embeddings_input_dim": _or_null(COUNT)},
    },
    "vae": {
        **{"block_out_channels": _need(COUNTS), "latent_channels": _need(COUNT), "layers_per_block": COUNT},
        **{"norm_num_groups": COUNT, "in_channels": _one_of(3), "out_channels": _one_of(3), "act_fn": _one_of("silu", "swish")},
        **{"scaling_factor": POSITIVE, "shift_factor": _or_null(NUMBER), "use_quant_conv": FLAG, "use_post_quant_conv": FLAG},
        "force_upcast": _or_null(FLAG),
    },
    "transformer": {  # SD 3's
        **dict.fromkeys(("patch_size", "in_channels", "num_layers", "attention_head_dim"), _need(COUNT)),
        **dict.fromkeys(("num_attention_heads", "joint_attention_dim", "pooled_projection_dim"), _need(COUNT)),
        **{"caption_projection_dim": _need(COUNT), "pos_embed_max_size": _need(COUNT), "sample_size": _need(SQUARE)},
        **{"out_channels": _or_null(COUNT), "dual_attention_layers": INDICES, "qk_norm": _or_null(_one_of("rms_norm"))},
    },
    "text_encoder": TEXT,
    "text_encoder_2": TEXT,
    "text_encoder_3": {  # T5's
        **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"), _need(COUNT)),
        **{"relative_attention_num_buckets": COUNT, "relative_attention_max_distance": COUNT, "layer_norm_epsilon": POSITIVE},
        **{"feed_forward_proj": WORD, "dense_act_fn": WORD, "is_gated_act": FLAG, "architectures": _or_null(WORDS)},
    },
    "image_encoder": {  # CLIP's, of the CLIP score
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), _need(COUNT)),
        **{"image_size": COUNT, "patch_size": COUNT, "num_channels": _one_of(3), "projection_dim": COUNT},
        **{"layer_norm_eps": POSITIVE, "hidden_act": WORD},
    },
    "clip": {
        **dict.fromkeys(("text_config", "vision_config", "text_config_dict", "vision_config_dict"), _or_null(OBJECT)),
        **{"projection_dim": COUNT},
    },
    "scheduler": {
        **{"num_train_timesteps": COUNT, "beta_start": POSITIVE, "beta_end": POSITIVE, "beta_schedule": WORD},
        **{"prediction_type": WORD, "rescale_betas_zero_snr": _or_null(FLAG)},
        **{"shift": POSITIVE, "shift_terminal": _or_null(POSITIVE), "invert_sigmas": _or_null(FLAG)},  # of flows, from here on
        **{"use_dynamic_shifting": _or_null(FLAG), "stochastic_sampling": _or_null(FLAG), "time_shift_type": _or_null(WORD)},
        **dict.fromkeys(("base_shift", "max_shift"), _or_null(NUMBER)),
        **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), _or_null(COUNT)),
        **{f"use_{name}_sigmas": _or_null(FLAG) for name in ("karras", "exponential", "beta")},
    },
    "tokenizer": {
        **{"model_max_length": COUNT, "pad_token": _or_null(TOKEN), "added_tokens_decoder": _or_null(OBJECT)},
    },
    "model_index": {"force_zeros_for_empty_prompt": _or_null(FLAG)},
}
LEVELS = ("down_block_types", "up_block_types", "attention_head_dim", "num_attention_heads")
LEVELS += ("transformer_layers_per_block", "layers_per_block")  # of the UNet: lists with an entry for each level


def read_object(path: Path, mend: str = DAMAGED) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError in one line if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path} is not a JSON object ({error}): {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object but a {type(value).__name__}: {mend}")
    return value


def read_ids(path: Path) -> dict[str, int]:
    """{token: id} of a vocabulary's file. Raises ValueError, one line."""
    ids = read_object(path)
    for word, number in ids.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise UserError(f"{path}: {_shown(word)}: {_shown(number)} must be {INDEX.words}: {MEND}")
    return ids


def check_fields(component: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The config with its fields as they are used. Raises ValueError, one line, for a field of another kind or a missing one.

    component: of TABLE. Fields that the table lacks stay as they are.
    """
    _check_class(component, config, path)
    table, checked = TABLE[component], dict(config)
    if lacking := [field for field, kind in table.items() if kind.required and config.get(field) is None]:
        raise UserError(f"{path} lacks {', '.join(lacking)}: {MEND}")
    for field, kind in table.items():
        if (value := config.get(field, ABSENT)) is not ABSENT:
            try:
                checked[field] = kind.read(value)
            except (ValueError, TypeError, OverflowError):
                raise UserError(f"{path}: {field}={_shown(value)} must be {kind.words}: {MEND}") from None
    _check_sizes(component, checked, path)
    return checked


def text_layers(names: Iterable[str]) -> int:
    """How many layers of a CLIP text encoder the names count: the highest number and one; 0 if they name none."""
    return max((int(match[1]) + 1 for match in map(TEXT_LAYER.match, names) if match), default=0)


def _check_class(component: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, one line, for the config of another network than the component is."""
    stated = [config["_class_name"]] if "_class_name" in config else config.get("architectures")
    if component in CLASSES and isinstance(stated, list) and stated and stated[0] not in CLASSES[component]:
        expected = " or ".join(CLASSES[component])
        raise UserError(f"{path} is that of a {stated[0]}, must be of a {expected}: {KNOWN}: {MEND}")
    if shifted := [name for name in SHIFTED if component == "vae" and config.get(name) is not None]:
        raise UserError(f"{path} sets {shifted[0]}, but latents are only scaled here: {KNOWN}: {MEND}")


def check_unshifted(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, one line, for a UNet's autoencoder with a shift: diffusers' pipelines of these families ignore one."""
    if config.get("shift_factor"):
        raise UserError(f"{path} sets shift_factor, but latents are only scaled here: {KNOWN}: {MEND}")


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """The config.json (or scheduler_config.json) of one component of a diffusers folder, its fields checked.

    Raises FileNotFoundError naming the folder, or ValueError as `check_fields`.
    """
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return check_fields(component, read_object(folder / name), folder / name)
    raise MissingFile(f"{folder} holds no {' or '.join(CONFIG_NAMES)}: --config.model.path must name a diffusers folder")


def _check_sizes(component: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, one line, for lists of other lengths than the UNet has levels, and for groups that do not divide."""
    widths = config.get("block_out_channels", [])
    for field in LEVELS if component == "unet" else ():
        value = config.get(field)
        if isinstance(value, list) and len(value) != len(widths):
            rule = f"must have an entry for each of the {len(widths)} levels of block_out_channels"
            raise UserError(f"{path}: {field}={_shown(value)} {rule}: {MEND}")
    if component == "transformer" and (both := config["num_attention_heads"] * config["attention_head_dim"]) != (
        width := config["caption_projection_dim"]
    ):
        rule = f"must be num_attention_heads x attention_head_dim, {both}: text and image meet in one attention"
        raise UserError(f"{path}: caption_projection_dim={width} {rule}: {MEND}")
    groups = config.get("norm_num_groups", 32)
    if bad := [width for width in widths if width % groups]:
        raise UserError(f"{path}: norm_num_groups={groups} must divide {bad[0]} of block_out_channels: {MEND}")
    field = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"  # a number of heads in both
    heads, widths = config.get(field), widths if component == "unet" else [config.get("hidden_size", 0)]
    each = heads if isinstance(heads, list) else [heads] * len(widths)
    if bad := [(count, width) for count, width in zip(each, widths, strict=True) if count and width % count]:
        raise UserError(f"{path}: {field}={_shown(heads)}: {bad[0][0]} heads must divide a width of {bad[0][1]}: {MEND}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
