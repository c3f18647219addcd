"""Attention for a TPU whose heads are narrower than its 128 lanes: tokens lie in lanes, a head's width in sublanes.

So a head of 64 stays 64 in memory, in the projections around it and in four of the seven products; with its width in lanes, as
Pallas' splash attention has it, all of them are filled up to 128. Scores are made transposed, (keys, queries): maxima and sums
run over sublanes, and no block of scores is ever turned around. Softmax is in powers of 2.

A sequence may lie in several arrays (image, text): they see each other, and nothing is put side by side in memory. One grid
step holds one head of one row whole in VMEM, forward and backward; the backward makes all gradients of it. The projections'
biases and the norms of queries and keys belong to the kernel: around it each is a pass over memory, and so are their gradients.

Scores that are known to be small need no maximum (`SMALL`), without which the matrix unit waits less: 30 % of the forward.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from proreflow_jax.models.layers import ATTENTION

LANES = 128  # tokens of every array come in multiples of it
SUBLANES = 16  # and widths of heads of this, the height of bfloat16's tiles
MOST = 9 * 1024  # tokens of a head of 64 that lie in VMEM whole, forward and backward
MEMORY = 48 << 20  # bytes of VMEM that a kernel may take
BLOCK = 1024  # keys and queries of a block of scores at most
HIDDEN = -(2.0**15)  # bias of a key that nobody sees: 2 to its power is 0
SMALL = 96.0  # of any score: 2 to the power of it, and the sum of MOST of them, are floats
EPSILON = 1e-6  # of the norms
Parts = tuple[Float[Array, "b h d _"], ...]
Columns = tuple[Float[Array, "h d 1"], ...]  # in float32, of every head


class Layers(NamedTuple):
    """What belongs to the projections of every part's queries, keys and values."""

    biases: Columns  # of queries, keys, values: three times as many as parts
    norms: Columns  # weights of the RMS norms of queries, then keys: twice as many as parts; (): none


class Part(NamedTuple):
    """One array of the sequence."""

    tokens: int  # true ones, from the first lane on
    last: int = 1  # equal tokens that the last one stands for


class Setting(NamedTuple):
    """What a kernel is compiled for."""

    parts: tuple[Part, ...]
    interpret: bool  # off TPU


def fits(width: int, tokens: int) -> bool:
    """Whether heads of this width and a sequence of so many tokens are the kernel's."""
    return width % SUBLANES == 0 and width <= LANES and (tokens + 2 * LANES) * max(width, 64) <= MOST * 64


def filled(tokens: int) -> int:
    """Tokens in whole lanes."""
    return -(-tokens // LANES) * LANES


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> Parts:
    """Softmax attention of all parts over all parts, each (b, h, d, s) of whole lanes; the same shapes.

    q, k, v: projections without their biases. What lies behind a part's tokens is seen by nobody, and comes out as anything
    finite. Scores and softmax are in float32.
    """
    return _forward(q, k, v, layers, setting)[0]


def _forward(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> tuple[Parts, tuple[Array, ...]]:
    n, rows = len(q), [jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), jnp.float32) for x in q]
    scratch = [pltpu.VMEM(x.shape[2:], x.dtype) for x in (*q, *k, *v)]
    body, outputs = partial(_forward_body, setting.parts), [*q, *rows]
    out = _call(body, "narrow_mha_fwd", [*q, *k, *v], layers, outputs, scratch=scratch, interpret=setting.interpret)
    return tuple(out[:n]), tuple(out[n:])


