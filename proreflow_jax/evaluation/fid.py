"""FID by named protocols: images -> features on the mesh -> moments on the host -> one distance, with what it rests on.

An FID without its protocol says nothing: the count, the resize, the crop and the reference each move it by more than methods
differ. So a protocol is a row of a table, moments lie in files named by a hash of all they depend on, and the sentence that
states a number states the rest with it. Nothing is downloaded here.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from proreflow_jax.evaluation import moments
from proreflow_jax.evaluation.classifier import FEATURES
from proreflow_jax.evaluation.frechet import frechet_distance
from proreflow_jax.evaluation.moments import Moments
from proreflow_jax.models.inception import NAME
from proreflow_jax.models.network import Network, Params
from proreflow_jax.runtime import files
from proreflow_jax.runtime import mesh as mesh_lib

DIGEST = 16  # hex digits of a hash in a file's name


class Protocol(NamedTuple):
    """What an FID depends on beside the model. Both sets are cropped and scaled alike, then resized for the feature network."""

    name: str
    prompts: str  # which captions, one image each
    reference: str  # the real images
    count: int  # generated images
    size: int  # pixels that both sets are scaled to; 0: left as they are
    crop: str  # "centre": the largest square in the middle; "none"
    scale: str  # PIL's filter from there to `size`: "lanczos", "bicubic" or "none"
    file: str  # how generated images are kept before they are judged
    features: str  # the feature network
    resize: str  # into the feature network: a name of models.inception.RESIZES, or "none"
    guidance: float
    seeds: tuple[int, ...]
    steps: tuple[int, ...]


PROTOCOLS = {
    row.name: row
    for row in (
        Protocol(
            name="coco2014-30k",
            prompts="30,000 captions of val2014, drawn without replacement by seed 0",  # standard; the draw is our choice
            reference="val2014, all 40,504 images",  # GigaGAN's evaluation
            count=30_000,  # standard
            size=256,  # standard, also for models that draw 512
            crop="centre",  # GigaGAN's evaluation
            scale="lanczos",  # GigaGAN's evaluation
            file="png",  # standard; JPEG alone moves an FID
            features=NAME,  # standard
            resize="clean",  # GigaGAN's evaluation (it runs clean-fid); others use "tf1" or "torch": compare like with like
            guidance=4.0,  # our choice: the paper sweeps 2 to 7 and names 4 in its ablation only
            seeds=(0, 1, 2),  # our choice: the paper names none
            steps=(2, 4),  # the paper's table
        ),
        Protocol(
            name="coco2017-5k",
            prompts="the first caption of each image of val2017, by image id",  # our choice: the paper does not say which of 5
            reference="val2017, all 5,000 images",  # standard
            count=5_000,  # standard
            size=512,  # our choice: what SD 1.5 draws
            crop="centre",  # our choice
            scale="lanczos",  # our choice
            file="png",  # our choice
            features=NAME,  # standard
            resize="torch",  # our choice: pytorch-fid's
            guidance=4.0,  # the paper's ablation
            seeds=(0, 1, 2),  # our choice: effects below one FID need several
            steps=(2, 4),  # the paper's table
        ),
        Protocol(
            name="digits",
            prompts="ten captions in turn, ten wordings",  # all of it is our choice
            reference="scikit-learn's digits, all 1,797",
            count=1_000,
            size=0,
            crop="none",
            scale="none",
            file="none",
            features=FEATURES,  # not Inception: digits are no photographs
            resize="none",  # to 8x8 by the mean of cells, see data/digits.py
            guidance=1.0,
            seeds=(0, 1, 2),
            steps=(1, 2, 4, 8),
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The row of that name. Raises ValueError, which lists them."""
    if name not in PROTOCOLS:
        raise ValueError(f"--config.evaluate.protocol={name} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def prepare(image: UInt8[np.ndarray, "h w 3"], protocol: Protocol) -> UInt8[np.ndarray, "h2 w2 3"]:
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


def make_features(network: Network, params: Params, mesh: Mesh, batch: int) -> Callable[[Iterable], Iterator]:
    """A function from this process's batches of images to the features of all processes, in order, on every host.

    Args:
      network: of `models.inception.make_inception`, or any other with apply(params, images) -> (b, d).
      params: its parameters; every device gets all of them.
      mesh: the batch is split over data and fsdp.
      batch: images at once over all processes, the one shape that is compiled; a smaller batch is filled up, and what
        filled it is left out of the result.

    Raises ValueError when the batch does not split over the devices.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % ways:
        raise ValueError(f"--config.evaluate.batch={batch} must be a positive multiple of {ways} devices (data x fsdp)")
    alone = jax.process_count() == 1  # it reads the shards itself; several gather them, each host then adds up the same rows
    kept = mesh_lib.batch_sharding(mesh) if alone else mesh_lib.replicated(mesh)
    run = jax.jit(partial(_features, network), out_shardings=kept)
    placed = jax.device_put(params, mesh_lib.replicated(mesh))
    local = batch // jax.process_count()
    return lambda batches: _ahead(lambda images: run(placed, mesh_lib.put_batch(mesh, _filled(images, local))), batches)


def _features(network: Network, params: Params, rows: dict[str, Array]) -> tuple[Float[Array, "b d"], Bool[Array, " b"]]:
    return network.apply(params, rows["images"]), rows["real"]


def _filled(images: UInt8[np.ndarray, "n h w 3"], batch: int) -> dict[str, np.ndarray]:
    missing = batch - len(images)
    if missing < 0:
        raise ValueError(f"a batch of {len(images)} images is larger than {batch}: raise --config.evaluate.batch")
    return {"images": np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))), "real": np.arange(batch) < len(images)}


def _ahead(run: Callable[[Any], tuple], batches: Iterable) -> Iterator[Float[np.ndarray, "n d"]]:
    """Starts a batch before it waits for the one before; on CPU not, where queued collectives may wait for each other."""
    waiting = None
    for images in batches:
        started = run(images)
        if jax.default_backend() == "cpu":
            jax.block_until_ready(started)
        if waiting is not None:
            yield _real_rows(waiting)
        waiting = started
    if waiting is not None:
        yield _real_rows(waiting)


def _real_rows(result: tuple[Float[Array, "b d"], Bool[Array, " b"]]) -> Float[np.ndarray, "n d"]:
    features, real = jax.device_get(result)
    return features[real]


def digest(params: Mapping[str, Any]) -> str:
    """Hex SHA-256 of parameters: names, shapes, types and bytes, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name])
        total.update(f"{name} {value.shape} {value.dtype} ".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def images_hash(parts: Iterable[bytes]) -> str:
    """Hex SHA-256 of a set of images, each as the bytes of its file, in their order; where they are cut counts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def facts(protocol: Protocol, weights: str, images: str, count: int) -> dict[str, Any]:
    """All that moments depend on.

    Args:
      protocol: of which what touches the images counts.
      weights: `digest` of the feature network.
      images: `images_hash` of real ones; of generated ones whatever names them (model's digest, seed, steps, guidance).
      count: how many there are.
    """
    shaping = {field: getattr(protocol, field) for field in ("name", "size", "crop", "scale", "file", "features", "resize")}
    return {"protocol": shaping, "weights": weights, "images": images, "count": count}


def measure(
    folder: Path,
    about: Mapping[str, Any],
    width: int,
    images_from: Callable[[int], Iterable],
    features: Callable,
    every: int = 50,
) -> Moments:
    """The moments of a set of images: from `folder` if they are there, else computed, from where the last run was stopped.

    Args:
      folder: where <hash of about>.safetensors and .json lie, or come to lie; process 0 writes.
      about: of `facts`; its count is how many images are taken.
      width: of the features.
      images_from: position -> this process's batches of uint8 images from that image of the set on.
      features: of `make_features`.
      every: batches between two savings.

    Raises ValueError when there are fewer images than the count.
    """
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:DIGEST]
    path, count = folder / f"{key}.safetensors", int(about["count"])
    seen = moments.load(path, width) if path.is_file() else moments.empty(width)
    if seen.count >= count:
        return seen
    if writes := jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / f"{key}.json", dict(about))
    for done, rows in enumerate(features(images_from(seen.count)), 1):
        seen = moments.merge(seen, moments.measured(rows[: count - seen.count]))
        if writes and (done % every == 0 or seen.count == count):
            moments.save(path, seen)
        if seen.count == count:
            return seen
    raise ValueError(f"only {seen.count} images of {count}: give the protocol's images, or another --config.evaluate.protocol")


def distance(generated: Moments, reference: Moments) -> float:
    """The FID: the Frechet distance between the two Gaussians. Raises ValueError for fewer than two images of either."""
    return frechet_distance(moments.gaussian(generated), moments.gaussian(reference))


def statement(protocol: Protocol, scores: Mapping[int, float], steps: int, count: int, guidance: float) -> str:
    """The number in one sentence with its protocol, its seeds and its spread, and where the protocol was not kept.

    Args:
      protocol: by which it was measured.
      scores: {seed: FID}.
      steps: of the sampler.
      count: images per seed.
      guidance: scale.

    Raises ValueError without a score.
    """
    if not scores:
        raise ValueError("no seed was measured: set --config.evaluate.seeds")
    values, seeds = np.array(list(scores.values())), ", ".join(map(str, scores))
    spread = f"+- {values.std(ddof=1):.2f} (seeds {seeds})" if len(values) > 1 else f"(seed {seeds} only, spread unknown)"
    said = {"images": (count, protocol.count), "guidance": (guidance, protocol.guidance)}
    odd = [f"{what} {found:g} instead of {rule:g}" for what, (found, rule) in said.items() if found != rule]
    rest = f"{protocol.name}, {steps} steps, {count:,} images, guidance {guidance:g}, {protocol.features}"
    return "; ".join([f"FID {values.mean():.2f} {spread}", rest, *(f"not the protocol's: {line}" for line in odd)])
