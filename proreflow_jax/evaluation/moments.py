"""Mean and covariance of features that arrive in batches, in float64 on the host; mergeable, and saved in a file.

The scatter is the sum of outer products of deviations from the mean. Sums of the features' own products would lose digits if
the mean is large against the spread (Chan, Golub and LeVeque 1983, eq. 2.1).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.pretrained import weights
from proreflow_jax.storage import paths
from proreflow_jax.storage.atomic import drafted

DIGEST = "sha256"  # in a file of moments, beside them
AGAIN = "move it aside and evaluate again"  # of a file whose sums are lost


class Moments(NamedTuple):
    """Count, mean and scatter of feature vectors, float64; scatter is the sum of outer products of deviations from the mean."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


def empty(width: int) -> Moments:
    """Moments of no vectors."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


def moments_of(features: Float[np.ndarray, "n d"] | Float[Array, "n d"]) -> Moments:
    """Moments of one batch, which may be empty."""
    rows = np.asarray(features, np.float64)
    if not len(rows):
        return empty(rows.shape[1])
    mean = rows.mean(axis=0)
    return Moments(len(rows), mean, (rows - mean).T @ (rows - mean))


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Moments of both sets together; the order of merging does not matter."""
    count = first.count + second.count
    if count == 0:
        return first
    apart, share = second.mean - first.mean, second.count / count
    scatter = first.scatter + second.scatter + np.outer(apart, apart) * (first.count * share)
    return Moments(count, first.mean + apart * share, scatter)


def gaussian(moments: Moments) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and unbiased covariance, as `frechet.frechet_distance` takes them. Raises ValueError for fewer than two."""
    if moments.count < 2:
        raise UserError(f"{moments.count} examples have no covariance: raise --config.evaluate.examples")
    return moments.mean, moments.scatter / (moments.count - 1)


def save_moments(path: Path, parts: Mapping[str, Moments]) -> None:
    """Writes moments by name into one .safetensors file; a reader, or a kill, sees the old one or the new one whole."""
    tensors = {f"{name}.{field}": np.asarray(value) for name, part in parts.items() for field, value in part._asdict().items()}
    with drafted(path) as draft:
        weights.save_tensors(draft, tensors | {DIGEST: _digest(tensors)})


def _digest(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of the numbers by name, as 32 bytes."""
    rows = b"".join(name.encode() + np.asarray(tensors[name]).tobytes() for name in sorted(tensors))
    return np.frombuffer(hashlib.sha256(rows).digest(), np.uint8)


def load_moments(path: Path, widths: Mapping[str, int]) -> dict[str, Moments]:
    """Reads a file of `save_moments`, with features of these widths. Raises ValueError, one line, for any other file."""
    try:
        tensors = dict(weights.Tensors([paths.local_copy(path)], kinds=("I64", "F64", "U8")))
    except ValueError:
        raise UserError(f"{path} is not a readable safetensors file: {AGAIN}") from None
    expected = {f"{name}.{field}": value for name, d in widths.items() for field, value in empty(d)._asdict().items()}
    stored = tensors.pop(DIGEST, None)
    kinds = lambda tensors: {name: (np.shape(value), np.asarray(value).dtype) for name, value in tensors.items()}
    if kinds(tensors) != kinds(expected):
        listed = ", ".join(f"{width} {name}" for name, width in widths.items())
        raise UserError(f"{path} does not hold moments of {listed}: {AGAIN}")
    if not np.array_equal(stored, _digest(tensors)):
        raise UserError(f"{path} holds other numbers than were written: {AGAIN}")
    return {
        name: Moments(int(tensors[f"{name}.count"]), tensors[f"{name}.mean"], tensors[f"{name}.scatter"]) for name in widths
    }
