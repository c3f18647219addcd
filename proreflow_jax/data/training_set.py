"""The pictures and captions that a base model is trained on from scratch: the digits, or the emoji that are not held out."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from . import captions, digits, emoji

KINDS = ("digits", "emoji")


def load(data: Any) -> tuple[UInt8[np.ndarray, "n size size 3"], list[Sequence[str]]]:
    """Reads all images and, for each, its captions, of which one is drawn whenever the image is seen.

    Args:
        data: the config's block: kind, path, resolution, shift, and for the digits split, image_key, caption_key.

    Raises:
        ValueError: another kind; or what the kind's own reader raises.
    """
    if data.kind not in KINDS:
        raise ValueError(f"--config.data.kind={data.kind!r} must be one of {', '.join(KINDS)}")
    images, texts = (_digits if data.kind == "digits" else _emoji)(data)
    padded = np.pad(images, ((0, 0), (data.shift, data.shift), (data.shift, data.shift), (0, 0)), **_border(data.kind))
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
    dataset = emoji.load(data.path, data.resolution)
    seen = dataset.take(~emoji.held_out(dataset.pictures))
    return seen.images, [emoji.wordings(picture) for picture in seen.pictures]


def _border(kind: str) -> dict[str, Any]:
    """What a shifted image shows at its edge: black behind the digits, white behind the emoji."""
    return {"constant_values": 0 if kind == "digits" else 255}
