"""Mean and covariance of features that arrive in batches, in float64 on the host: mergeable, and kept in a file between runs.

What is kept is the sum of outer products of deviations from the mean, not of the features themselves: those lose their digits
where the mean is large against the spread (Chan, Golub and LeVeque 1983, eq. 2.1).
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from proreflow_jax.models import weights


class Moments(NamedTuple):
    """Of `count` feature vectors: their mean, and the sum of outer products of what they deviate from it, float64."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


def empty(width: int) -> Moments:
    """Of no vectors yet."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


def measured(features: Float[np.ndarray, "n d"]) -> Moments:
    """Of one batch, of no rows too."""
    rows = np.asarray(features, np.float64)
    if not len(rows):
        return empty(rows.shape[1])
    mean = rows.mean(axis=0)
    return Moments(len(rows), mean, (rows - mean).T @ (rows - mean))


def merge(first: Moments, second: Moments) -> Moments:
    """Of both sets together; shards of a set may be merged in any order."""
    count = first.count + second.count
    if count == 0:
        return first
    apart, share = second.mean - first.mean, second.count / count
    scatter = first.scatter + second.scatter + np.outer(apart, apart) * (first.count * share)
    return Moments(count, first.mean + apart * share, scatter)


def gaussian(moments: Moments) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and unbiased covariance, as `frechet.frechet_distance` takes them. Raises ValueError for fewer than two."""
    if moments.count < 2:
        raise ValueError(f"{moments.count} examples have no covariance: raise --config.evaluate.examples")
    return moments.mean, moments.scatter / (moments.count - 1)


def save(path: Path, moments: Moments) -> None:
    """Writes a .safetensors file; a reader, or a kill, sees the old one or the new one whole."""
    writing = path.with_name(f".{path.name}.writing")
    count = np.array([moments.count], np.int64)
    weights.save_tensors(writing, {"count": count, "mean": moments.mean, "scatter": moments.scatter})
    os.replace(writing, path)


def load(path: Path, width: int) -> Moments:
    """What `save` wrote, of features of this width. Raises ValueError, one line, when it is something else."""
    try:
        found = dict(weights.Tensors([path]))
    except ValueError:
        raise ValueError(f"{path} is not a readable safetensors file: delete it and evaluate again") from None
    shapes = {name: (array.shape, array.dtype) for name, array in found.items()}
    wide, narrow = ((width, width), np.float64), ((width,), np.float64)
    if shapes != {"count": ((1,), np.int64), "mean": narrow, "scatter": wide}:
        raise ValueError(f"{path} does not hold moments of {width} features: delete it and evaluate again")
    return Moments(int(found["count"][0]), found["mean"], found["scatter"])
