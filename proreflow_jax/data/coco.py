"""COCO's captions and images, as protocols of FID choose them: from the official files, or from tfds' coco_captions.

The official files are captions_val2017.json (or val2014) and the folder of images that belongs to it. tfds has the release of
2014 only, cut another way: its restval, test and val together are val2014. Both give the same images in the same order.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import captions as datasets
from proreflow_jax.data import images as pictures
from proreflow_jax.storage import atomic

TFDS_YEAR, TFDS_SPLIT = 2014, "restval+test+val"
CAPTIONS, IMAGES = "--config.evaluate.captions", "--config.evaluate.images"
DRAW_SEED = 0


class Caption(NamedTuple):
    """One caption, and the id of the image it is about."""

    id: int
    image: int
    text: str


class Split(NamedTuple):
    """A split of COCO: ids of its images, rising; its captions, by rising ids; image i's file as bytes."""

    images: tuple[int, ...]
    captions: tuple[Caption, ...]
    read: Callable[[int], bytes]


def open_split(captions: str, images: str, year: int) -> Split:
    """Opens the captions and images that two flags name.

    Args:
      captions: the official captions_val<year>.json; not needed if `images` is a folder of tfds.
      images: the folder with the official images, or a folder that tfds prepared.
      year: of the release that the protocol rests on.

    Raises FileNotFoundError or ValueError, one line: something is missing, damaged, or of another year.
    """
    if not images:
        raise UserError(f"{IMAGES} is empty: name the folder of val{year}'s images (docs/scores.md says where they are)")
    if is_tfds(images):
        return open_coco_tfds(Path(images).expanduser(), year)
    if not captions:
        raise UserError(f"{CAPTIONS} is empty: name captions_val{year}.json (docs/scores.md says where it is)")
    return open_official(Path(captions).expanduser(), Path(images).expanduser(), year)


def is_tfds(images: str) -> bool:
    """Whether a folder was prepared by tfds."""
    return (Path(images).expanduser() / "dataset_info.json").is_file()


def open_official(captions: Path, images: Path, year: int) -> Split:
    """The files of cocodataset.org; arguments and errors as of `open_split`."""
    if not captions.is_file():
        raise MissingFile(f"{captions} is not a file: {CAPTIONS} must name captions_val{year}.json")
    if not images.is_dir():
        raise MissingFile(f"{images} is not a folder: {IMAGES} must name the one with val{year}'s images")
    mend = f"{CAPTIONS} must name captions_val{year}.json"
    try:
        content = json.loads(captions.read_bytes())
        said = content["info"]["year"]
        names = {int(row["id"]): str(row["file_name"]) for row in content["images"]}
        rows = [Caption(int(row["id"]), int(row["image_id"]), str(row["caption"]).strip()) for row in content["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = atomic.one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"{captions} is no captions file of COCO ({why}): {CAPTIONS} must name captions_val{year}.json"
        ) from None
    if said != year:
        raise UserError(f"{captions} is of the year {said}, the protocol is of {year}: {mend}")
    _check_images(captions, images, names)
    ids = sorted(names)
    return Split(tuple(ids), _sorted(rows, names, str(captions)), lambda i: (images / names[ids[i]]).read_bytes())


def _check_images(captions: Path, images: Path, names: dict[int, str]) -> None:
    if odd := [name for name in names.values() if name != os.path.basename(name) or name in ("", ".", "..")]:
        raise UserError(f"{captions} names the image {odd[0]!r}, which is no plain file name: refused")
    there = set(os.listdir(images))
    if missing := sorted(name for name in names.values() if name not in there):
        raise MissingFile(
            f"{images} lacks {len(missing):,} of {len(names):,} images that {captions.name} names, such as {missing[0]}: "
            f"unpack all of it, or mend {IMAGES}"
        )


def _sorted(rows: list[Caption], images: Any, where: str) -> tuple[Caption, ...]:
    if lost := [row for row in rows if row.image not in images or not row.text]:
        raise UserError(f"{where}: caption {lost[0].id} is empty or of no image of the split: fetch the file again")
    if len({row.id for row in rows}) != len(rows) or not rows:
        raise UserError(f"{where}: captions are missing or share an id: fetch the file again")
    return tuple(sorted(rows))


def check_tfds(folder: Path, year: int) -> None:
    """Raises FileNotFoundError or ValueError, one line, for a folder that is not tfds' coco_captions of that year."""
    if year != TFDS_YEAR:
        raise UserError(f"{folder}: tfds has COCO of {TFDS_YEAR}, the protocol is of {year}: give the official files")
    datasets.open_tfds(folder, TFDS_SPLIT, "image", "captions/text", 8)


def open_coco_tfds(folder: Path, year: int) -> Split:
    """coco_captions as tfds prepared it, read once for its ids; arguments and errors as of `open_split`."""
    check_tfds(folder, year)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records = tfds.builder_from_directory(folder).as_data_source(split=TFDS_SPLIT, deserialize_method=raw)
    places, rows = {}, []
    for position in range(len(records)):
        feature = _features(records[position])
        image = next(iter(feature["image/id"].int64_list.value), -1)
        places[image] = position
        texts, ids = feature["captions/text"].bytes_list.value, feature["captions/id"].int64_list.value
        if len(texts) != len(ids) or image < 0:
            raise UserError(f"{folder}, record {position} has no image/id or captions/id: {IMAGES} must name coco_captions")
        rows += [Caption(id, image, text.decode("utf-8").strip()) for id, text in zip(ids, texts, strict=True)]
    ids = sorted(places)
    read = lambda i: _features(records[places[ids[i]]])["image"].bytes_list.value[0]
    return Split(tuple(ids), _sorted(rows, places, str(folder)), read)


def _features(record: bytes) -> Any:
    return tf_example_pb2.Example.FromString(record).features.feature


def first_captions(split: Split, count: int) -> list[str]:
    """The caption of the lowest id of each image, by image id, of the first `count` images."""
    first: dict[int, str] = {}
    for caption in split.captions:
        first.setdefault(caption.image, caption.text)
    return _enough([first[image] for image in split.images if image in first], count)


def drawn_captions(split: Split, count: int) -> list[str]:
    """`count` captions out of all, without replacement, by seed 0; fewer are the first of more.

    Drawn by numpy's RandomState: its numbers are promised never to change.
    """
    order = np.random.RandomState(DRAW_SEED).permutation(len(split.captions))
    return _enough([split.captions[i].text for i in order], count)


def _enough(prompts: list[str], count: int) -> list[str]:
    if len(prompts) < count:
        raise UserError(f"{len(prompts):,} prompts of {count:,}: lower --config.evaluate.examples, or give another {CAPTIONS}")
    return prompts[:count]


CHOICES = {"first": first_captions, "drawn": drawn_captions}  # the `choice` of a protocol


def decode_coco_image(encoded: bytes, what: str) -> UInt8[np.ndarray, "h w 3"]:
    """An image file's pixels at its own size; grey becomes RGB. `what` names it in errors.

    Raises ValueError, one line: not an image of `images.FORMATS` and `images.MODES`, damaged, or larger than its limit.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=pictures.FORMATS)
        if image.width * image.height > pictures.PIXEL_LIMIT or image.mode not in pictures.MODES:
            raise UserError(f"{image.width} x {image.height} pixels of mode {image.mode}")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"{what} is no image that can be judged ({atomic.one_line(error)}): see {IMAGES}") from None
