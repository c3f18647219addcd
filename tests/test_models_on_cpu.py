"""On a CPU few pixels or tokens of large weights are computed another way: the same numbers, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from proreflow_jax.models import attention, layers, network
from proreflow_jax.models.layers import Compute
from proreflow_jax.pretrained import write_pipeline

OPTIONS = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None)
NEVER = 1 << 62


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def primitives(function, *inputs) -> set[str]:
    return {equation.primitive.name for equation in jax.make_jaxpr(function)(*inputs).eqns}


@pytest.mark.parametrize(
    ("strides", "padding"), [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((0, 1), (0, 1))), ((2, 1), ((1, 1), (2, 0)))]
)
def test_a_convolution_of_few_pixels_is_one_product(monkeypatch, strides, padding):
    monkeypatch.setattr(layers, "LARGE", 1)
    x, kernel = arrays((2, 5, 4, 48), (3, 3, 48, 7))
    ours = lambda x, w: layers.convolve_on_cpu(x, w, strides, padding, **OPTIONS)
    theirs = lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, **OPTIONS)
    assert "conv_general_dilated" not in primitives(ours, x, kernel)
    np.testing.assert_allclose(ours(x, kernel), theirs(x, kernel), rtol=1e-5, atol=1e-4)
    gradients = lambda f: jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), argnums=(0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), gradients(ours), gradients(theirs))


def test_many_pixels_small_weights_and_single_pixels_of_a_kernel_stay_convolutions(monkeypatch):
    x, kernel, point = arrays((2, 5, 4, 48), (3, 3, 48, 7), (1, 1, 48, 7))
    same = ((1, 1), ((1, 1), (1, 1)))
    kinds = lambda x, w, strides, padding: primitives(
        lambda x, w: layers.convolve_on_cpu(x, w, strides, padding, **OPTIONS), x, w
    )
    assert kinds(x, kernel, *same) == {"conv_general_dilated"}  # small weights
    monkeypatch.setattr(layers, "LARGE", 1)
    assert kinds(jnp.concatenate([x, x]), kernel, *same) == {"conv_general_dilated"}  # 80 pixels of 48 channels
    assert kinds(x, point, (1, 1), ((0, 0), (0, 0))) == {"conv_general_dilated"}


def test_halves_of_large_weights_are_not_copied_for_few_tokens(monkeypatch):
    net = network.network(lambda rngs: attention.GEGLU(16, 32, rngs), {})
    (x,) = arrays((2, 9, 16))
    params = tiny.random_params(net.shapes, 0)
    products = lambda: [
        e for e in jax.make_jaxpr(lambda *given: net.apply(*given))(params, x).eqns if e.primitive.name == "dot_general"
    ]
    before = net.apply(params, x)
    assert len(products()) == 2
    monkeypatch.setattr(layers, "LARGE", 1)
    assert len(products()) == 1
    np.testing.assert_allclose(net.apply(params, x), before, rtol=1e-5, atol=1e-6)


def test_a_network_is_the_same_with_large_weights_and_with_small_ones(monkeypatch):
    """Forward and gradients: its convolutions, strided ones, upsampling, feed-forwards."""
    config = write_pipeline.unet_config(tiny.UNET, tiny.TEXT, tiny.LATENT)
    net = network.make_unet(config, Compute(platform="cpu"))
    x, states = arrays((1, *tiny.LATENT), (1, 5, config["cross_attention_dim"]))
    params, seen = tiny.random_params(net.shapes, 0), []

    def found(large: int) -> tuple:
        monkeypatch.setattr(layers, "LARGE", large)
        run = lambda p: net.apply(p, x, jnp.full((1,), 500.0), states)
        seen.append(str(jax.make_jaxpr(run)(params)).count("conv_general_dilated["))
        return jax.jit(run)(params), jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))(params)

    (ours, gradients), (theirs, wanted) = found(1), found(NEVER)
    assert seen[0] < seen[1]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in wanted.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), gradients, wanted)
