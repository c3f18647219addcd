"""The block `data` of a config -> a source of images and captions, or of captions alone, that is read by threads.

Every kind is random access to the same thing, {"caption", "image"}, or what was computed of it: so the order of examples,
resuming, and any number of processes are the loader's alone and the same for all kinds.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.data import cached, captions, digits
from proreflow_jax.data.folder import METADATA, open_image_folder
from proreflow_jax.data.images import Pictures
from proreflow_jax.data.parquet import open_parquet
from proreflow_jax.data.skip_bad import Threaded, Usable, probe
from proreflow_jax.data.webdataset import find_shards, open_webdataset
from proreflow_jax.storage import atomic

KINDS = ("digits", "tfds", "webdataset", "parquet", "folder", "prompts", "cached")
CACHED = "cached"  # latents in place of images
WITHOUT_IMAGES = ("prompts",)
SHARDED = ("webdataset", "parquet", "folder")  # many files, read where they lie
UNCOUNTED = ("data.max_bad", "data.threads", "data.cache")  # fields that change no example: a resumed run may change them


def open_data(data: Any) -> Threaded:
    """Opens what the block names: `len`, `[i] -> {"caption": str, "image": uint8 (res, res, 3)}`, `read_many(indices)`.

    Of the kind "cached" the items have no image; see `cached.Cached`.

    Args:
        data: has the fields kind, path, split, image_key, caption_key, resolution, max_bad, threads, cache; see configs.

    Raises: FileNotFoundError or ValueError, one line; see the kinds' own open functions.
    """
    if data.kind == "prompts":
        return Threaded(captions.Prompts(data.path), data.threads)
    if data.kind == CACHED:
        return Threaded(cached.Cached(data.path), data.threads)
    pictures = _pictures(data)
    probe(pictures)
    return Threaded(Usable(pictures, data.max_bad), data.threads)


def _pictures(data: Any) -> Any:
    """The source of a kind with images, as it is: what is not good raises Unusable."""
    if data.kind == "digits":
        digits.write_dataset(data.path, data.resolution, seed=0)
    if data.kind in ("digits", "tfds"):
        return captions.open_tfds(data.path, data.split, data.image_key, data.caption_key, data.resolution)
    if "://" in str(data.path):
        raise UserError(f"{data.path}: --config.data.kind={data.kind} reads files: mount the bucket, or copy it to a disk")
    openers = {
        "webdataset": lambda: open_webdataset(data.path, data.caption_key, data.cache),
        "parquet": lambda: open_parquet(data.path, data.image_key, data.caption_key),
        "folder": lambda: open_image_folder(data.path, data.caption_key),
    }
    return Pictures(openers[data.kind](), data.resolution)


def data_identity(data: Any) -> dict[str, str]:
    """What tells a dataset from another under the same name: {} for tfds and digits, else one hash, by its kind.

    Of a prompts file its bytes; of a cache its manifest; of shards their names and sizes; of a folder its metadata, or the
    names in it. A stage that is under way refuses another: the numbers of its examples would mean others.
    """
    if data.kind == "prompts":
        return {"prompts": atomic.sha256(Path(data.path))}
    if data.kind == CACHED:
        return cached.cache_identity(data.path)
    if data.kind in ("webdataset", "parquet"):
        shards = find_shards(data.path, ".tar" if data.kind == "webdataset" else ".parquet")
        return {"shards": _hash([[shard.name, shard.stat().st_size] for shard in shards])}
    if data.kind == "folder":
        folder = Path(data.path).expanduser()
        held = [atomic.sha256(folder / name) for name in METADATA if (folder / name).is_file()]
        return {"folder": _hash(held or open_image_folder(data.path, data.caption_key).names)}
    return {}


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
