"""One grid step of `narrow_kernel`: one head of one row, whole in VMEM. See there for what lies where.

Arrays of a part are (d, s): its tokens in lanes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LANES = 128  # of a TPU's registers: tokens of every array come in multiples of it
BLOCK = 1024  # keys and queries of a block of scores at most
HIDDEN = -(2.0**15)  # bias of a key that nobody sees: 2 to its power is 0
SMALL = 96.0  # of any score: 2 to the power of it, and the sum of those of all tokens that fit, are floats
EPSILON = 1e-6  # of the norms


def block(tokens: int, most: int) -> int:
    """The largest block of whole lanes up to `most` that divides the tokens; 0: none."""
    return max((size for size in range(LANES, most + 1, LANES) if tokens % size == 0), default=0)


class Part(NamedTuple):
    """One array of the sequence."""

    tokens: int  # true ones, from the first lane on
    last: int = 1  # equal tokens that the last one stands for


def forward(parts: tuple[Part, ...], layered: tuple[bool, bool], *refs: Any) -> None:
    """refs: q, k, v, `Layers`; outputs, logarithms of the sums; scratch of `_prepare`. Of each every part's."""
    n = len(parts)
    q, k, v, *rest = _grouped(refs, n)
    biases, norms, (out, sums, *scratch) = _layers(rest, layered, n)
    width = q[0].shape[0]
    query, key, value = _prepare((q, k, v), biases, norms, scratch)

    def block(i: int, small: bool, at: Any) -> None:
        one = lambda rows, value: jnp.full((rows, at.size), value, jnp.float32)
        carry: Any = (one(1, 0.0 if small else HIDDEN), one(1, 0.0), one(width, 0.0)) if _in_blocks(k[0].shape[1]) else ()
        here_q = query[i][:, at]

        def step(j: int, here: Any, start: Any, carry: Any) -> Any:
            scores = _dot(key[j][:, here], here_q, 0, 0) + _bias(parts[j], k[j].shape[1], here.size, start)
            return (_add_small if small else _add)(scores, value[j][:, here], *carry)

        for j in range(n):
            carry = _over(k[j].shape[1], partial(step, j), carry)
        most, total, found = carry
        out[i][:, at] = (found / total).astype(out[i].dtype)
        sums[i][:, at] = most + jnp.log2(total)

    def run(small: bool) -> None:
        for i in range(n):
            _over(q[i].shape[1], lambda at, _, carry, i=i: (block(i, small, at), carry)[1], ())

    if sum(x.shape[1] for x in key) <= LANES:  # to learn whether scores are small would take longer than it spares
        run(False)
    else:
        small = jnp.sqrt(_longest(query) * _longest(key)) < SMALL
        pl.when(small)(partial(run, True))
        pl.when(jnp.logical_not(small))(partial(run, False))


def _add(scores: Array, value: Array, *before: Array) -> tuple[Array, Array, Array]:
    """(largest score, sum of weights, weighted sum of values) of queries, with one more block of keys; before: of the rest."""
    largest = scores.max(axis=0, keepdims=True)
    if not before:
        weights = jnp.exp2(scores - largest)
        return largest, weights.sum(axis=0, keepdims=True), _dot(value, weights.astype(value.dtype), 1, 0)
    most, total, found = before
    larger = jnp.maximum(most, largest)
    weights, shrunk = jnp.exp2(scores - larger), jnp.exp2(most - larger)
    product = _dot(value, weights.astype(value.dtype), 1, 0)
    return larger, shrunk * total + weights.sum(axis=0, keepdims=True), shrunk * found + product


def _add_small(scores: Array, value: Array, *before: Array) -> tuple[Array, Array, Array]:
    """The same of scores that are SMALL: weights are their powers as they are."""
    weights = jnp.exp2(scores)
    total, found = weights.sum(axis=0, keepdims=True), _dot(value, weights.astype(value.dtype), 1, 0)
    return (before[0], before[1] + total, before[2] + found) if before else (jnp.zeros_like(total), total, found)


