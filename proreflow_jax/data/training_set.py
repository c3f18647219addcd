"""The pictures and captions that a base model is trained on from scratch: the digits, or the emoji that are not held out."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from proreflow_jax import UserError
from proreflow_jax.data import captions, digits, emoji, emoji_packages

EMOJI_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# Emoji

A small text-to-image latent diffusion model of {shape}'s shape, trained from scratch on emoji of 64 x 64 pixels by
`proreflow pretrain --config={config}`. `{opener}.from_pretrained` opens it. Prompts
it knows: "a waffle, noto style", "a waffle", keywords. Styles: the first column, with spaces for hyphens ("fluent 3d").

Trained on these pictures, resized and put on white:

{credits}

CC-BY-4.0 asks to name the authors where pictures, or works made from them, are passed on. Names and keywords of the emoji:
emojibase-data (MIT, Miles Johnson).
"""
SHAPES = {  # words of the card, by the component that is distilled
    "unet": {"shape": "Stable Diffusion", "config": "emoji_base", "opener": "StableDiffusionPipeline"},
    "transformer": {"shape": "Stable Diffusion 3", "config": "digits_flow_base", "opener": "StableDiffusion3Pipeline"},
}


def load_training_set(data: Any) -> tuple[UInt8[np.ndarray, "n size size 3"], list[Sequence[str]]]:
    """Reads all images and, for each, its captions, of which one is drawn whenever the image is seen.

    Args:
        data: the config's block: kind, path, resolution, shift, and for the digits split, image_key, caption_key.

    Raises:
        ValueError: another kind; or what the kind's own reader raises.
    """
    reader, border = _find(data.kind)
    images, texts = reader(data)
    edges = ((0, 0), (data.shift, data.shift), (data.shift, data.shift), (0, 0))
    padded = np.pad(images, edges, constant_values=border)
    offsets = list(itertools.product(range(2 * data.shift + 1), repeat=2))
    size = data.resolution
    moved = [padded[:, y : y + size, x : x + size] for y, x in offsets]
    return np.concatenate(moved), texts * len(offsets)


def _digits(data: Any) -> tuple[np.ndarray, list[Sequence[str]]]:
    """The digits, one caption each; written on first use."""
    digits.write_dataset(data.path, data.resolution, seed=0)
    source = captions.open_tfds(data.path, data.split, data.image_key, data.caption_key, data.resolution)
    rows = [source[i] for i in range(len(source))]
    return np.stack([row["image"] for row in rows]), [(row["caption"],) for row in rows]


def _emoji(data: Any) -> tuple[np.ndarray, list[Sequence[str]]]:
    """The emoji that training may see, each with all its wordings."""
    dataset = emoji.load_emoji(data.path, data.resolution)
    visible = dataset.take(~emoji.hold_out(dataset.pictures))
    return visible.images, [emoji.wordings(picture) for picture in visible.pictures]


def known_prompts(data: Any) -> list[str]:
    """One caption of each picture, the wordings in turn: what a model trained on them can be asked for; []: nothing is kept."""
    reader = {"emoji": _emoji}.get(data.kind)
    _, texts = reader(data) if reader else (None, [])
    return [wordings[i % len(wordings)] for i, wordings in enumerate(texts)]


def _find(kind: str) -> tuple[Callable[[Any], tuple[np.ndarray, list[Sequence[str]]]], int]:
    """(reader, value at the edge of a shifted image: black behind the digits, white behind the emoji) of a kind."""
    sets = {"digits": (_digits, 0), "emoji": (_emoji, 255)}
    if kind not in sets:
        raise UserError(f"--config.data.kind={kind!r} must be one of {', '.join(sets)}")
    return sets[kind]


def card(kind: str, denoiser: str = "unet") -> str:
    """What a model trained on the pictures must say of them, in Markdown; "": nothing. denoiser: the model's component."""
    return EMOJI_CARD.format(credits=emoji_packages.credits_table(), **SHAPES[denoiser]) if kind == "emoji" else ""
