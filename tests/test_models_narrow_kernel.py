"""The kernel for narrow heads is whole attention behind its norms, forward and backward, however large the scores are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_attention_kernels import draw, near, with_gradients
from torch_reference import quick_jit

from proreflow_jax.models import narrow_kernel
from proreflow_jax.models.narrow_kernel import EPSILON, Layers, Part, Setting

HEADS, WIDTH = 2, 16
PARTS, LANES = (Part(250), Part(20, 7)), (256, 128)  # an image and a text whose last token counts as 7


def whole(q: Any, k: Any, v: Any, layers: Layers) -> jax.Array:
    """The same by whole scores, without what lies behind the tokens."""
    biased = [x + bias for x, bias in zip((*q, *k, *v), layers.biases, strict=True)]
    unit = lambda x, weight: x * jax.lax.rsqrt(jnp.square(x).mean(2, keepdims=True) + EPSILON) * weight
    biased[:4] = [unit(x, weight) for x, weight in zip(biased, layers.norms, strict=False)] or biased[:4]
    q, k, v = (cut(biased[i : i + 2]) for i in (0, 2, 4))
    weights = jax.nn.softmax(jnp.einsum("bhdq,bhdk->bhqk", q, k) * WIDTH**-0.5 + np.log([1.0] * 269 + [7.0]), -1)
    return jnp.einsum("bhqk,bhdk->bhdq", weights, v)


def cut(parts: Any) -> jax.Array:
    return jnp.concatenate([x[..., : part.tokens] for x, part in zip(parts, PARTS, strict=True)], -1)


@pytest.mark.parametrize(("normed", "size"), [(True, 1.0), (False, 1.0), (False, 40.0)])  # the last beyond SMALL
def test_it_is_whole_attention_with_gradients_of_all_that_it_reads(monkeypatch, normed, size):
    monkeypatch.setattr(narrow_kernel, "BLOCK", 128)
    each = lambda seed, factor=1.0: tuple(factor * draw(1, HEADS, WIDTH, s, seed=seed + s) for s in LANES)
    columns = [draw(HEADS, WIDTH, 1, seed=seed) for seed in range(10)]
    layers = Layers(tuple(columns[:6]), tuple(1 + column for column in columns[6:]) if normed else ())
    given = each(1, size), each(2), each(3), layers
    own = lambda *inputs: cut(narrow_kernel.attend(*inputs, Setting(PARTS, interpret=True)))
    near(quick_jit(with_gradients(own))(*given), quick_jit(with_gradients(whole))(*given), 3e-5 * max(1.0, size / 10))


def test_it_takes_what_lies_in_a_tpus_memory():
    """Width, tokens."""
    assert all(narrow_kernel.fits(*heads) for heads in ((64, 8192 + 333), (128, 4096)))
    assert not any(narrow_kernel.fits(*heads) for heads in ((40, 4096), (160, 4096), (64, 16_384), (128, 8192)))
