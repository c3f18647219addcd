"""Decoding in rows and strips is decoding whole pictures; how many at once, in how many strips, in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from proreflow_jax.models import network, strips
from proreflow_jax.models.layers import Compute
from proreflow_jax.reflow import sampler
from proreflow_jax.runtime import mesh

CONFIG = dict(block_out_channels=[4, 8], latent_channels=2, norm_num_groups=2, layers_per_block=1, shift_factor=0.1)
ONE = 2**27  # bytes of the largest array of one picture of 512 x 512 in bfloat16, with 256 channels


def decoded(vae, params, z):
    return np.asarray(jax.jit(lambda p, z: vae.apply(p, z, method="decode"))(params, z))


@pytest.fixture(scope="module")
def plain():
    """A small VAE with weights that leave nothing at zero or one, two latents, and what it decodes from them."""
    vae = network.make_vae(CONFIG)
    draw = np.random.default_rng(0)
    params = {
        name: jnp.asarray(draw.normal(size=s.shape, scale=0.3) + (len(s.shape) == 1), jnp.float32)
        for name, s in vae.shapes.items()
    }
    z = jnp.asarray(draw.normal(size=(2, 16, 6, 2)), jnp.float32)
    return vae, params, z, decoded(vae, params, z)


def test_a_tpus_strips_are_the_whole_pictures(plain, monkeypatch):
    """One picture after the other in 8 strips, through upsampler, norms and convolutions; a seam is as good as other rows."""
    _, params, z, whole = plain
    monkeypatch.setattr(strips, "LEAST_ROWS", 2)
    cuts, cut = [], strips.cut
    monkeypatch.setattr(strips, "cut", lambda x, count: cuts.append((len(x), count)) or cut(x, count))
    parts = decoded(network.make_vae(CONFIG, Compute(platform="tpu")), params, z)
    assert cuts == [(1, 8)]
    assert np.abs(parts - whole).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize(("devices", "groups"), [(1, 8), (2, 4), (3, 8)])
def test_rows_one_after_the_other_are_all_rows_on_any_mesh(devices, groups):
    """Each device takes its own rows in turn; a mesh that does not divide the batch takes it whole."""
    machine = mesh.make_mesh(devices=jax.devices()[:devices])
    z = np.arange(8.0, dtype=np.float32)[:, None]
    place = mesh.batch_sharding(machine) if 8 % devices == 0 else mesh.replicated(machine)
    sizes = []
    one = lambda part: sizes.append(len(part)) or part + 1
    rows = jax.jit(lambda z: strips.in_rows(one, z, 1, Compute(mesh=machine)))(jax.device_put(z, place))
    np.testing.assert_array_equal(rows, z + 1)
    assert 8 // sizes[0] == groups


@pytest.mark.parametrize(
    ("pictures", "height", "one", "chosen"),
    [
        (1, 512, ONE, (1, 8)), (2, 512, ONE, (1, 8)), (8, 512, ONE, (8, 1)), (5, 512, ONE, (1, 8)), (12, 512, ONE, (1, 8)),
        (64, 512, ONE, (8, 1)), (64, 512, 2 * ONE, (1, 8)), (16, 1024, 4 * ONE, (1, 8)), (3, 2048, 32 * ONE, (1, 8)),
        (50, 32, ONE // 256, (50, 1)),
    ],
)  # fmt: skip
def test_a_tpu_decodes_eight_pictures_or_one_in_eight_strips(pictures, height, one, chosen):
    """Bytes are those of the largest array; a picture that is larger is decoded all the same, and a small one is not cut."""
    assert strips.choose_rows(Compute(platform="tpu"), pictures, height, one) == chosen
    for platform in ("cpu", "gpu"):
        rows, count = strips.choose_rows(Compute(platform=platform), pictures, height, one)
        assert count == 1 and pictures % rows == 0 and (rows == 1 or rows * one <= strips.LARGEST)


def test_decoding_is_in_the_dtype_that_is_asked_for_unless_the_vae_asks_for_float32():
    """force_upcast of the VAE's config."""
    vae, z = tiny.toy_networks().vae, jax.random.normal(jax.random.key(0), (64, 4, 4, 4))
    params = tiny.toy_frozen(tiny.toy_networks()).vae
    careful = vae._replace(config={"force_upcast": True})
    exact, half = (np.asarray(sampler.decode(vae, params, z, 0.5, dtype)).astype(int) for dtype in ("float32", "bfloat16"))
    np.testing.assert_array_equal(sampler.decode(careful, params, z, 0.5, "bfloat16"), exact)
    assert 0 < np.abs(half - exact).max() <= 4
    assert sampler.decoding_facts(vae, "bfloat16") == {"decoded": "bfloat16"}
    assert sampler.decoding_facts(careful, "bfloat16") == sampler.decoding_facts(vae, "float32") == {}
