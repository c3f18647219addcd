"""Every way of computing a network gives the same numbers, keeps what it says, and is taken where it says."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TEXT, UNET, random_params
from torch_reference import quick_jit

from proreflow_jax.models import attention, base, kernels, network
from proreflow_jax.models.kernels import Compute
from proreflow_jax.runtime.mesh import make_mesh


def near(a: Any, b: Any, tolerance: float) -> None:
    """Asserts that trees agree, leaf by leaf, relative to each leaf's largest number."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        assert np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() <= tolerance * np.abs(y).max()


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def with_gradients(f: Any) -> Any:
    """(f's value, gradients of a weighed sum of it by all inputs)."""
    weighed = lambda out: (out * draw(*out.shape, seed=9)).sum()
    return lambda *inputs: (f(*inputs), jax.grad(lambda *xs: weighed(f(*xs)), argnums=tuple(range(len(inputs))))(*inputs))


@pytest.mark.parametrize(("tokens", "keys"), [(24, 24), (17, 7), (3, 40)])
def test_chunks_of_queries_are_whole_attention(monkeypatch, tokens, keys):
    """Blocks of 5 queries, of which the last is not full."""
    q, k, v = draw(2, tokens, 3, 4), draw(2, keys, 3, 4, seed=1), draw(2, keys, 3, 4, seed=2)
    monkeypatch.setattr(kernels, "CHUNK_SCORES", 5 * 4 * 2 * 3 * keys)
    near(with_gradients(kernels._chunked)(q, k, v), with_gradients(partial(kernels.plain, form="xla"))(q, k, v), 1e-5)


