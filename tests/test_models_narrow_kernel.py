"""The kernel for narrow heads is whole attention behind its norms, forward and backward, however large the scores are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_attention_kernels import draw, near, with_gradients
from torch_reference import quick_jit

from proreflow_jax.models import narrow_body, narrow_kernel
from proreflow_jax.models.narrow_body import EPSILON, Part
from proreflow_jax.models.narrow_kernel import Layers, Setting

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
    monkeypatch.setattr(narrow_body, "BLOCK", 128)
    each = lambda seed, factor=1.0: tuple(factor * draw(1, HEADS, WIDTH, s, seed=seed + s) for s in LANES)
    columns = [draw(HEADS, WIDTH, 1, seed=seed) for seed in range(10)]
    layers = Layers(tuple(columns[:6]), tuple(1 + column for column in columns[6:]) if normed else ())
    given = each(1, size), each(2), each(3), layers
    own = lambda *inputs: cut(narrow_kernel.attend(*inputs, Setting(PARTS, interpret=True)))
    near(quick_jit(with_gradients(own))(*given), quick_jit(with_gradients(whole))(*given), 3e-5 * max(1.0, size / 10))


@pytest.mark.parametrize(("tokens", "width"), [(4096, 40), (1024, 80), (4096, 64), (1000, 64)])  # the last in 1,024 lanes
def test_it_is_whole_self_attention_at_the_shapes_of_the_unets(tokens, width):
    given = [narrow_kernel.fill(draw(1, tokens, width, seed=seed)).swapaxes(1, 2)[:, None] for seed in range(3)]
    cut = lambda form: lambda *heads: form(*heads, tokens)[..., :tokens]
    near(*(quick_jit(with_gradients(cut(form)))(*given) for form in (own, whole_of_self)), 3e-5)


def own(q: Any, k: Any, v: Any, tokens: int) -> jax.Array:
    return narrow_kernel.attend((q,), (k,), (v,), Layers(), Setting((Part(tokens),), interpret=True))[0]


def whole_of_self(q: Any, k: Any, v: Any, tokens: int) -> jax.Array:
    """Whole scores of the first `tokens`."""
    scores = jnp.einsum("bhdq,bhdk->bhqk", q, k[..., :tokens], preferred_element_type=jnp.float32) * q.shape[2] ** -0.5
    return jnp.einsum("bhqk,bhdk->bhdq", jax.nn.softmax(scores, -1).astype(v.dtype), v[..., :tokens])


@pytest.mark.parametrize(("width", "size", "most"), [(40, 1.0, (1.05, 1.5)), (80, 2.0, (1.1, 2.25))])
def test_without_a_maximum_the_error_is_bfloat16s_own(monkeypatch, width, size, most):
    """Outputs and gradients are as far from float32's as with a running maximum, and not much farther than plain attention's.

    Queries are rounded once more, scaled: 1.3 times as far where scores are near 1, twice where they are near 40.
    """
    given = [(size * draw(1, 1, width, 512, seed=seed)).astype(jnp.bfloat16) for seed in range(3)]
    wide = [x.astype(jnp.float32) for x in given]
    run = lambda form, heads: jax.tree.leaves(quick_jit(with_gradients(lambda *x: form(*x, 512)))(*heads))
    exact, small, rounded = run(whole_of_self, wide), run(own, given), run(whole_of_self, given)
    monkeypatch.setattr(narrow_body, "SMALL", 0.0)
    running = run(own, given)
    assert any((a != b).any() for a, b in zip(small, running, strict=True))  # two forms, and not one twice
    distance = lambda a, b: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
    far = lambda found: [distance(a, b) for a, b in zip(found, exact, strict=True)]
    for ours, usual, plain in zip(far(small), far(running), far(rounded), strict=True):
        assert ours <= most[0] * usual and ours <= most[1] * plain and ours < 2**-7


def test_it_takes_what_lies_in_a_tpus_memory():
    """Width, tokens."""
    half = lambda heads: narrow_kernel.fits(*heads, jnp.bfloat16)
    assert all(map(half, ((40, 4096), (80, 4096), (64, 9216), (64, 8192 + 333), (128, 4096))))
    assert not any(map(half, ((20, 4096), (160, 4096), (40, 16_384), (64, 16_384), (128, 8192))))
    assert not narrow_kernel.fits(64, 9216, jnp.float32)


def test_tokens_are_filled_up_to_few_blocks():
    """A prime number of lanes would be as many blocks; what one block holds is filled up to lanes."""
    found = {tokens: narrow_kernel.filled(tokens) for tokens in (78, 333, 1024, 4095, 53 * 128, 9216)}
    assert found == {78: 128, 333: 384, 1024: 1024, 4095: 4096, 53 * 128: 54 * 128, 9216: 9216}
    for tokens in range(128, 10_000, 128):
        assert tokens <= narrow_kernel.filled(tokens) < tokens + 512
