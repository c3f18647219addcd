"""Images with captions from a prepared tfds dataset: random access, plain numpy.

A dataset folder may come from a stranger. Its metadata can name modules that tfds would import and paths outside the
folder. So this file checks the metadata by our own rules first, and takes records as raw bytes. data/images.py checks images
and captions. TensorFlow is not needed.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2
from tensorflow_datasets.proto import tf_example_pb2

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import record_file
from proreflow_jax.data.images import (
    Unusable,
    check_index,
    check_resolution,
    decode_image,
    first_caption,
)
from proreflow_jax.storage import atomic

SAMPLE = 1 << 16  # bytes at either end of a shard by which it is known
_FEATURES = "tensorflow_datasets.core.features."
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TEMPLATE = re.compile(r"(?:[A-Za-z0-9._-]|\{(?:DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*")


class ImageCaptions:
    """`source[i] -> {"image": uint8 (res, res, 3), "caption": str}`, with the image's first caption.

    `source[i, j]` takes its caption j, modulo the number it has.

    Args:
        records: random access to serialized tf.Example bytes.
        name: the dataset's folder, for messages.
        image_key: the feature with the encoded image.
        caption_key: the feature with the text; a path such as "captions/text" reaches into a sequence.
        resolution: side of the square in pixels.

    Raises (when an example is taken): Unusable naming the record if its image or caption is not good, ValueError if the
    record itself is damaged.
    """

    def __init__(self, records: Any, name: str, image_key: str, caption_key: str, resolution: int) -> None:
        self._records, self.name = records, name
        self._image_key, self._caption_key, self._resolution = image_key, caption_key, resolution

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, choice = index if isinstance(index, tuple) else (index, 0)
        check_index(index, len(self))
        try:
            feature = tf_example_pb2.Example.FromString(self._records[index]).features.feature
            captions = feature[self._caption_key].bytes_list.value
            if not captions:
                raise Unusable(f"no text under {self._caption_key!r}, see --config.data.caption_key")
            image = decode_image(b"".join(feature[self._image_key].bytes_list.value[:1]), self._resolution)
            return {"image": image, "caption": first_caption(captions[choice % len(captions)])}
        except (RuntimeError, ValueError) as error:  # ArrayRecord reports damage as RuntimeError
            kind = Unusable if isinstance(error, Unusable) else UserError
            raise kind(f"{self.name} (--config.data.path), record {index}: {atomic.one_line(error)}") from error


def open_tfds(path: str | os.PathLike, split: str, image_key: str, caption_key: str, resolution: int) -> ImageCaptions:
    """Opens one split of a dataset that tfds prepared as ArrayRecord.

    Args:
        path: a folder with dataset_info.json, features.json and the shards; local or mounted, e.g.
            ~/tensorflow_datasets/coco_captions/2014/1.1.0.
        split: as in tfds: "train", "train[:1%]".
        image_key, caption_key, resolution: see `ImageCaptions`.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        ValueError: metadata that is broken or reaches outside, no such split or feature, a short shard.
    """
    folder = Path(path).expanduser()
    check_resolution(resolution)
    check_metadata(folder)
    try:
        builder = tfds.builder_from_directory(folder)
        features, shards = builder.info.features, builder.info.splits[split].file_instructions
        records = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except Exception as error:  # whatever tfds makes of a folder, the user reads one line
        why = f"{type(error).__name__}: {atomic.one_line(error)}"
        raise UserError(f"{folder} (--config.data.path) has no good {split!r} (--config.data.split): {why}") from error
    _check_keys(folder, features, image_key, caption_key)
    for shard in shards:
        _check_shard(Path(shard.filename), shard.examples_in_shard)
    return ImageCaptions(records, str(folder), image_key, caption_key, resolution)


def tfds_identity(path: str | os.PathLike) -> dict[str, str]:
    """The hash of a prepared folder's metadata and of its shards' names, sizes, first and last bytes.

    A folder that was prepared anew has another order of examples, hence other bytes. Raises as `check_metadata`.
    """
    folder = Path(path).expanduser()
    check_metadata(folder)
    facts: list[Any] = [atomic.sha256(folder / name) for name in ("dataset_info.json", "features.json")]
    facts += [[shard.name, *_sample(shard)] for shard in sorted(folder.glob("*.array_record*"))]
    return {"tfds": atomic.json_digest(facts)}


def _sample(path: Path) -> tuple[int, str]:
    """(size, hash of the first and last bytes) of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(SAMPLE)
        file.seek(max(size - SAMPLE, 0))
        ends += file.read(SAMPLE)
    return size, hashlib.sha256(ends).hexdigest()


