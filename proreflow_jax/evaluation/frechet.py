"""Frechet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6), in float64."""

import numpy as np
from jaxtyping import Array, Float

from proreflow_jax.evaluation.moments import gaussian, moments_of


def moments(
    features: Float[np.ndarray, "n d"] | Float[Array, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and unbiased covariance. Raises ValueError for fewer than two rows."""
    return gaussian(moments_of(features))


def frechet_distance(
    first: tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]],
    second: tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]],
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is taken from the symmetric C1^(1/2) C2 C1^(1/2), so nothing turns complex.
    """
    (m1, c1), (m2, c2) = first, second
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ c2 @ root), 0.0, None)).sum()
    return float(np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2.0 * cross)
