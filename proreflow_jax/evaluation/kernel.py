"""Kernel distance between two sets of features: the squared maximum mean discrepancy with KID's kernel, times 1000.

k(x, y) = (x.y / d + 1)^3 over features of width d (Binkowski et al. 2018, sec. 4). Estimates are unbiased, so they may lie
below zero; a few hundred pictures a side suffice, where a Frechet distance over the same features wants thousands. KID itself
rests on Inception; over other features the number is a kernel distance and is named with its features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from proreflow_jax import UserError

SCALE = 1000.0
PARTS = 5  # disjoint parts of a pair of sets, whose spread gives the standard error
LEAST = 10  # pictures a side: two in each part

Features = Float[np.ndarray, "n d"]


class Estimate(NamedTuple):
    """A kernel distance of one pair of sets, and the standard error of the mean over PARTS disjoint parts of them."""

    value: float
    error: float


def polynomial_kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """(x.y / d + 1)^3 of every row of x with every row of y, float64."""
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3


def kernel_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], paired: bool = False) -> float:
    """The unbiased estimate, times 1000.

    Args:
      x, y: features of independent pictures, one a row; or, if `paired`, x[i] and y[i] of the same prompt.
      paired: leaves k(x[i], y[i]) out (Gretton et al. 2012, eq. 4): unbiased for pairs that depend on each other, and what the
        prompts show falls out of the difference.

    Raises ValueError for fewer than two rows, or pairs that do not match.
    """
    n, m = len(x), len(y)
    if n < 2 or m < 2 or (paired and n != m):
        raise UserError(f"a kernel distance of {n} and {m} pictures: raise --config.evaluate.examples")
    own = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    across = polynomial_kernel(x, y)
    between = own(across) if paired else across.mean()
    return SCALE * float(own(polynomial_kernel(x, x)) + own(polynomial_kernel(y, y)) - 2 * between)


def estimate_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], paired: bool = False) -> Estimate:
    """The distance with its standard error over PARTS disjoint parts, a little too large, as parts are small sets.

    Raises ValueError for fewer than LEAST rows.
    """
    if min(len(x), len(y)) < LEAST:
        raise UserError(f"{len(x)} and {len(y)} pictures give no spread: raise --config.evaluate.examples to {LEAST} or more")
    parts = [kernel_distance(x[i::PARTS], y[i::PARTS], paired) for i in range(PARTS)]
    return Estimate(kernel_distance(x, y, paired), float(np.std(parts, ddof=1) / np.sqrt(PARTS)))
