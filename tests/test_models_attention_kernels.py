"""Every way of computing a network gives the same numbers, keeps what it says, and is taken where it says."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import LATENT, TEXT, UNET, random_params
from torch_reference import quick_jit

from proreflow_jax.models import attention, attention_kernels, layers, network, unet
from proreflow_jax.models.layers import POLICIES, Compute, in_turn
from proreflow_jax.pretrained import write_pipeline
from proreflow_jax.runtime.mesh import batch_sharding, fsdp_spec, make_mesh, shardings


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


@pytest.mark.parametrize(("tokens", "keys"), [(25, 25), (17, 7)])
def test_blocks_of_queries_are_whole_attention(monkeypatch, tokens, keys):
    """Blocks of 5 queries; in the second case the last is not full."""
    monkeypatch.setattr(attention_kernels, "CACHED_LEAST", 5)
    monkeypatch.setattr(attention_kernels, "CACHED_ROWS", 5)
    q, k, v = draw(2, tokens, 3, 4), draw(2, keys, 3, 4, seed=1), draw(2, keys, 3, 4, seed=2)
    monkeypatch.setattr(attention_kernels, "CHUNK_SCORES", 5 * 4 * 2 * 3 * keys)
    forms = [
        quick_jit(with_gradients(partial(attention_kernels.whole_scores, form=form)))(q, k, v)
        for form in ("xla", "chunked", "cached")
    ]
    near(forms[1], forms[0], 1e-5)
    near(forms[2], forms[0], 1e-5)


def test_chunks_bound_the_memory_forward_and_backward(monkeypatch):
    heads = [jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)] * 3
    scores = 4 * 2 * 2048 * 2048
    monkeypatch.setattr(attention_kernels, "CHUNK_SCORES", scores // 16)
    for wrap in (lambda f: f, with_gradients):
        taken = [
            quick_jit(wrap(partial(attention_kernels.whole_scores, form=form)))
            .lower(*heads)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for form in ("xla", "chunked", "cached")
        ]
        assert taken[0] > scores and max(taken[1:]) < scores / 2


def block(compute: Compute, width: int = 80, heads: int = 2, context: int | None = None) -> network.Network:
    return network.network(lambda rngs: attention.Attention(width, heads, rngs, context=context, compute=compute), {})


def forms(x: jax.Array, **computes: Compute) -> dict[str, Any]:
    """Output and gradients, by parameters and by x, of one self-attention in several ways."""
    params = random_params(block(Compute()).shapes, 0)
    made = {name: block(compute).apply for name, compute in computes.items()}
    return {name: quick_jit(with_gradients(apply))(params, x) for name, apply in made.items()}


@pytest.mark.parametrize("axes", [None, (2, 2, 2)])
def test_the_kernels_of_a_tpu_are_plain_attention_forward_and_backward(monkeypatch, axes):
    """Heads of 40, with splash in 128 lanes, the kernels interpreted; over a mesh, each device its rows and its head."""
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 256)
    x, mesh = draw(4 if axes else 1, 256, 80), axes and make_mesh(*axes)
    found = forms(x, xla=Compute(), splash=Compute("splash", mesh=mesh), narrow=Compute("narrow", mesh=mesh))
    for form in ("splash", "narrow"):
        near(found[form], found["xla"], 1e-5)
        jaxpr = str(jax.make_jaxpr(block(Compute(form, mesh=mesh)).apply)(block(Compute()).shapes, x))
        assert "pallas_call" in jaxpr and ("shard_map" in jaxpr) == bool(axes)
        assert ("80,2,128] = pad[" in jaxpr) == (form == "splash") and "256,128] = pad[" not in jaxpr  # weights only


@pytest.mark.parametrize("axes", [None, (2, 2, 2)])
def test_the_kernel_of_narrow_heads_is_plain_cross_attention_forward_and_backward(monkeypatch, axes):
    """200 queries, whose lanes are filled up to 256, see 77 keys in 80."""
    monkeypatch.setattr(attention_kernels, "FUSED_TOKENS", 128)
    x, text, mesh = draw(4 if axes else 1, 200, 80), draw(4 if axes else 1, 77, 24, seed=1), axes and make_mesh(*axes)
    params = random_params(block(Compute(), context=24).shapes, 0)
    of = {form: block(Compute(form, mesh=mesh), context=24).apply for form in ("xla", "narrow")}
    found = {form: quick_jit(with_gradients(apply))(params, x, text) for form, apply in of.items()}
    near(found["narrow"], found["xla"], 1e-5)
    assert "pallas_call" in str(jax.make_jaxpr(of["narrow"])(params, x, text))


@pytest.mark.parametrize("bias", [True, False])
def test_padded_projections_are_the_plain_ones_before_zeros(bias):
    shapes = jax.eval_shape(lambda: nnx.Linear(6, 8, use_bias=bias, rngs=nnx.Rngs(0)))
    linear = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)
    x = draw(2, 5, 6)
    padded = attention.padded_heads(linear, x, heads=2, scale=0.5)
    assert padded.shape == (2, 2, 5, 128) and not np.any(padded[..., 4:])
    near(jnp.moveaxis(padded[..., :4], 1, 2).reshape(2, 5, 8), 0.5 * linear(x), 1e-6)


@pytest.mark.parametrize(
    ("form", "compute", "shape"),  # shape: tokens, keys, heads, width, batch, dtype (float32)
    [
        ("narrow", Compute("auto", platform="tpu"), (4096, 4096, 8, 40, 8)),  # SD 1.5
        ("narrow", Compute("auto", platform="tpu"), (1024, 1024, 8, 80, 8)),
        ("narrow", Compute("auto", platform="tpu"), (9216, 9216, 5, 64, 8, jnp.bfloat16)),  # SD 2.1 at 768 pixels
        ("narrow", Compute("auto", platform="tpu"), (4095, 4095, 8, 40, 8)),
        ("splash", Compute("auto", platform="tpu"), (16384, 16384, 8, 40, 8)),  # SD 1.5 at 1,024 pixels: beyond a TPU's VMEM
        ("splash", Compute("auto", platform="tpu"), (1024, 1024, 8, 160, 8)),
        ("splash", Compute("splash", platform="tpu"), (4096, 4096, 8, 40, 8)),
        ("chunked", Compute("narrow", platform="tpu"), (16384, 16384, 8, 40, 8)),
        ("xla", Compute("auto", platform="tpu"), (256, 256, 8, 160, 8)),
        ("narrow", Compute("auto", platform="tpu"), (4096, 77, 8, 40, 8)),  # cross-attention
        ("xla", Compute("auto", platform="tpu"), (256, 77, 8, 80, 8)),
        ("xla", Compute("auto", platform="tpu"), (4096, 77, 8, 160, 8)),
        ("xla", Compute("splash", platform="tpu"), (4096, 77, 8, 40, 8)),
        ("chunked", Compute("auto", platform="tpu"), (4096, 4096, 1, 512, 8)),  # the VAE's one head
        ("chunked", Compute("auto", platform="tpu"), (4095, 4095, 8, 160, 8)),  # no whole blocks
        ("cudnn", Compute("auto", platform="gpu"), (4096, 4096, 8, 40, 8, jnp.bfloat16)),
        ("chunked", Compute("auto", platform="gpu"), (4096, 4096, 8, 40, 8, jnp.float32)),
        ("xla", Compute("auto", platform="gpu"), (4096, 77, 8, 40, 8, jnp.bfloat16)),
        ("xla", Compute("auto"), (256, 256, 4, 16, 128)),
        ("cached", Compute("auto"), (4096, 4096, 8, 40, 1)),
        ("cached", Compute("cached", platform="tpu"), (16, 7, 2, 8, 1)),
        ("chunked", Compute("chunked"), (16, 7, 2, 8, 1)),
        ("xla", Compute("xla", platform="tpu"), (4096, 4096, 8, 40, 8)),
        ("xla", Compute("splash", platform="tpu"), (256, 256, 8, 160, 8)),
    ],
)
def test_the_form_by_platform_and_shape(form, compute, shape):
    shape = shape if len(shape) == 6 else (*shape, jnp.float32)
    assert attention_kernels.choose_attention(compute, *shape) == form


def test_scores_are_counted_on_each_device():
    shape = (1024, 1024, 8, 40, 16, jnp.float32)
    assert attention_kernels.choose_attention(Compute("auto", platform="gpu"), *shape) == "chunked"
    assert attention_kernels.choose_attention(Compute("auto", platform="gpu", mesh=make_mesh(2, 2, 2)), *shape) == "xla"


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
def losses() -> dict[str, Any]:
    """{policy: loss(params)} of a ResNet block over a skip and a transformer, and under "params" their parameters."""
    a = unet.architecture(write_pipeline.unet_config(UNET, TEXT, LATENT))
    level = a.levels[1]._replace(resnets=0)
    inputs = draw(2, 8, 8, 8), draw(2, 8, 8, 16, seed=1), draw(2, 32, seed=2), draw(2, 8, TEXT["hidden_size"], seed=3)

    def loss(policy: str) -> Any:
        build = lambda rngs: unet.UpBlock(a, 8, [16], level, True, rngs, Compute("auto", policy))
        net = network.network(build, {})
        x, skip, *rest = inputs
        return net.shapes, lambda params: jnp.mean(net.apply(params, x, [skip], *rest) ** 2)

    made = {policy: loss(policy) for policy in POLICIES}
    return {policy: function for policy, (_, function) in made.items()} | {"params": random_params(made["none"][0], 0)}


@pytest.fixture(scope="module")
def gradients(losses) -> dict[str, Any]:
    """{policy: (loss, gradients)}."""
    return {policy: quick_jit(jax.value_and_grad(losses[policy]))(losses["params"]) for policy in POLICIES}


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_what_is_recomputed_changes_no_number(gradients, policy):
    near(gradients[policy], gradients["none"], 1e-5)


def test_each_policy_keeps_less_than_the_one_before(losses):
    def kept(policy: str) -> int:
        shapes = jax.eval_shape(lambda params: jax.vjp(losses[policy], params)[1], losses["params"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    sizes = [kept(policy) for policy in ("none", "products", "attention", "inputs")]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) == 4, sizes


def test_without_gradients_no_policy_costs_anything(losses):
    lowered = [jax.jit(losses[policy]).lower(losses["params"]) for policy in POLICIES]
    assert len({program.cost_analysis()["flops"] for program in lowered}) == 1
    assert not any("optimization_barrier" in program.as_text() for program in lowered)


@pytest.mark.parametrize("axes", [(1, 4, 1), (2, 4, 1)])
def test_a_sharded_weight_is_gathered_and_its_gradient_comes_back_sharded(axes):
    """Same numbers as on one device; the only product over pieces would be one with collective-permute."""
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    build = lambda compute: network.network(lambda rngs: layers.gathering(attention.FeedForward(8, rngs), compute), {})
    params, x = random_params(build(Compute()).shapes, 0), draw(8, 4, 8)
    places = shardings(mesh, {name: fsdp_spec(value.shape, mesh) for name, value in params.items()})
    rows = batch_sharding(mesh)
    loss = lambda net: lambda params, x: (net.apply(params, x) ** 2).sum()
    step = jax.jit(jax.grad(loss(build(Compute(mesh=mesh)))), in_shardings=(places, rows), out_shardings=places)
    step = step.lower(params, x).compile()
    near(step(params, x), quick_jit(jax.grad(loss(build(Compute()))))(params, x), 1e-5)
    assert "collective-permute" not in step.as_text()


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_many_equal_blocks_in_a_loop_are_the_blocks_in_turn(remat):
    """Five transformer blocks between their projections: for a TPU one loop forward, one backward."""

    def made(repeat: Any) -> network.Network:
        compute = Compute(remat=remat, repeat=repeat)
        return network.network(lambda rngs: attention.Transformer2D(8, 2, 5, 8, 4, True, rngs, compute), {})

    written, looped = made(in_turn), made(network.scanned)
    params, x, context = random_params(written.shapes, 0), draw(2, 3, 3, 8), draw(2, 5, 8, seed=1)
    assert looped.shapes == written.shapes
    programs = [quick_jit(with_gradients(net.apply)).lower(params, x, context) for net in (written, looped)]
    near(*(program.compile()(params, x, context) for program in reversed(programs)), 1e-5)
    assert [program.as_text().count("stablehlo.while") for program in programs] == [0, 3]


def test_only_a_tpu_program_has_a_loop_over_blocks():
    config = write_pipeline.unet_config(UNET, TEXT, LATENT) | {"transformer_layers_per_block": [1, network.SCANNED]}
    loops = []
    for platform in ("cpu", "gpu", "tpu"):
        net = network.make_unet(config, Compute(platform=platform))
        inputs = net.shapes, draw(1, *LATENT), draw(1), draw(1, 5, TEXT["hidden_size"])
        loops.append(str(jax.make_jaxpr(net.apply)(*inputs)).count("scan["))
    assert loops == [0, 0, 4]  # one down, one in the middle, two up


@pytest.mark.parametrize("tokens", [1280, 1536, 1792, 2048, 6400])
def test_the_blocks_of_the_backward_kernel_are_whole_lanes(monkeypatch, tokens):
    """1,280 and 6,400 tokens have blocks of 640 (latents of 32 x 40, 80 x 80); half of that is no whole number of lanes."""
    asked = []
    monkeypatch.setattr(attention_kernels.pallas, "BlockSizes", lambda **sizes: asked.append(sizes))
    monkeypatch.setattr(attention_kernels.pallas, "make_splash_mha_single_device", lambda *_, **__: lambda *heads: heads)
    attention_kernels._kernel(1, jnp.zeros((1, 1, tokens, 128), jnp.bfloat16), True)
    (sizes,) = asked
    blocks = [size for name, size in sizes.items() if name.startswith("block_")]
    assert all(size % 128 == 0 and tokens % size == 0 for size in blocks), sizes
