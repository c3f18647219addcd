"""Joint attention in every form is plain attention over both streams: filled up, masked, one token that stands for many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_attention_kernels import draw, near, with_gradients
from tiny import random_params
from torch_reference import quick_jit

from proreflow_jax.models import attention_kernels, narrow_body, network
from proreflow_jax.models.joint_attention import JointAttention
from proreflow_jax.models.layers import Compute
from proreflow_jax.runtime.mesh import make_mesh

HEADS, WIDTH = 2, 16
IMAGE, TEXT = 150, 47  # 197 tokens: filled up to 256 for the kernel


def joint(compute: Compute, **options: Any) -> network.Network:
    return network.network(lambda rngs: JointAttention(HEADS, WIDTH, True, rngs, compute=compute, **options), {})


def outcomes(compute: Compute, rows: int = 1, **options: Any) -> Any:
    """Both streams' outputs, and gradients by weights and inputs."""
    net = joint(compute, **options)
    params = random_params(joint(Compute()).shapes, 0)
    both = lambda *inputs: jnp.concatenate([out for out in net.apply(*inputs) if out is not None], axis=1)
    given = draw(rows, IMAGE, HEADS * WIDTH, seed=1), draw(rows, TEXT, HEADS * WIDTH, seed=2)
    return quick_jit(with_gradients(both))({name: params[name] for name in net.shapes}, *given)


@pytest.fixture(scope="module")
def plain() -> dict[int, Any]:
    """{number that the last token stands for: outcomes with whole scores}."""
    return {repeated: outcomes(Compute(), repeated=repeated) for repeated in (1, 256)}


@pytest.mark.parametrize(("form", "repeated"), [("chunked", 256), ("cached", 256), ("narrow", 256), ("narrow", 1)])
def test_every_form_is_whole_scores_forward_and_backward(monkeypatch, plain, form, repeated):
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 128)
    monkeypatch.setattr(attention_kernels, "CHUNK_SCORES", 64 * 4 * HEADS * (IMAGE + TEXT))
    found = outcomes(Compute(form), repeated=repeated)
    near(found[0], plain[repeated][0], 1e-5)
    size = max(float(np.abs(value).max()) for value in jax.tree.leaves(plain[repeated][1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(plain[repeated][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * size)  # keys' biases change nothing: their gradient is rounding
    if form == "narrow":
        inputs = joint(Compute()).shapes, draw(1, IMAGE, HEADS * WIDTH), draw(1, TEXT, HEADS * WIDTH)
        assert "pallas_call" in str(jax.make_jaxpr(joint(Compute(form)).apply)(*inputs))


def test_the_kernel_over_a_mesh_gives_each_device_its_rows_and_heads(monkeypatch):
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 128)
    given = random_params(joint(Compute()).shapes, 0), draw(4, IMAGE, HEADS * WIDTH), draw(4, TEXT, HEADS * WIDTH)
    spread = joint(Compute("narrow", mesh=make_mesh(2, 2, 2)), repeated=3)
    near(quick_jit(spread.apply)(*given), quick_jit(joint(Compute(), repeated=3).apply)(*given), 1e-5)


def test_a_token_that_stands_for_many_is_many_equal_tokens(plain):
    x, text = draw(1, IMAGE, HEADS * WIDTH, seed=1), draw(1, TEXT, HEADS * WIDTH, seed=2)
    params = random_params(joint(Compute()).shapes, 0)
    written = jnp.concatenate([text[:, :-1], jnp.tile(text[:, -1:], (1, 256, 1))], axis=1)
    image, words = quick_jit(joint(Compute()).apply)(params, x, written)
    near(plain[256][0], jnp.concatenate([image, words[:, :TEXT]], axis=1), 1e-5)


def test_the_image_alone_needs_no_bias_and_gives_no_text(monkeypatch):
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 128)
    x = draw(1, 256, HEADS * WIDTH)
    own = joint(Compute("narrow"), text=False, repeated=256)
    params = random_params(own.shapes, 0)
    out, words = quick_jit(own.apply)(params, x)
    assert words is None
    near(out, quick_jit(joint(Compute(), text=False).apply)(params, x)[0], 1e-5)


def test_cudnn_finds_the_bias_in_heads_eight_wider(monkeypatch):
    """Its own biases are whole scores, and of even lengths. The kernel needs the card; plain attention stands in for it."""
    asked, whole = [], jax.nn.dot_product_attention

    def kernel(q: Any, k: Any, v: Any, scale: float, implementation: str) -> Any:
        asked.append((q.shape[-1], implementation))
        return whole(q, k, v, scale=scale)

    q, k, v = (draw(2, 7, 3, 8, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    bias = np.array([0, 0, 0, 0, 0, np.log(256), narrow_body.HIDDEN], np.float32)
    expected = whole(q, k, v, bias=bias[None, None, None])
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    found = attention_kernels.whole_scores(q, k, v, "cudnn", bias)
    assert asked == [(16, "cudnn")] and found.dtype == jnp.bfloat16
    near(found.astype(jnp.float32), expected.astype(jnp.float32), 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_bias_in_spare_lanes_is_exact_in_every_dtype(dtype):
    """log 256 in bfloat16 alone would weigh a token by 252 in place of 256."""
    bias = np.array([0.0, np.log(256.0), np.log(3.0), narrow_body.HIDDEN], np.float32)
    q, k = attention_kernels.marked(jnp.zeros((5, 128), dtype), jnp.zeros((4, 128), dtype), bias, 64)
    assert q.dtype == k.dtype == dtype
    scores = jnp.einsum("ql,kl->qk", q, k, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(scores, np.broadcast_to(bias, (5, 4)), rtol=1e-6)


def test_a_filler_is_weighed_by_nothing():
    scores = jnp.array([-200.0, 0.0, 200.0, narrow_body.HIDDEN])
    assert jnp.exp(scores - 200.0)[-1] == 0.0 and jnp.isfinite(jnp.float16(narrow_body.HIDDEN))


@pytest.mark.parametrize(("form", "width", "taken"), [("narrow", 4, False), ("narrow", 16, True), ("splash", 16, False)])
def test_heads_that_the_kernel_does_not_take_are_computed_otherwise(monkeypatch, form, width, taken):
    """Another form, not a wrong number; splash has no two streams."""
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 128)
    monkeypatch.setattr(attention_kernels, "SMALL_SCORES", 1)
    net = network.network(lambda rngs: JointAttention(1, width, False, rngs, compute=Compute(form)), {})
    jaxpr = str(jax.make_jaxpr(net.apply)(net.shapes, draw(1, IMAGE, width), draw(1, TEXT, width)))
    assert ("pallas_call" in jaxpr, "scan[" in jaxpr) == (taken, not taken)