def _longest(parts: tuple[Any, ...]) -> Float[Array, ""]:
    """The largest sum of squares of a token."""

    def of_part(x: Any) -> Float[Array, ""]:
        squares = lambda at: jnp.square(x[:, at].astype(jnp.float32)).sum(axis=0, keepdims=True)
        if not _in_blocks(x.shape[1]):
            return squares(slice(None)).max()
        nothing = jnp.zeros((1, block(x.shape[1], BLOCK)), jnp.float32)
        return _over(x.shape[1], lambda at, _, most: jnp.maximum(most, squares(at)), nothing).max()

    squares = list(map(of_part, parts))
    return squares[0] if len(squares) == 1 else jnp.maximum(*squares)


def backward(parts: tuple[Part, ...], layered: tuple[bool, bool], *refs: Any) -> None:
    """refs: q, k, v, outputs, their gradients, logarithms of the sums, `Layers`; gradients of q, k, v, `Layers`; scratch:
    gradient of q in float32, sums of outputs times their gradients, scratch of `_prepare`. Of each every part's.
    """
    n = len(parts)
    q, k, v, out, gradient, sums, *rest = _grouped(refs, n)
    biases, norms, (dq, dk, dv, *rest) = _layers(rest, layered, n)
    of_biases, of_norms, (found, inner, *scratch) = _layers(rest, layered, n)
    width, dtype = q[0].shape[0], q[0].dtype
    query_scale, key_scale = scales(q, k)
    query, key, value = _prepare((q, k, v), biases, norms, scratch)
    for i in range(n):
        product = out[i][...].astype(jnp.float32) * gradient[i][...].astype(jnp.float32)
        inner[i][...] = product.sum(axis=0, keepdims=True)
        found[i][...] = jnp.zeros(found[i].shape, jnp.float32)

    def block(j: int, here: Any, start: Any, sums_so_far: Any) -> Any:
        of_key, of_value, of_weight = sums_so_far
        one, other_value = key[j][:, here], value[j][:, here]
        bias = _bias(parts[j], k[j].shape[1], here.size, start)

        def step(i: int, at: Any, _: Any, carry: Any) -> Any:
            keys, values = carry
            other, grad = query[i][:, at], gradient[i][:, at]
            weights = jnp.exp2(_dot(one, other, 0, 0) + bias - sums[i][:, at])
            values += _dot(grad, weights.astype(dtype), 1, 1)
            of_scores = (weights * (_dot(other_value, grad, 0, 0) - inner[i][:, at])).astype(dtype)
            found[i][:, at] += _dot(one, of_scores, 1, 0)
            return keys + _dot(other, of_scores, 1, 1), values

        carry: Any = (jnp.zeros((width, here.size), jnp.float32),) * 2
        for i in range(n):
            carry = _over(q[i].shape[1], partial(step, i), carry)
        before, weight = _unnormed(carry[0] * math.log(2), k[j][:, here], biases[1][j], norms[1][j], key_scale)
        dk[j][:, here], dv[j][:, here] = before.astype(dtype), carry[1].astype(dtype)
        return of_key + _total(before), of_value + _total(carry[1]), of_weight + weight

    nothing = (jnp.zeros((width, 1), jnp.float32),) * 3
    sums_of = [_over(k[j].shape[1], partial(block, j), nothing) for j in range(n)]
    for j, (of_key, of_value, of_key_norm) in enumerate(sums_of):
        before, of_query_norm = _unnormed(found[j][...] * math.log(2), q[j][...], biases[0][j], norms[0][j], query_scale)
        dq[j][...] = before.astype(dtype)
        found_of_part = _total(before), of_key, of_value, of_query_norm, of_key_norm
        for column, value_of in zip((*of_biases, *of_norms[:2]), found_of_part, strict=True):
            if column[j] is not None:
                column[j][...] = value_of


