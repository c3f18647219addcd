"""FID: images -> features on the mesh -> moments on the host -> one distance.

Features have names, so the CLIP score of the same images is measured in the same pass. The moments of all features lie in one
file, named by a hash of everything they depend on: a stopped measurement resumes, and no two measurements share a file. Nothing
is downloaded here.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree, Shaped, UInt8
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.evaluation import moments
from proreflow_jax.evaluation.frechet import frechet_distance
from proreflow_jax.evaluation.moments import Moments
from proreflow_jax.evaluation.protocols import Protocol
from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic

DIGEST = 16  # hex digits of a hash in a file's name
BATCH = "--config.evaluate.batch"
REAL = "real"  # mask of the rows that are not padding
Rows = dict[str, Shaped[np.ndarray, "n ..."]]  # what the feature networks are given, by name
Features = dict[str, Float[np.ndarray, "_ _"]]  # by name: a row of an image, each name with a width of its own


def prepare_images(image: UInt8[np.ndarray, "h w 3"], protocol: Protocol) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Crop and scale, in that order, as the protocol says; the square in the middle is torchvision's `center_crop`."""
    if protocol.crop == "centre":
        height, width, _ = image.shape
        edge = min(height, width)
        top, left = round((height - edge) / 2), round((width - edge) / 2)
        image = image[top : top + edge, left : left + edge]
    if protocol.size == 0 or image.shape[:2] == (protocol.size, protocol.size):
        return image
    kind = Image.Resampling[protocol.scale.upper()]
    return np.asarray(Image.fromarray(image).resize((protocol.size, protocol.size), kind))


def make_features(apply: Callable[[PyTree, Rows], dict[str, Array]], params: PyTree, mesh: Mesh, batch: int) -> Callable:
    """A function from this process's batches of rows to the features of all processes, in order, on every host.

    Args:
      apply: (params, rows) -> features by name, each (b, d); pure.
      params: its parameters; every device gets all of them.
      mesh: the batch is split over data and fsdp.
      batch: rows at once over all processes, the one shape that is compiled; a smaller batch is filled up, and what
        filled it is left out of the result.

    Returns a function: iterable of {name: array (n, ...)} -> iterator of `Features`.
    Raises ValueError when the batch does not split over the devices.
    """
    mesh_lib.check_split(batch, BATCH, mesh)
    alone = jax.process_count() == 1  # it reads the shards itself; several gather them, each host then adds up the same rows
    out_places = mesh_lib.batch_sharding(mesh) if alone else mesh_lib.replicated(mesh)
    run = jax.jit(partial(_features, apply), out_shardings=out_places)
    placed = jax.device_put(params, mesh_lib.replicated(mesh))
    local = len(mesh_lib.own_rows(mesh, batch))
    start = lambda rows: run(placed, mesh_lib.put_batch(mesh, _filled(rows, local), batch))
    return lambda batches: map(_real_rows, ahead(start, batches))


def _features(apply: Callable, params: PyTree, rows: dict[str, Array]) -> tuple[dict[str, Array], Bool[Array, " b"]]:
    return apply(params, {name: array for name, array in rows.items() if name != REAL}), rows[REAL]


def _filled(rows: Rows, batch: int) -> dict[str, Shaped[np.ndarray, "filled ..."]]:
    count = len(next(iter(rows.values())))
    if count > batch:
        raise UserError(f"a batch of {count} images is larger than {batch}: raise {BATCH}")
    fill = lambda array: np.pad(array, ((0, batch - count), *((0, 0),) * (array.ndim - 1)))
    return {REAL: np.arange(batch) < count} | {name: fill(array) for name, array in rows.items()}


def ahead(run: Callable[[Any], Any], inputs: Iterable) -> Iterator[Any]:
    """What `run` gives for each input, on the host: starts the next before it waits for the one before.

    On CPU it does not, where queued collectives may wait for each other.
    """
    waiting = None
    for each in inputs:
        started = run(each)
        if jax.default_backend() == "cpu":
            jax.block_until_ready(started)
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = started
    if waiting is not None:
        yield jax.device_get(waiting)


def _real_rows(result: tuple[Features, Bool[np.ndarray, " b"]]) -> Features:
    features, real = result
    return {name: rows[real] for name, rows in features.items()}


def images_hash(parts: Iterable[bytes]) -> str:
    """Hex SHA-256 of a set of images, each as the bytes of its file, in their order; where they are cut counts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def facts(protocol: Protocol, networks: Mapping[str, str], images: Any, count: int) -> dict[str, Any]:
    """All that moments depend on.

    Args:
      protocol: of which what touches the images counts.
      networks: digests of the feature networks, by name.
      images: `images_hash` of real ones; of generated ones whatever names them (model's digest, seed, steps, guidance).
      count: how many there are.
    """
    shaping = {field: getattr(protocol, field) for field in ("name", "size", "crop", "scale", "file", "features", "resize")}
    return {"protocol": shaping, "networks": dict(networks), "images": images, "count": count}


def file_stem(about: Mapping[str, Any]) -> str:
    """The name, without its ending, of the files that hold what depends on `about`."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:DIGEST]


def measure_features(
    folder: Path,
    about: Mapping[str, Any],
    widths: Mapping[str, int],
    rows_from: Callable[[int], Iterable[Rows]],
    features: Callable[[Iterable[Rows]], Iterator[Features]],
    every: int = 50,
) -> dict[str, Moments]:
    """The moments of a set of images: from `folder` if they are there, else computed, from where the last run was stopped.

    Args:
      folder: where <hash of about>.safetensors and .json lie, or come to lie; process 0 writes.
      about: of `facts`; its count is how many images are taken.
      widths: of the features, by name.
      rows_from: position -> this process's batches from that image of the set on.
      features: of `make_features`.
      every: batches between two savings.

    Raises ValueError when there are fewer images than the count, or features are not finite.
    """
    stem, count = file_stem(about), int(about["count"])
    path = folder / f"{stem}.safetensors"
    sums = (
        moments.load_moments(path, widths) if path.is_file() else {name: moments.empty(width) for name, width in widths.items()}
    )
    if (position := _position(sums)) >= count:
        return sums
    if writes := jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / f"{stem}.json", dict(about))
    with Progress("measuring", count, "image", position) as progress:
        for done, batch in enumerate(features(rows_from(position)), 1):
            sums = {name: moments.merge_moments(sums[name], _measured(name, batch[name], position, count)) for name in sums}
            before, position = position, _position(sums)
            progress.advance(position - before)
            if writes and (done % every == 0 or position == count):
                moments.save_moments(path, sums)
            if position == count:
                return sums
    raise UserError(f"only {position} images of {count}: give the protocol's images, or another --config.evaluate.protocol")


def _position(sums: Mapping[str, Moments]) -> int:
    return next(iter(sums.values())).count


def _measured(name: str, rows: Float[np.ndarray, "n d"], position: int, count: int) -> Moments:
    """Of the rows that belong to the count."""
    taken = rows[: count - position]
    finite = np.isfinite(taken).all(axis=1)
    if not finite.all():
        raise UserError(f"{name} of image {position + int(np.argmin(finite))} (from 0) is not finite: damaged weights?")
    return moments.moments_of(taken)


def distance(generated: Moments, reference: Moments) -> float:
    """The FID: the Frechet distance between the two Gaussians. Raises ValueError for fewer than two images of either."""
    return frechet_distance(moments.gaussian(generated), moments.gaussian(reference))
