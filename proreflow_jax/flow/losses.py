"""How far a velocity is from its target: one number per example, in at least float32; only the step averages."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-24  # a squared norm below this counts as zero; its power -3/2, needed by the gradient, fits in float32


def squared_error(v: Float[Array, "b *d"], target: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """Mean over all entries of (v - target)^2, (b,)."""
    return jnp.mean(jnp.square(_flat(v) - _flat(target)), axis=1)


def cosine(v: Float[Array, "b *d"], target: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """Cosine of the angle between v and target, each example taken as one long vector; (b,), in [-1, 1].

    A zero vector has cosine 0 with everything, and gradient 0.
    """
    v, target = _flat(v), _flat(target)
    return jnp.sum(_unit(v) * _unit(target), axis=1)


def direction_weight(target: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """2 mean(target^2), (b,): the alpha at which 1 - cosine weighs as much as direction does in the squared error already.

    For |v| = r |target| the squared error is mean(target^2) [(r - 1)^2 + 2 r (1 - cosine)], magnitude and direction apart.
    So alpha in units of this weight has no scale: 1 counts errors of direction twice, whatever velocities are measured in.
    """
    return 2 * squared_error(target, jnp.zeros_like(target))


def pseudo_huber(error: Float[Array, "b"], delta: float) -> Float[Array, "b"]:
    """Mean squared errors (b,), bent: as they are far below delta^2, growing like 2 delta times their root far above.

    2 delta^2 (sqrt(1 + error / delta^2) - 1), without its cancellation; Rectified Diffusion trains with such a loss (Wang et
    al. 2024).
    """
    return 2 * error / (1 + jnp.sqrt(1 + error / delta**2))


def relative_error(v: Float[Array, "b *d"], target: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """|v - target| / |target|, (b,). A zero target counts as one of norm 1e-12."""
    v, target = _flat(v), _flat(target)
    return jnp.sqrt(jnp.sum(jnp.square(v - target), axis=1) / jnp.maximum(jnp.sum(jnp.square(target), axis=1), _TINY))


def _flat(x: Float[Array, "b *d"]) -> Float[Array, "b n"]:
    """Each example as one vector of at least float32."""
    return x.reshape(x.shape[0], -1).astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(x: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Each row divided by its norm; a zero row stays zero, without a division that a gradient could find."""
    square = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    zero = square < _TINY
    return jnp.where(zero, 0.0, x / jnp.sqrt(jnp.where(zero, 1.0, square)))