def test_chunks_bound_the_memory_forward_and_backward(monkeypatch):
    heads = [jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)] * 3
    scores = 4 * 2 * 1024 * 1024
    monkeypatch.setattr(kernels, "CHUNK_SCORES", scores // 16)
    for wrap in (lambda f: f, with_gradients):
        taken = [
            quick_jit(wrap(partial(kernels.plain, form=form))).lower(*heads).compile().memory_analysis().temp_size_in_bytes
            for form in ("xla", "chunked")
        ]
        assert taken[0] > scores and taken[1] < scores / 2


def block(compute: Compute, width: int = 80, heads: int = 2, context: int | None = None) -> network.Network:
    return network.network(lambda rngs: attention.Attention(width, heads, rngs, context=context, compute=compute), {})


def forms(x: jax.Array, **computes: Compute) -> dict[str, Any]:
    """Output and gradients, by parameters and by x, of one self-attention in several ways."""
    params = random_params(block(Compute()).shapes, 0)
    made = {name: block(compute).apply for name, compute in computes.items()}
    return {name: jax.jit(with_gradients(apply))(params, x) for name, apply in made.items()}


@pytest.mark.parametrize("axes", [None, (2, 2, 2)])
def test_splash_with_padded_heads_is_plain_attention_forward_and_backward(monkeypatch, axes):
    """Heads of 40 in 128 lanes, the kernel interpreted; over a mesh, each device its rows and its head."""
    monkeypatch.setattr(kernels, "FUSED_TOKENS", 256)
    x, mesh = draw(4 if axes else 1, 256, 80), axes and make_mesh(*axes)
    found = forms(x, xla=Compute(), splash=Compute("splash", mesh=mesh))
    near(found["splash"], found["xla"], 1e-5)
    jaxpr = str(jax.make_jaxpr(block(Compute("splash", mesh=mesh)).apply)(block(Compute()).shapes, x))
    assert "pallas_call" in jaxpr and ("shard_map" in jaxpr) == bool(axes)
    assert f"pad[" in jaxpr and "256,128] = pad[" not in jaxpr  # weights only


@pytest.mark.parametrize("bias", [True, False])
def test_padded_projections_are_the_plain_ones_between_zeros(bias):
    from flax import nnx

    linear = nnx.Linear(6, 8, use_bias=bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    x = draw(2, 5, 6)
    padded = attention.padded_heads(linear, x, heads=2, scale=0.5)
    assert padded.shape == (2, 2, 5, 128) and not np.any(padded[..., 4:])
    near(jnp.moveaxis(padded[..., :4], 1, 2).reshape(2, 5, 8), 0.5 * linear(x), 1e-6)


@pytest.mark.parametrize(
    ("form", "compute", "shape"),  # shape: tokens, keys, heads, width, batch, dtype
    [
        ("splash", Compute("auto", platform="tpu"), (4096, 4096, 8, 40, 8)),
        ("splash", Compute("auto", platform="tpu"), (1024, 1024, 8, 80, 8)),
        ("splash", Compute("auto", platform="tpu"), (2304, 2304, 8, 80, 8)),
        ("xla", Compute("auto", platform="tpu"), (256, 256, 8, 160, 8)),
        ("xla", Compute("auto", platform="tpu"), (4096, 77, 8, 40, 8)),
        ("chunked", Compute("auto", platform="tpu"), (4096, 4096, 1, 512, 8)),  # the VAE's one head
        ("chunked", Compute("auto", platform="tpu"), (4095, 4095, 8, 40, 8)),  # no whole blocks
        ("cudnn", Compute("auto", platform="gpu"), (4096, 4096, 8, 40, 8, jnp.bfloat16)),
        ("chunked", Compute("auto", platform="gpu"), (4096, 4096, 8, 40, 8, jnp.float32)),
        ("xla", Compute("auto", platform="gpu"), (4096, 77, 8, 40, 8, jnp.bfloat16)),
        ("xla", Compute("auto"), (256, 256, 4, 16, 128)),
        ("chunked", Compute("auto"), (4096, 4096, 8, 40, 1)),
        ("chunked", Compute("chunked"), (16, 7, 2, 8, 1)),
        ("xla", Compute("xla", platform="tpu"), (4096, 4096, 8, 40, 8)),
        ("xla", Compute("splash", platform="tpu"), (256, 256, 8, 160, 8)),
    ],
)
def test_the_form_by_platform_and_shape(form, compute, shape):
    assert kernels.choose(compute, *shape) == form


def test_scores_are_counted_on_each_device():
    shape = (1024, 1024, 8, 40, 16)
    assert kernels.choose(Compute("auto"), *shape) == "chunked"
    assert kernels.choose(Compute("auto", mesh=make_mesh(2, 2, 2)), *shape) == "xla"


def test_cudnn_is_asked_for(monkeypatch):
    """The kernel itself needs the card; that it is named needs none."""
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, implementation: asked.append(implementation) or q)
    apply = block(Compute("auto", platform="gpu")).apply
    params = network.cast(random_params(block(Compute()).shapes, 0), jnp.bfloat16)
    jax.eval_shape(apply, params, draw(1, 1024, 80).astype(jnp.bfloat16))
    jax.eval_shape(apply, params, draw(1, 64, 80).astype(jnp.bfloat16))
    assert asked == ["cudnn", None]


@pytest.fixture(scope="module")
def unets() -> dict[str, Any]:
    """A tiny UNet for each policy of recomputation; and what they are asked."""
    config = base.unet_config(UNET, TEXT, (8, 8, 4))
    made = {policy: network.make_unet(config, Compute("auto", policy, mesh=make_mesh(1, devices=jax.devices()[:1]))) for policy in kernels.POLICIES}
    params = random_params(made["none"].shapes, 0)
    inputs = (draw(2, 8, 8, 4), jnp.array([999.0, 3.0]), draw(2, 8, TEXT["hidden_size"], seed=1))
    loss = lambda net: lambda params: jnp.mean(net.apply(params, *inputs) ** 2)
    return {"nets": made, "params": params, "inputs": inputs, "losses": {policy: loss(net) for policy, net in made.items()}}


def test_what_is_recomputed_changes_no_number(unets):
    found = {policy: quick_jit(jax.value_and_grad(loss))(unets["params"]) for policy, loss in unets["losses"].items()}
    for policy in kernels.POLICIES:
        near(found[policy], found["none"], 1e-5)


def test_each_policy_keeps_less_than_the_one_before(unets):
    def kept(loss: Any) -> int:
        shapes = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], unets["params"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    sizes = [kept(unets["losses"][policy]) for policy in ("none", "products", "attention", "inputs")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sizes[-1] < 0.7 * sizes[0]


def test_without_gradients_no_policy_costs_anything(unets):
    lowered = lambda net: jax.jit(net.apply).lower(unets["params"], *unets["inputs"])
    flops = {policy: lowered(net).cost_analysis()["flops"] for policy, net in unets["nets"].items()}
    assert len(set(flops.values())) == 1
    assert all("optimization_barrier" not in lowered(net).as_text() for net in unets["nets"].values())
