"""The networks that judge images, on every device: FID's Inception and, if the config names one, CLIP.

Both judge a batch in one call. Real images have no prompts here, so only Inception judges them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from proreflow_jax import UserError
from proreflow_jax.evaluation import clip_score, fid
from proreflow_jax.evaluation.protocols import Protocol
from proreflow_jax.models import inception
from proreflow_jax.models.inception import MEND, NAME, UNUSED, make_inception
from proreflow_jax.models.network import Network, Params
from proreflow_jax.pretrained import config_fields, weights
from proreflow_jax.pretrained.weights import Shapes
from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.digest import digest, fold

HostParams = dict[str, np.ndarray]  # {our name: array}, not on a device
FID, CLIP = "inception", "clip"  # names of the features


class Judge(NamedTuple):
    """The networks that judge batches of images.

    features: batches of rows -> features, as of `fid.make_features`.
    rows: (images, prompts) -> rows with both networks' features; (images,) -> with FID's alone. Images are uint8, prepared
      by `fid.prepare_images`: (n, h, w, 3).
    widths: of the features, by name.
    digests: of the networks' weights, by name.
    clip: name of the CLIP score's network; "": there is none.
    """

    features: Callable[..., Iterator[fid.Features]]
    rows: Callable[..., fid.Rows]
    widths: dict[str, int]
    digests: dict[str, str]
    clip: str


def feature_network(path: Path, resize: str) -> tuple[Network, HostParams]:
    """FID's network and its weights. Raises ValueError, one line, for a file that is not it."""
    return inception.make_inception(resize), read_inception(path)


def judge_shapes(clip: Path | None) -> dict[str, Shapes]:
    """Shapes of the networks' weights as `make_judge` puts them on every device; of CLIP's folder only config.json is read."""
    shapes = {FID: make_inception().shapes}
    if clip:
        _, text, image = clip_score.outline_clip(clip)
        shapes[CLIP] = {**text.shapes, **image.shapes}
    return shapes


def make_judge(path: Path, clip: Path | None, protocol: Protocol, mesh: Mesh, batch: int) -> Judge:
    """Reads the networks and puts them on every device.

    Args:
      path: of FID's network, .safetensors.
      clip: folder of the CLIP score's network; None: no CLIP score.
      protocol: by which images are prepared.
      mesh, batch: as of `fid.make_features`.

    Raises FileNotFoundError or ValueError, one line, for files that are not these networks.
    """
    network, weights = feature_network(path, protocol.resize)
    params = {FID: weights}
    picture = jax.ShapeDtypeStruct((1, protocol.size, protocol.size, 3), np.uint8)
    widths = {FID: jax.eval_shape(network.apply, weights, picture).shape[-1]}
    loaded = clip_score.load_clip(clip) if clip else None
    if loaded:
        encode = clip_score.read_tokenizer(clip).encode
        scores, side = clip_score.make_scores(loaded.text, loaded.image), loaded.image.config["image_size"]
        params[CLIP], widths[CLIP] = loaded.params, 1
    params = jax.device_put(params, mesh_lib.replicated(mesh))

    def apply(params: dict[str, Params], rows: dict[str, Array]) -> dict[str, Array]:
        features = {FID: network.apply(params[FID], rows["images"])}
        return features | ({CLIP: scores(params[CLIP], rows["seen"], rows["ids"])[:, None]} if "ids" in rows else {})

    def rows(images: UInt8[np.ndarray, "n h w 3"], prompts: Sequence[str] = ()) -> dict[str, Any]:
        clip_rows = {"seen": clip_score.prepare_clip(images, side), "ids": encode(prompts)} if loaded and prompts else {}
        return {"images": images} | clip_rows

    digests = {name: fold(digest(part)) for name, part in params.items()}
    features = fid.make_features(apply, params, mesh, batch)
    return Judge(features, rows, widths, digests, loaded.name if loaded else "")


def read_inception(path: Path) -> HostParams:
    """The network's parameters from a .safetensors file of the published weights, float32 on the host.

    Raises ValueError, one line, when the file is unreadable or names, shapes or numbers do not fit.
    """
    try:
        tensors = weights.Tensors([path])
        used = {name: tensors[name] for name in tensors if not name.endswith(UNUSED)}
        return weights.from_torch(used, make_inception().shapes, str(path))
    except UserError as error:
        text = str(error).replace("its config.json", NAME)
        for advice in (config_fields.DAMAGED, f"{weights.TWO_MODELS}, {config_fields.MEND}", config_fields.MEND):
            text = text.removesuffix(f": {advice}")
        raise UserError(f"{text}: {MEND}") from None
