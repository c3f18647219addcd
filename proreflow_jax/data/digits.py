"""The smallest config's data: scikit-learn's 1,797 handwritten digits, captioned RGB images in a tfds dataset like any other.

They come with scikit-learn, so the first run downloads nothing; and a classifier on their 8 x 8 pixels scores generated
images in seconds. White ink on black. Everything here is a function of (size, seed).
"""

import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict

from proreflow_jax import UserError
from proreflow_jax.data import captions
from proreflow_jax.storage import atomic

GRID = 8  # pixels a side in the source
INK = 16  # its brightest value
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {word}",
    "the digit {figure}",
    "a photo of the number {word}",
    "the number {word} in white ink",
    "handwriting: {figure}",
    "a scan of the handwritten digit {word}",
    "the figure {figure}, written by hand",
    "{word}",
)
STAMP = "digits.json"  # size and seed of the dataset, and its shard's hash


def load_digits(size: int = 32) -> tuple[UInt8[np.ndarray, "n size size 3"], Int[np.ndarray, " n"]]:
    """Returns the 1,797 digits, enlarged bicubically from 8 x 8, and their labels 0 .. 9.

    Raises:
        ValueError: size is not a multiple of 8; or scikit-learn is not installed (the extra `demo`).
    """
    if size < GRID or size % GRID:
        raise UserError(f"digits of {size} pixels: must be a multiple of {GRID}: set --config.data.resolution")
    pixels, labels = _sklearn_digits()
    return np.stack([_enlarge(image, size) for image in pixels]), labels


def caption(label: int, wording: int) -> str:
    """Returns wording `wording` (modulo their number) for a digit: caption(7, 0) is "a handwritten seven"."""
    return WORDINGS[wording % len(WORDINGS)].format(word=WORDS[label], figure=label)


def to_pixels8(
    images: UInt8[np.ndarray, "n h w 3"] | Float[np.ndarray, "n h w 3"],
) -> Float[np.ndarray, "n 64"]:
    """Returns images as the classifier knows them, float64 in 0 .. 16: area averages over 8 x 8 blocks.

    Args:
        images: (n, size, size, 3), uint8 in 0 .. 255 or float in 0 .. 1 (what lies outside is clipped).

    Raises:
        ValueError: another shape, or a side that is not a multiple of 8.
    """
    n, height, width, _ = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if height != width or height < GRID or height % GRID:
        raise UserError(f"images of shape {images.shape}: (n, size, size, 3) with size a multiple of {GRID} is needed")
    bright = images / 255.0 if images.dtype == np.uint8 else np.clip(images, 0.0, 1.0).astype(np.float64)
    block = height // GRID
    return INK * bright.reshape(n, GRID, block, GRID, block, -1).mean(axis=(2, 4, 5)).reshape(n, GRID * GRID)


def write_dataset(folder: str | os.PathLike, size: int = 32, seed: int = 0) -> Path:
    """Writes the digits as a prepared tfds dataset, split "train": image (PNG), caption (text), label (class).

    The order and each image's wording are drawn from the seed. The folder appears whole or not at all; if it is there
    and good, nothing is done.

    Returns: the folder.

    Raises:
        ValueError: the folder holds something else, or digits of another size or seed, or damaged ones.
    """
    folder = Path(folder).expanduser()
    if _is_good(folder, size, seed):
        return folder
    images, labels = load_digits(size)
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(2 * len(labels)).reshape(2, -1)
    order, wordings = np.argsort(words[0], kind="stable"), words[1] % len(WORDINGS)
    examples = [
        {"image": _png(image), "caption": caption(label, wording), "label": label}
        for image, label, wording in zip(images[order], labels[order].tolist(), wordings.tolist(), strict=True)
    ]
    draft = atomic.temporary(folder)
    for old in atomic.stale_temporaries(folder.parent, folder.name):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_tfds(draft, examples, size, seed)
        _place(draft, folder, size, seed)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def open_digits(path: str, split: str, image_key: str, caption_key: str, resolution: int) -> captions.ImageCaptions:
    """The digits as `captions.open_tfds` reads them; written first if the folder is not there."""
    write_dataset(path, resolution, seed=0)
    return captions.open_tfds(path, split, image_key, caption_key, resolution)


def _sklearn_digits() -> tuple[Float[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
    """Images in 0 .. 16 and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn (the extra `demo`)") from error
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def _enlarge(image: Float[np.ndarray, "8 8"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """An image in 0 .. 16 -> RGB in 0 .. 255."""
    grey = Image.fromarray((image * (255 / INK)).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.repeat(np.clip(np.rint(np.asarray(grey)), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _write_tfds(folder: Path, examples: list[dict], size: int, seed: int) -> None:
    """Writes one shard and tfds's metadata. Images come encoded: from an array tfds makes a PNG by TensorFlow."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(WORDS)),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="digits", split="train", filetype_suffix="array_record"
    )
    shard = Path(template.sharded_filepath(shard_index=0, num_shards=1))
    serializer = ExampleSerializer(features.get_serialized_info())
    records = [serializer.serialize_example(features.encode_example(example)) for example in examples]
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    identity = DatasetIdentity("digits", tfds.core.Version("1.0.0"), str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=f"Digits of {size} pixels.")
    info.set_file_format("array_record")
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(records)], num_bytes=sum(map(len, records)), filename_template=template
    )
    info.set_splits(SplitDict([split]))
    info.write_to_directory(folder)
    for path in folder.iterdir():
        atomic.sync(path)
    atomic.write_json(folder / STAMP, {"size": size, "seed": seed, "shard": shard.name, "sha256": atomic.sha256(shard)})


def _is_good(folder: Path, size: int, seed: int) -> bool:
    """True if the folder holds these digits, False if it is free; anything else is refused."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    if not (folder / STAMP).is_file():
        raise UserError(f"{folder} is taken by something else than the digits: set --config.data.path to a new folder")
    stamp = atomic.read_json(folder / STAMP)
    for name, value in (("size", size), ("seed", seed)):
        if stamp.get(name) != value:
            raise UserError(f"{folder} holds digits of {name} {stamp.get(name)}, not {value}: set another --config.data.path")
    shard = folder / Path(str(stamp.get("shard"))).name
    if not shard.is_file() or atomic.sha256(shard) != stamp.get("sha256"):
        raise UserError(f"{shard} is damaged: set --config.data.path to a new folder, they are written in seconds")
    return True


def _place(draft: Path, folder: Path, size: int, seed: int) -> None:
    """Renames the finished draft; if another process was faster its folder stands, for it holds the same bytes."""
    try:
        os.rename(draft, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_good(folder, size, seed):
            raise
    atomic.sync(folder.parent)
