"""On a CPU large weights are computed another way: the same numbers, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from full_size import SD_15

from proreflow_jax.models import attention, layers, network
from proreflow_jax.models.layers import Compute
from proreflow_jax.pretrained import write_pipeline

OPTIONS = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None)
NEVER = 1 << 62
CPU = Compute(platform="cpu")


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_only_a_cpu_and_large_weights_have_options_of_their_own():
    """The demo's networks are small: their programs, and so its numbers, stay."""
    small = network.make_unet(write_pipeline.unet_config(tiny.UNET, tiny.TEXT, tiny.LATENT))
    large = network.make_unet(SD_15)
    assert network.cpu_options(large, "cpu") == network.BY_REDUCTIONS
    assert not any(network.cpu_options(net, platform) for net in (small, large) for platform in ("gpu", "tpu"))
    assert network.cpu_options(small, "cpu") == {}


def test_jax_takes_the_options_and_the_numbers_stay():
    x, kernel = arrays((1, 8, 8, 64), (3, 3, 64, 64))
    convolve = lambda x, w: jax.nn.softmax(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **OPTIONS), axis=-1)
    run = lambda options: jax.jit(convolve, compiler_options=options)(x, kernel)
    np.testing.assert_allclose(run(network.BY_REDUCTIONS), run(None), rtol=1e-4, atol=1e-6)


def operations(net: network.Network, params: dict, x: jax.Array, name: str) -> int:
    return str(jax.make_jaxpr(lambda *given: net.apply(*given))(params, x)).count(f"{name}[")


@pytest.mark.parametrize("shape", [(1, 2, 3, 48), (2, 5, 4, 48), (1, 1, 1, 48)])
def test_large_weights_are_doubled_by_products_whose_sums_are_the_same(monkeypatch, shape):
    made = lambda compute=CPU: network.network(lambda rngs: layers.Upsample(48, rngs, compute), {})
    params = tiny.random_params(made().shapes, 0)
    (x,), plain = arrays(shape), made()
    monkeypatch.setattr(layers, "LARGE", 1)
    count = lambda net: [operations(net, params, x, name) for name in ("conv_general_dilated", "dot_general")]
    assert (count(plain), count(made())) == ([4, 0], [0, 1])
    np.testing.assert_allclose(made().apply(params, x), plain.apply(params, x), rtol=1e-4, atol=1e-5)
    halved = made().apply({name: value.astype(jnp.bfloat16) for name, value in params.items()}, x.astype(jnp.bfloat16))
    assert halved.dtype == jnp.bfloat16
    np.testing.assert_allclose(halved.astype(jnp.float32), plain.apply(params, x), rtol=0.05, atol=0.05)
    for other in (made(None), made(Compute(platform="tpu"))):  # a VAE's; another machine's
        assert count(other) == [4, 0]
    monkeypatch.setattr(layers, "MOST_PRODUCTS", 9 * x.size - 1)
    assert count(made()) == [4, 0]


def test_halves_of_large_weights_are_not_copied_for_few_tokens(monkeypatch):
    net = network.network(lambda rngs: attention.GEGLU(16, 32, rngs), {})
    (x,) = arrays((2, 9, 16))
    params = tiny.random_params(net.shapes, 0)
    products = lambda: operations(net, params, x, "dot_general")
    before = net.apply(params, x)
    assert products() == 2
    monkeypatch.setattr(layers, "LARGE", 1)
    assert products() == 1
    np.testing.assert_allclose(net.apply(params, x), before, rtol=1e-5, atol=1e-6)


def test_a_network_is_the_same_with_large_weights_and_with_small_ones(monkeypatch):
    """Forward and gradients: upsampling, feed-forwards."""
    config = write_pipeline.unet_config(tiny.UNET, tiny.TEXT, tiny.LATENT)
    x, states = arrays((1, *tiny.LATENT), (1, 5, config["cross_attention_dim"]))

    def found(large: int) -> tuple:
        monkeypatch.setattr(layers, "LARGE", large)
        net = network.make_unet(config, CPU)
        params = tiny.random_params(net.shapes, 0)
        run = lambda p: net.apply(p, x, jnp.full((1,), 500.0), states)
        return jax.jit(run)(params), jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))(params)

    (ours, gradients), (theirs, wanted) = found(1), found(NEVER)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in wanted.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), gradients, wanted)
