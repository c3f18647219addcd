"""Sliced Wasserstein distance of two sets of vectors (Rabin et al. 2011): W2 in one dimension is a matter of sorting."""

import numpy as np
from jaxtyping import Float

DIRECTIONS = 128


def project(x: Float[np.ndarray, "n d"], seed: int = 3) -> Float[np.ndarray, "n m"]:
    """The set along the fixed directions, each column sorted."""
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], DIRECTIONS))
    return np.sort(x @ (directions / np.linalg.norm(directions, axis=0)), axis=0)


def sliced_distance(first: Float[np.ndarray, "n m"], second: Float[np.ndarray, "n m"]) -> float:
    """Root of the mean squared W2 over directions, of two equally large sets as `project` gives them."""
    return float(np.sqrt(np.mean((first - second) ** 2)))
