"""Features of pictures by a network that others trained, EfficientNet-lite0, whose weights come with the package."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from proreflow_jax.evaluation import fid
from proreflow_jax.models.efficientnet import FEATURES, NAME, make_efficientnet
from proreflow_jax.pretrained import weights
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import sealed

WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "efficientnet_lite0" / "model.safetensors"


class PictureFeatures(NamedTuple):
    """A feature network on every device."""

    run: Callable[..., Iterator[fid.Features]]  # of `fid.make_features`
    batch: int
    digest: str  # of the weights and the size they see

    def of(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
        """The features of pictures, float32."""
        rows = ({"images": images[i : i + self.batch]} for i in range(0, len(images), self.batch))
        parts = [part[NAME] for part in self.run(rows)]
        return np.concatenate(parts) if parts else np.zeros((0, FEATURES), np.float32)


def read_efficientnet(path: Path = WEIGHTS) -> dict[str, np.ndarray]:
    """The network's parameters, float32. Raises UserError, one line, for a file that is not it, or not as it was written."""
    sealed.check_undamaged(path.parent, sealed.read_record(path.parent), "install the package again")
    return weights.from_torch(weights.Tensors([path]), make_efficientnet(1).shapes, str(path))


def make_picture_features(size: int, mesh: Mesh, batch: int) -> PictureFeatures:
    """The network, which sees pictures of any size at `size` pixels a side. batch: pictures at once; splits over the mesh."""
    network, params = make_efficientnet(size), read_efficientnet()
    apply = lambda params, rows: {NAME: network.apply(params, rows["images"])}
    return PictureFeatures(fid.make_features(apply, params, mesh, batch), batch, f"{fold(digest(params))}-{size}")
