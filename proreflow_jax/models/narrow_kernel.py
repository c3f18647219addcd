"""Attention for a TPU whose heads are narrower than its 128 lanes: tokens lie in lanes, a head's width in sublanes.

So a head of 64 stays 64 in memory, in the projections around it and in four of the seven products; with its width in lanes, as
Pallas' splash attention has it, all of them are filled up to 128. Scores are made transposed, (keys, queries): maxima and sums
run over sublanes, and no block of scores is ever turned around. Softmax is in powers of 2.

A sequence may lie in several arrays (image, text): they see each other, and nothing is put side by side in memory. Queries may
be of another sequence than keys and values: cross-attention. One grid step holds one head of one row whole in VMEM, forward and
backward; the backward makes all gradients of it. The projections' biases and the norms of queries and keys belong to the
kernel: around it each is a pass over memory, and so are their gradients.

Scores that are known to be small need no maximum (`SMALL`), without which the matrix unit waits less: 17 to 34 % of the
forward.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from proreflow_jax.models import narrow_body
from proreflow_jax.models.layers import ATTENTION
from proreflow_jax.models.narrow_body import BLOCK, LANES, Part, block

SUBLANES = 8  # widths of heads come in multiples of it
PACKED = 16  # rows of a register of bfloat16
MOST = 2 * (9 * BLOCK + 2 * LANES) * 64  # bytes of a head that lie in VMEM whole, forward and backward
MEMORY = 48 << 20  # bytes of VMEM that a kernel may take
Parts = tuple[Float[Array, "b h d _"], ...]
Columns = tuple[Float[Array, "h d 1"], ...]  # in float32, of every head


class Layers(NamedTuple):
    """What belongs to the projections of every part's queries, keys and values."""

    biases: Columns = ()  # of queries, keys, values: three times as many as parts; (): none
    norms: Columns = ()  # weights of the RMS norms of queries, then keys: twice as many as parts; (): none


class Setting(NamedTuple):
    """What a kernel is compiled for."""

    parts: tuple[Part, ...]  # of the keys and values
    interpret: bool  # off TPU


def fits(width: int, tokens: int, dtype: Any) -> bool:
    """Whether heads of this width and a sequence of so many tokens, in two parts at most, are the kernel's."""
    size = (filled(tokens) + 2 * LANES) * max(width, 64) * jnp.dtype(dtype).itemsize
    return width % SUBLANES == 0 and width <= LANES and size <= MOST


def filled(tokens: int) -> int:
    """The least number of tokens in whole lanes that has few blocks."""
    lanes = -(-tokens // LANES)
    return next(n for n in itertools.count(lanes * LANES, LANES) if block(n, BLOCK) >= min(n, BLOCK // 2))


def fill(x: Float[Array, "b s c"]) -> Float[Array, "b _ c"]:
    """So many tokens, zeros behind the true ones."""
    return _fill(x, filled(x.shape[1]))


def fill_keys(x: Float[Array, "b s c"]) -> Float[Array, "b _ c"]:
    """The same of what queries of another sequence see: few tokens fill whole rows of scores alone, not lanes."""
    tokens = x.shape[1]
    return _fill(x, -(-tokens // PACKED) * PACKED if tokens < LANES else filled(tokens))


def _fill(x: Array, tokens: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> Parts:
    """Softmax attention of all parts over all parts, each (b, h, d, s) of whole lanes; the shapes of q.

    q, k, v: projections without their biases; queries may be of another sequence, of other lengths than `setting.parts`, which
    are those of the keys. What lies behind a part's tokens is seen by nobody, and comes out as anything finite. Scores and
    softmax are in float32.
    """
    return _forward(q, k, v, layers, setting)[0]


def _forward(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> tuple[Parts, tuple[Array, ...]]:
    n, rows = len(q), [jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), jnp.float32) for x in q]
    body, outputs, scratch = partial(narrow_body.forward, setting.parts), [*q, *rows], _changed(q, k, v, layers)
    out = _call(body, "narrow_mha_fwd", [*q, *k, *v], layers, outputs, scratch=scratch, interpret=setting.interpret)
    return tuple(out[:n]), tuple(out[n:])


def _keep(q: Parts, k: Parts, v: Parts, layers: Layers, setting: Setting) -> tuple[Parts, Any]:
    out, sums = jax.tree.map(lambda x: checkpoint_name(x, ATTENTION), _forward(q, k, v, layers, setting))
    return out, (q, k, v, layers, out, sums)


def _gradients(setting: Setting, kept: Any, gradient: Parts) -> tuple[Parts, Parts, Parts, Layers]:
    q, k, v, layers, out, sums = kept
    n, inputs = len(q), [*q, *k, *v, *out, *gradient, *sums]
    columns = [jax.ShapeDtypeStruct((len(q[0]), *w.shape), jnp.float32) for w in jax.tree.leaves(layers)]
    scratch = [pltpu.VMEM((size, x.shape[3]), jnp.float32) for size in (q[0].shape[2], 1) for x in q]
    scratch += _changed(q, k, v, layers)
    body, outputs = partial(narrow_body.backward, setting.parts), [*q, *k, *v, *columns]
    results = _call(body, "narrow_mha_bwd", inputs, layers, outputs, scratch=scratch, interpret=setting.interpret)
    dq, dk, dv = (tuple(results[i * n : i * n + n]) for i in range(3))
    return dq, dk, dv, jax.tree.unflatten(jax.tree.structure(layers), [x.sum(axis=0) for x in results[3 * n :]])


attend.defvjp(_keep, _gradients)


def _changed(q: Parts, k: Parts, v: Parts, layers: Layers) -> list[Any]:
    """Room for what is not used as it comes: queries or keys are scaled at least."""
    query_scale, key_scale = narrow_body.scales(q, k)
    layered = len(layers.biases) + len(layers.norms) > 0
    changed = [*(q if query_scale != 1 or layered else ()), *(k if key_scale != 1 or layered else ())]
    changed += v if layers.biases else ()
    return [pltpu.VMEM(x.shape[2:], x.dtype) for x in changed]


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
        partial(body, (len(layers.biases) > 0, len(layers.norms) > 0)),
        grid=inputs[0].shape[:2],
        in_specs=[*map(own, inputs), *map(column, columns)],
        out_specs=[*map(own, outputs)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=MEMORY),
        interpret=interpret,
        name=name,
    )(*inputs, *columns)
