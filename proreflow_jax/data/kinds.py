"""The kinds of datasets that a config's block `data` may name, and opening one.

Every kind is random access to {"caption", "image"}, to latents in place of the image, or to captions alone. So the order of
examples, resuming, and any number of processes are the loader's work and the same for all kinds.

A table names each kind's reader, which is imported when a dataset of that kind is opened. A run needs one reader at most.
Some need libraries that take seconds to import (tfds) or may be absent (pyarrow).
"""

from importlib import import_module
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.data.loader import Threaded

TFDS = ("path", "split", "image_key", "caption_key", "resolution")
READERS = {  # kind: (file:function of this folder, the fields of `data` that it takes); in the order that errors list
    "digits": ("digits:open_digits", TFDS),
    "tfds": ("captions:open_tfds", TFDS),
    "webdataset": ("webdataset:open_webdataset", ("path", "caption_key", "cache")),
    "parquet": ("parquet:open_parquet", ("path", "image_key", "caption_key")),
    "folder": ("folder:open_image_folder", ("path", "caption_key")),
    "prompts": ("prompts:Prompts", ("path",)),
    "cached": ("cached:Cached", ("path",)),
    "mixture": ("mixture:open_mixture", ()),
}
IDENTITIES = {  # likewise: the function that tells a dataset from another under the same name
    "tfds": ("captions:tfds_identity", ("path",)),
    "webdataset": ("webdataset:shards_identity", ("path",)),
    "parquet": ("parquet:parquet_identity", ("path",)),
    "folder": ("folder:folder_identity", ("path", "caption_key")),
    "prompts": ("prompts:prompts_identity", ("path",)),
    "cached": ("cached:cache_identity", ("path",)),
}
KINDS = tuple(READERS)
CACHED = "cached"  # latents in place of images
WITHOUT_IMAGES = ("prompts",)
SHARDED = ("webdataset", "parquet", "folder")  # many files, read where they lie; their images are encoded
UNCOUNTED = ("data.max_bad", "data.threads", "data.cache")  # fields that change no example: a resumed run may change them
LATENTS, TEXTS = ("mean", "std"), ("text", "pooled")  # fields of a cached example


def open_data(data: Any) -> Threaded:
    """Opens a dataset: `len`, `[i] -> {"caption": str, "image": uint8 (res, res, 3)}`, `read_many(indices)`.

    Examples of the kind "cached" have latents in place of the image; see `cached.Cached`. Prompts have captions alone.

    Args:
        data: has the fields kind, path, split, image_key, caption_key, resolution, max_bad, threads, cache; see configs.

    Raises: FileNotFoundError or ValueError, one line; see the kinds' own open functions.
    """
    if data.kind in SHARDED and "://" in str(data.path):
        raise UserError(f"{data.path}: --config.data.kind={data.kind} reads files: mount the bucket, or copy it to a disk")
    source = _call(READERS[data.kind], data)
    if data.kind in SHARDED:
        source = _function("images:Pictures")(source, data.resolution)
    if has_images(data):
        source = _function("skip_bad:open_usable")(source, data.max_bad)
    return Threaded(source, data.threads)


def data_identity(data: Any) -> dict[str, str]:
    """One hash that tells a dataset from another under the same name, by its kind; {} for digits, whose bytes their fields fix.

    A prompts file is known by its bytes, a cache by its manifest, shards by their names and sizes, those of tfds by samples of
    their bytes too, a folder by its metadata or its file names. A stage that has begun refuses another dataset: its example
    numbers would mean other examples.
    """
    return _call(IDENTITIES[data.kind], data) if data.kind in IDENTITIES else {}


def is_digits(data: Any) -> bool:
    """Whether the dataset is the digits, which the job itself writes."""
    return data.kind == "digits"


def has_latents(data: Any) -> bool:
    """Whether examples are cached latents."""
    return data.kind == CACHED


def has_images(data: Any) -> bool:
    """Whether examples have images."""
    return data.kind not in (CACHED, *WITHOUT_IMAGES)


def has_captions_alone(data: Any) -> bool:
    """Whether examples are captions and nothing else."""
    return data.kind in WITHOUT_IMAGES


def _call(row: tuple[str, tuple[str, ...]], data: Any) -> Any:
    name, fields = row
    return _function(name)(*(getattr(data, field) for field in fields))


def _function(name: str) -> Any:
    file, function = name.split(":")
    return getattr(import_module(f"proreflow_jax.data.{file}"), function)