# --- a stranger's folder ----------------------------------------------------------------------------------------------


def check_metadata(folder: str | os.PathLike) -> None:
    """Refuses a tfds folder with metadata that names foreign modules or outside paths. tfds has read nothing by then.

    Raises:
        FileNotFoundError: no such folder, or no prepared dataset in it.
        ValueError: broken metadata, a foreign module, a name with a path in it, or shards that are not ArrayRecord.
    """
    folder = Path(folder)
    for name in ("dataset_info.json", "features.json"):
        if not (folder / name).is_file():
            raise MissingFile(f"{folder / name} is missing: --config.data.path must name a folder tfds prepared")
    _check_features(folder / "features.json", atomic.read_json(folder / "features.json"))
    path = folder / "dataset_info.json"
    try:
        info = json_format.ParseDict(atomic.read_json(path), dataset_info_pb2.DatasetInfo())
    except json_format.ParseError as error:
        raise UserError(f"{path} is not tfds metadata ({atomic.one_line(error)}): see --config.data.path") from error
    names = [info.name, info.file_format, *info.alternative_file_formats, *(split.name for split in info.splits)]
    for name in names:
        _check_name(path, name)
    for split in info.splits:
        if not _TEMPLATE.fullmatch(split.filepath_template) or ".." in split.filepath_template:
            raise UserError(f"{path} has the file name {split.filepath_template!r}, which may lead outside: refused")
    if "array_record" not in (info.file_format, *info.alternative_file_formats):
        mend = "prepare it with `tfds build --file_format=array_record` (see --config.data.path)"
        raise UserError(f"{path} says the shards are {info.file_format or 'tfrecord'}, not array_record: {mend}")


def _check_features(path: Path, value: Any) -> None:
    """Walks features.json: tfds imports the module a `pythonClassName` (or an old file's `type`) names."""
    if isinstance(value, list):
        for item in value:
            _check_features(path, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if ".." in key or key.startswith(("/", "~")) or "\\" in key or not key.isprintable():
                raise UserError(f"{path} has a feature named {key!r}, which may lead outside the folder: refused")
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(item, str):
                if not item.startswith(_FEATURES) or not _NAME.fullmatch(item):
                    raise UserError(f"{path} names the foreign module {item!r} (only {_FEATURES}* may be): refused")
            _check_features(path, item)


def _check_name(path: Path, name: str) -> None:
    if name and (not _NAME.fullmatch(name) or ".." in name):
        raise UserError(f"{path} has the name {name!r}, only letters, digits, . _ - are taken: refused")


def _check_keys(folder: Path, features: Any, image_key: str, caption_key: str) -> None:
    """Compares the two keys with the dataset's flat feature names, and checks the features' kinds."""
    flat = _flatten(features)
    for flag, key in (("image_key", image_key), ("caption_key", caption_key)):
        if key not in flat:
            raise UserError(f"{folder} has no feature {key!r}, it has {sorted(flat)}: set --config.data.{flag}")
    image, caption = flat[image_key], flat[caption_key]
    if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype) != np.uint8:
        raise UserError(f"{folder}: {image_key!r} is {_kind(image)}, not an 8-bit image: set --config.data.image_key")
    if not isinstance(caption, tfds.features.Text):
        raise UserError(f"{folder}: {caption_key!r} is {_kind(caption)}, not text: set --config.data.caption_key")


def _flatten(feature: Any, prefix: str = "") -> dict[str, Any]:
    """{path: feature} of a feature tree; a sequence is transparent, as it is in the serialized records."""
    if isinstance(feature, tfds.features.Sequence):
        return _flatten(feature.feature, prefix)
    if isinstance(feature, tfds.features.FeaturesDict):
        below = (_flatten(item, f"{prefix}/{name}" if prefix else name) for name, item in feature.items())
        return {path: item for flat in below for path, item in flat.items()}
    return {prefix: feature}


def _kind(feature: Any) -> str:
    return f"{type(feature).__name__} of {feature.np_dtype}" if hasattr(feature, "np_dtype") else type(feature).__name__


def _check_shard(path: Path, count: int) -> None:
    if not path.is_file():
        raise MissingFile(f"{path} is missing although dataset_info.json counts it: see --config.data.path")
    if (records := record_file.count_records(path)) != count:
        raise UserError(f"{path} holds {records} examples where dataset_info.json says {count}: see --config.data.path")
