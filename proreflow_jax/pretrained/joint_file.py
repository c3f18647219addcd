"""A single file of Stable Diffusion 3 or 3.5: its transformer by names and shapes, and the text encoders that it holds.

Published files hold the transformer and the VAE, most of them also both CLIPs, some T5 too. What a file does not hold:
all text encoders come from the folder beside it, T5 alone is left out, as a model of the family may do without it.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.pretrained.single_file import OPTIONAL, PREFIXES, UNET
from proreflow_jax.pretrained.weights import Tensors

log = logging.getLogger(__name__)
PREFIX = PREFIXES["sd3"]
BLOCK = re.compile(re.escape(UNET) + r"joint_blocks\.(\d+)\.")
DUAL = re.compile(re.escape(UNET) + r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight")
NORM = f"{UNET}joint_blocks.0.x_block.attn.ln_q.weight"
MEMBERS = {  # (blocks, width, qk norm, blocks with dual attention) -> the family's published members
    (24, 1536, None, ()): "sd3-medium",
    (24, 1536, "rms_norm", tuple(range(13))): "sd3.5-medium",
    (38, 2432, "rms_norm", ()): "sd3.5-large",
}
CLIPS, T5 = OPTIONAL[:2], OPTIONAL[2]
DEFAULTS = {"qk_norm": None, "dual_attention_layers": ()}  # of config.json


def transformer_facts(stored: Tensors, path: Path) -> dict[str, Any]:
    """The fields of the transformer's config.json that its names and shapes state; `attention_head_dim` only with a qk norm.

    Raises UserError, one line, if tensors that state them are missing or have other axes.
    """
    shape = lambda name, axes: _shape(stored, f"{UNET}{name}", axes, path)
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    facts = {
        "num_layers": 1 + max(int(match[1]) for match in map(BLOCK.match, stored) if match),
        "caption_projection_dim": width,
        "in_channels": channels,
        "patch_size": patch,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape("y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape("pos_embed", 3)[1]),
        "out_channels": shape("final_layer.linear.weight", 2)[0] // patch**2,
        "qk_norm": "rms_norm" if NORM in stored else None,
        "dual_attention_layers": sorted(int(match[1]) for match in map(DUAL.fullmatch, stored) if match),
    }
    return facts | ({"attention_head_dim": stored.shape(NORM)[0]} if NORM in stored else {})


def _shape(stored: Tensors, name: str, axes: int, path: Path) -> tuple[int, ...]:
    if name not in stored or len(stored.shape(name)) != axes:
        raise UserError(
            f"{path} is no whole Stable Diffusion 3: it lacks {name} with {axes} axes: name another --config.model.path"
        )
    return stored.shape(name)


def member(stored: Tensors, path: Path) -> str:
    """Which member of the family a file is: "sd3-medium", "sd3.5-medium" or "sd3.5-large".

    Raises UserError, one line, for a transformer of another size.
    """
    facts = transformer_facts(stored, path)
    size = (facts["num_layers"], facts["caption_projection_dim"], facts["qk_norm"], tuple(facts["dual_attention_layers"]))
    if size not in MEMBERS:
        known = ", ".join(f"{name} ({blocks} x {width})" for (blocks, width, *_), name in MEMBERS.items())
        what = f"{path} is a Stable Diffusion 3 of another size ({size[0]} blocks of width {size[1]}"
        raise UserError(
            f"{what}, {'with' if size[2] else 'no'} qk norm, {len(size[3])} of them dual), known: {known}: name a folder with "
            "its configs and tokenizers by --config.model.like"
        )
    return MEMBERS[size]


def check_transformer(stored: Tensors, config: Mapping[str, Any], path: Path, like: Path) -> None:
    """Raises UserError, one line, if the transformer of a file is not that of the folder beside it, `config`."""
    plain = lambda value: list(value) if isinstance(value, tuple | list) else value
    for field, value in transformer_facts(stored, path).items():
        other = config.get(field, DEFAULTS.get(field))
        other = config.get("in_channels") if field == "out_channels" and other is None else other
        if plain(other if other is not None or field == "qk_norm" else DEFAULTS.get(field)) != plain(value):
            raise UserError(
                f"{path} has a transformer with {field}={value}, {like} one with {plain(other)}: change --config.model.like"
            )


def missing_encoders(stored: Tensors) -> list[str]:
    """The text encoders that a file does not hold."""
    return [name for name in OPTIONAL if not any(key.startswith(PREFIX[name]) for key in stored)]


def text_encoders_beside(stored: Tensors, index: dict[str, Any], path: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """(model_index.json of the folder beside a file, as the file has it; the text encoders whose weights that folder gives).

    Raises UserError, one line, for one CLIP without the other.
    """
    missing = missing_encoders(stored)
    if (lone := [name for name in CLIPS if name in missing]) and len(missing) < len(OPTIONAL):
        there = ", ".join(name for name in OPTIONAL if name not in missing)
        raise UserError(
            f"{path} holds {there}, but no {lone[0]} ({PREFIX[lone[0]]}*): name a file with all or none, or another "
            "--config.model.path"
        )
    if len(missing) == len(OPTIONAL):
        return index, frozenset(name for name in missing if (index.get(name) or [None])[0] is not None)
    if not missing and (index.get(T5) or [None])[0] is None:
        log.info("%s: its T5 is left out, the folder beside it has no tokenizer for one", path.name)
    elif missing:
        log.info("%s: it holds no T5, so prompts go to its CLIPs alone", path.name)
        return index | {T5: [None, None], "tokenizer_3": [None, None]}, frozenset()
    return index, frozenset()