def _keep(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> tuple[Parts, Any]:
    out, sums = jax.tree.map(lambda x: checkpoint_name(x, ATTENTION), _forward(q, k, v, layers, setting))
    return out, (q, k, v, layers, out, sums)


def _gradients(setting: Setting, kept: Any, gradient: Parts) -> tuple[Parts, Parts, Parts, Layers]:
    q, k, v, layers, out, sums = kept
    n, inputs = len(q), [*q, *k, *v, *out, *gradient, *sums]
    columns = [jax.ShapeDtypeStruct((len(q[0]), *w.shape), jnp.float32) for w in jax.tree.leaves(layers)]
    scratch = [pltpu.VMEM(x.shape[2:], x.dtype) for x in (*q, *k, *v)]
    scratch += [pltpu.VMEM((size, x.shape[3]), jnp.float32) for size in (q[0].shape[2], 1) for x in q]
    body, outputs = partial(_backward_body, setting.parts), [*q, *k, *v, *columns]
    results = _call(body, "narrow_mha_bwd", inputs, layers, outputs, scratch=scratch, interpret=setting.interpret)
    dq, dk, dv = (tuple(results[i * n : i * n + n]) for i in range(3))
    return dq, dk, dv, jax.tree.unflatten(jax.tree.structure(layers), [x.sum(axis=0) for x in results[3 * n :]])


attend.defvjp(_keep, _gradients)


def _call(
    body: Callable[..., None],
    name: str,
    inputs: list[Any],
    layers: Layers,
    outputs: list[Any],
    *,
    scratch: list[Any],
    interpret: bool,
) -> Sequence[Any]:
    """A kernel with one head of one row a grid step."""
    own = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h: (b, h, 0, 0))
    column = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b, h: (h, 0, 0))
    columns = jax.tree.leaves(layers)
    return pl.pallas_call(
        partial(body, len(layers.norms) > 0),
        grid=inputs[0].shape[:2],
        in_specs=[*map(own, inputs), *map(column, columns)],
        out_specs=[*map(own, outputs)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY),
        interpret=interpret,
        name=name,
    )(*inputs, *columns)


def _forward_body(parts: tuple[Part, ...], normed: bool, *refs: Any) -> None:
    """refs: q, k, v, `Layers`; outputs, logarithms of the sums; scratch: q, k, v as they are used. Of each every part's."""
    n = len(parts)
    q, k, v, *rest = _grouped(refs, n)
    out, sums, query, key, value = rest[3 + 2 * normed :]
    width = q[0].shape[0]
    _prepare((q, k, v), rest, normed, (query, key, value))

    def block(i: int, small: bool, at: Any) -> None:
        one = lambda rows, value: jnp.full((rows, at.size), value, jnp.float32)
        carry: Any = one(1, 0.0 if small else HIDDEN), one(1, 0.0), one(width, 0.0)
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

    small = jnp.sqrt(_longest(query) * _longest(key)) < SMALL
    pl.when(small)(partial(run, True))
    pl.when(jnp.logical_not(small))(partial(run, False))


def _add(scores: Array, value: Array, most: Array, total: Array, found: Array) -> tuple[Array, Array, Array]:
    """(largest score, sum of weights, weighted sum of values) of queries, with one more block of keys."""
    larger = jnp.maximum(most, scores.max(axis=0, keepdims=True))
    weights, shrunk = jnp.exp2(scores - larger), jnp.exp2(most - larger)
    product = _dot(value, weights.astype(value.dtype), 1, 0)
    return larger, shrunk * total + weights.sum(axis=0, keepdims=True), shrunk * found + product


def _add_small(scores: Array, value: Array, most: Array, total: Array, found: Array) -> tuple[Array, Array, Array]:
    """The same of scores that are SMALL: weights are their powers as they are."""
    weights = jnp.exp2(scores)
    return most, total + weights.sum(axis=0, keepdims=True), found + _dot(value, weights.astype(value.dtype), 1, 0)


def _longest(parts: tuple[Any, ...]) -> Float[Array, ""]:
    """The largest sum of squares of a token."""
    squares = [jnp.square(x[...].astype(jnp.float32)).sum(axis=0, keepdims=True).max() for x in parts]
    return squares[0] if len(squares) == 1 else jnp.maximum(*squares)


