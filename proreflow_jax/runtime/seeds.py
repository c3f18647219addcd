"""Seeds of 64 bits as jax's keys: without x64, jax.random.key keeps the lower 32 bits and drops the rest in silence."""

import jax
import numpy as np
from jaxtyping import Array, Key

LARGEST = 2**64 - 1  # that UIs give


def seed_key(seed: int) -> Key[Array, ""]:
    """The key that jax makes of a seed in 0 .. LARGEST where it computes in 64 bits; below 2**32 everywhere the same."""
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))