def _layers(refs: Sequence[Any], layered: tuple[bool, bool], count: int) -> tuple[Any, Any, Sequence[Any]]:
    """(biases of queries, keys, values, their norms' weights, the rest) of groups of refs; None in the place of what is not."""
    nothing, (biased, normed) = [(None,) * count], layered
    biases = refs[:3] if biased else 3 * nothing
    norms = refs[3 * biased : 3 * biased + 2] if normed else 2 * nothing
    return biases, [*norms, *nothing], refs[3 * biased + 2 * normed :]


def _prepare(raw: Any, biases: Any, norms: Any, scratch: Sequence[Any]) -> list[Any]:
    """Queries, keys and values with their biases, through their norms, and scaled: in scratch where that changes them."""
    room, used = iter(scratch), []
    for i, scale in enumerate((*scales(*raw[:2]), 1.0)):
        changed = scale != 1 or biases[i][0] is not None or norms[i][0] is not None
        used.append(next(room) if changed else raw[i])
        for x, bias, weight, to in zip(raw[i], biases[i], norms[i], used[i], strict=True) if changed else ():
            to[...] = _normed(x[...], bias, weight, scale).astype(x.dtype)
    return used


def _total(x: Array) -> Float[Array, "d 1"]:
    return x.sum(axis=1, keepdims=True)


def scales(q: Sequence[Any], k: Sequence[Any]) -> tuple[float, float]:
    """Factors of queries and of keys, (.., d, s) of every part: softmax's scale, in powers of 2, lies on the fewer tokens."""
    scale = q[0].shape[-2] ** -0.5 / math.log(2)
    queries, keys = (sum(x.shape[-1] for x in side) for side in (q, k))
    return (scale, 1.0) if queries <= keys else (1.0, scale)


def _normed(x: Array, bias: Any, weight: Any, scale: float) -> Array:
    """x + bias through its norm, times scale, in float32; without a weight there is no norm."""
    x = x.astype(jnp.float32) + (0.0 if bias is None else bias[...])
    return x * scale if weight is None else x * _root(x) * (weight[...] * scale)


def _unnormed(gradient: Array, x: Array, bias: Any, weight: Any, scale: float) -> tuple[Array, Any]:
    """The gradients of x and the weight (d, 1), 0.0 without one, by that of `_normed`."""
    gradient = gradient * scale
    if weight is None:
        return gradient, 0.0
    x = x.astype(jnp.float32) + (0.0 if bias is None else bias[...])
    root = _root(x)
    unit, of_unit = x * root, gradient * weight[...]
    return root * (of_unit - unit * (of_unit * unit).mean(axis=0, keepdims=True)), _total(gradient * unit)


def _root(x: Array) -> Array:
    return lax.rsqrt(jnp.square(x).mean(axis=0, keepdims=True) + EPSILON)


def _grouped(refs: tuple[Any, ...], count: int) -> Iterator[tuple[Any, ...]]:
    return (refs[i : i + count] for i in range(0, len(refs), count))


def _over(tokens: int, step: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """step(lanes, first token, carry) over equal blocks of at most BLOCK tokens; fewer than LANES are one block."""
    if not _in_blocks(tokens):
        return step(pl.ds(0, tokens), 0, carry)
    size = block(tokens, BLOCK)
    one = lambda n, carry: step(pl.ds(pl.multiple_of(n * size, size), size), n * size, carry)
    return lax.fori_loop(0, tokens // size, one, carry)


def _in_blocks(tokens: int) -> bool:
    """Whether so many are more than one block."""
    return block(tokens, BLOCK) not in (0, tokens)


def _bias(part: Part, tokens: int, size: int, start: Any) -> Any:
    """What is added to the scores of a block of keys from token `start` on, (size, 1); 0.0 where that is nothing."""
    if part.tokens == tokens and part.last == 1:
        return 0.0
    token = start + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    last = jnp.where(token == part.tokens - 1, math.log2(part.last), 0.0)
    return jnp.where(token < part.tokens, last, HIDDEN)


def _dot(a: Array, b: Array, left: int, right: int) -> Array:
    """The product over one axis of each, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((left,), (right,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