def _backward_body(parts: tuple[Part, ...], normed: bool, *refs: Any) -> None:
    """refs: q, k, v, outputs, their gradients, logarithms of the sums, `Layers`; gradients of q, k, v, `Layers`; scratch: q,
    k, v as they are used, gradient of q in float32, sums of outputs times their gradients. Of each every part's.
    """
    n, columns = len(parts), 3 + 2 * normed
    q, k, v, out, gradient, sums, *rest = _grouped(refs, n)
    dq, dk, dv, *found_columns = rest[columns : 2 * columns + 3]
    query, key, value, found, inner = rest[2 * columns + 3 :]
    width, dtype = q[0].shape[0], q[0].dtype
    norms = rest[3:columns] if normed else ((None,) * n,) * 2
    _prepare((q, k, v), rest, normed, (query, key, value))
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
        before, weight = _unnormed(carry[0] * math.log(2), k[j][:, here], rest[1][j], norms[1][j], 1.0)
        dk[j][:, here], dv[j][:, here] = before.astype(dtype), carry[1].astype(dtype)
        return of_key + _total(before), of_value + _total(carry[1]), of_weight + weight

    nothing = (jnp.zeros((width, 1), jnp.float32),) * 3
    sums_of = [_over(k[j].shape[1], partial(block, j), nothing) for j in range(n)]
    for j, (of_key, of_value, of_key_norm) in enumerate(sums_of):
        before, of_query_norm = _unnormed(found[j][...] * math.log(2), q[j][...], rest[0][j], norms[0][j], _scale(width))
        dq[j][...] = before.astype(dtype)
        found_of_part = _total(before), of_key, of_value, of_query_norm, of_key_norm
        for column, value_of in zip(found_columns, found_of_part, strict=False):
            column[j][...] = value_of


def _prepare(raw: Any, columns: Any, normed: bool, used: Any) -> None:
    """Queries, keys and values with their biases, through their norms, queries scaled: each part's into `used`."""
    width = raw[0][0].shape[0]
    for i, scale in enumerate((_scale(width), 1.0, None)):
        for j, x in enumerate(raw[i]):
            weight = columns[3 + i][j] if normed and scale is not None else None
            used[i][j][...] = _normed(x[...], columns[i][j], weight, scale or 1.0).astype(x.dtype)


def _total(x: Array) -> Float[Array, "d 1"]:
    return x.sum(axis=1, keepdims=True)


def _scale(width: int) -> float:
    """Softmax's, in powers of 2."""
    return width**-0.5 / math.log(2)


def _normed(x: Array, bias: Any, weight: Any, scale: float) -> Array:
    """x + bias through its norm, times scale, in float32; without a weight there is no norm."""
    x = x.astype(jnp.float32) + bias[...]
    return x * scale if weight is None else x * _root(x) * (weight[...] * scale)


def _unnormed(gradient: Array, x: Array, bias: Any, weight: Any, scale: float) -> tuple[Array, Any]:
    """The gradients of x and the weight (d, 1), 0.0 without one, by that of `_normed`."""
    gradient = gradient * scale
    if weight is None:
        return gradient, 0.0
    x = x.astype(jnp.float32) + bias[...]
    root = _root(x)
    unit, of_unit = x * root, gradient * weight[...]
    return root * (of_unit - unit * (of_unit * unit).mean(axis=0, keepdims=True)), _total(gradient * unit)


def _root(x: Array) -> Array:
    return lax.rsqrt(jnp.square(x).mean(axis=0, keepdims=True) + EPSILON)


def _grouped(refs: tuple[Any, ...], count: int) -> Iterator[tuple[Any, ...]]:
    return (refs[i : i + count] for i in range(0, len(refs), count))


def _over(tokens: int, step: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """step(lanes, first token, carry) over equal blocks of at most BLOCK tokens."""
    size = max(size for size in range(LANES, BLOCK + 1, LANES) if tokens % size == 0)
    if size == tokens:
        return step(pl.ds(0, size), 0, carry)
    one = lambda n, carry: step(pl.ds(pl.multiple_of(n * size, size), size), n * size, carry)
    return lax.fori_loop(0, tokens // size, one, carry)


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
