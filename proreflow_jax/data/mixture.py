"""A class-conditional mixture of anisotropic Gaussians: unlimited examples, and moments that are known and not measured."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from proreflow_jax import UserError

SPREAD = 0.6  # of the classes' centres, and of the components around them
AXES = (0.02, 0.6)  # shortest and longest possible standard deviation along a component's own axes


class Mixture(NamedTuple):
    """c classes, equally likely, of k components each in d dimensions; every dimension's mean variance over all is 1."""

    weights: Float[np.ndarray, "c k"]  # of a class's components, adding up to 1
    means: Float[np.ndarray, "c k d"]
    deviations: Float[np.ndarray, "c k d"]  # along the axes
    axes: Float[np.ndarray, "c k d d"]  # orthonormal columns

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.weights)

    @property
    def width(self) -> int:
        """Dimensions of an example."""
        return self.means.shape[-1]


def open_mixture() -> None:
    """Raises UserError: vectors are drawn where they are needed, and no dataset of images lies anywhere."""
    raise UserError("--config.data.kind=mixture is the lab's, which reproduce alone carries out")


def make_mixture(classes: int, components: int, width: int, seed: int) -> Mixture:
    """A mixture whose shape the seed decides."""
    rng = np.random.default_rng(seed)
    shape = (classes, components, width)
    means = SPREAD * (rng.normal(size=(classes, 1, width)) + rng.normal(size=shape))
    deviations = np.exp(rng.uniform(*np.log(AXES), size=shape))
    axes = np.linalg.qr(rng.normal(size=(*shape, width)))[0]
    raw = Mixture(rng.dirichlet(np.full(components, 3.0), size=classes), means, deviations, axes)
    scale = 1 / np.sqrt(np.trace(moments(raw)[1]) / width)
    return raw._replace(means=means * scale, deviations=deviations * scale)


def draw(mixture: Mixture, rng: np.random.Generator, labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
    """One example of each label's class."""
    totals = np.cumsum(mixture.weights, axis=1)[labels]
    parts = (rng.random(len(labels))[:, None] > totals).sum(axis=1).clip(0, totals.shape[1] - 1)
    noise, out = rng.normal(size=(len(labels), mixture.width)), np.empty((len(labels), mixture.width))
    for c, k in np.ndindex(mixture.weights.shape):
        rows = np.flatnonzero((labels == c) & (parts == k))
        out[rows] = mixture.means[c, k] + (noise[rows] * mixture.deviations[c, k]) @ mixture.axes[c, k].T
    return out


def moments(mixture: Mixture) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and covariance of the whole mixture, in closed form."""
    share = mixture.weights / mixture.classes
    mean = np.einsum("ck,ckd->d", share, mixture.means)
    apart = mixture.means - mean
    within = np.einsum("ck,ckij,ckj,cklj->il", share, mixture.axes, mixture.deviations**2, mixture.axes)
    return mean, within + np.einsum("ck,cki,ckj->ij", share, apart, apart)
