"""Low-rank factors to train instead of whole weights (Hu et al. 2021): one function, `add`, in front of `Network.apply`.

A weight W reads as W + scale * A @ B (eq. 3), where scale = alpha / rank is one number for all layers, also for those whose
own rank is capped. The factors are flat parameters of their own, named as in peft and diffusers; for `X.weight`:

  linear  W (in, out)         X.lora_A.weight (in, r)        X.lora_B.weight (r, out)
  conv    W (h, w, in, out)   X.lora_A.weight (h, w, in, r)  X.lora_B.weight (1, 1, r, out)

so `weights.to_torch` makes torch's factors of them, and `lora_file.to_lora` the layers of a file, without an SVD.
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from proreflow_jax import UserError
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained.weights import TABLE, Shapes, listing

A, B = ".lora_A.weight", ".lora_B.weight"


def _factorable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is a linear or convolution weight; vectors and embedding tables are not."""
    return name.endswith(".weight") and len(shape) in (2, 4) and not TABLE.search(name)


def _matching(weights: Shapes, layers: str) -> list[str]:
    flag = f"--config.student.lora.layers={layers!r}"
    try:
        matched = [name for name in weights if re.search(layers, name)]
    except re.error as error:
        raise UserError(f"{flag} is not a regular expression: {error}") from None
    if not matched:
        raise UserError(f"{flag} matches none of {len(weights)} weights, such as {min(weights, default='')}")
    if factorable := [name for name in matched if _factorable(name, weights[name].shape)]:
        return factorable
    raise UserError(f"{flag} must match linear or convolution weights, and matches {listing('others', matched)[0]}")


def factor_shapes(weights: Shapes, layers: str, rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of the factors; float32.

    Args:
      weights: the network's, from `Network.shapes`.
      layers: a regex, searched in the names; biases, norms and embedding tables that it finds too get no factors.
      rank: of every layer, capped at the layer's full rank min(in, out), of a convolution min(h*w*in, out).

    Raises:
      ValueError: one line, for a rank < 1, or a regex that is none or finds no linear or convolution weight.
    """
    if rank < 1:
        raise UserError(f"--config.student.lora.rank={rank} must be at least 1")
    shapes = {}
    for name in _matching(weights, layers):
        (*head, out), stem = weights[name].shape, name.removesuffix(".weight")
        r = min(rank, math.prod(head), out)
        shapes[stem + A] = jax.ShapeDtypeStruct((*head, r), jnp.float32)
        shapes[stem + B] = jax.ShapeDtypeStruct((*(1 for _ in head[:-1]), r, out), jnp.float32)
    return shapes


def init(weights: Shapes, layers: str, rank: int, key: Key[Array, ""]) -> dict[str, np.ndarray]:
    """Factors to start from, on the host: A normal, B zero, so that the start is the base model (Hu et al. 2021, sec. 4.1).

    A's variance is 1 / (3 fan_in), that of peft's and kohya's uniform draw (Kaiming with a = sqrt 5), so their learning
    rates hold. Numpy draws from the key's bits and the name. Nothing compiles (XLA takes long for hundreds of small ops), and
    a layer starts the same for any choice of other layers. Arguments and errors as of `factor_shapes`.
    """
    seed = [int(word) for word in np.ravel(jax.device_get(jax.random.key_data(key)))]

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(B):
            return np.zeros(shape, np.float32)
        normal = np.random.default_rng([*seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        return normal * np.float32(1 / math.sqrt(3 * math.prod(shape[:-1])))

    return {name: draw(name, struct.shape) for name, struct in factor_shapes(weights, layers, rank).items()}


def scale_of(rank: int, alpha: float) -> float:
    """alpha / rank, alpha = 0 standing for alpha = rank: the `scale` of all layers (peft's `lora_alpha / r`).

    Raises ValueError, one line, if rank < 1 or alpha is negative or not finite.
    """
    if rank < 1:
        raise UserError(f"--config.student.lora.rank={rank} must be at least 1")
    if not 0 <= alpha < math.inf:
        raise UserError(f"--config.student.lora.alpha={alpha} must be 0 (alpha = rank) or a positive number")
    return alpha / rank if alpha else 1.0


def factor_pairs(factors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name of the weight: (A, B)}. Raises ValueError, one line, for names that do not come in such pairs."""
    stems = sorted({name.removesuffix(part) for part in (A, B) for name in factors if name.endswith(part)})
    known = {stem + part for stem in stems for part in (A, B)}
    if problems := [*listing("missing", known - factors.keys()), *listing("unexpected", factors.keys() - known)]:
        raise UserError(f"factors must be pairs of X{A} and X{B}: {'; '.join(problems)}")
    return {f"{stem}.weight": (factors[stem + A], factors[stem + B]) for stem in stems}


def add(base: Params, factors: Params, scale: float) -> Params:
    """base + scale * A @ B where there are factors, the base's own weights elsewhere: what `Network.apply` takes.

    Computed in float32 (also where the device's default is less) and given in the base's dtypes. Gradients reach the
    factors alone. Raises ValueError, one line, if the base lacks a layer or has it in another shape.
    """
    pairs = factor_pairs(factors)
    fits = lambda w, a, b: w.shape == (*a.shape[:-1], b.shape[-1]) and a.shape[-1] == b.shape[-2]
    wrong = [
        f"{n} {base[n].shape} by {a.shape} and {b.shape}"
        for n, (a, b) in pairs.items()
        if n in base and not fits(base[n], a, b)
    ]
    if problems := [*listing("missing in the base", pairs.keys() - base.keys()), *listing("of another shape", wrong)]:
        raise UserError(f"factors are not of this network: {'; '.join(problems)}")

    def weight(value: Array, a: Array, b: Array) -> Array:
        change = jnp.tensordot(a, b.reshape(b.shape[-2:]), 1, precision="highest", preferred_element_type=jnp.float32)
        return (value + scale * change).astype(value.dtype)

    fixed = jax.lax.stop_gradient(base)
    return {name: weight(value, *pairs[name]) if name in pairs else value for name, value in fixed.items()}
