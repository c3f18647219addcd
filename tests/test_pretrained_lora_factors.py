"""An adapter is the base at its start, trains alone, and leaves as exactly the LoRA that was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from proreflow_jax.models.network import cast, make_unet
from proreflow_jax.pretrained import lora_factors, lora_file, weights
from proreflow_jax.pretrained.write_pipeline import unet_config

Q, CONV = "blocks.0.attn1.to_q.weight", "blocks.0.conv1.weight"
SHAPES = {  # our layout
    Q: (8, 12),
    "blocks.0.attn1.to_out.0.weight": (12, 8),
    "blocks.0.attn1.to_out.0.bias": (8,),
    "blocks.0.proj_in.weight": (1, 1, 8, 6),
    CONV: (3, 3, 4, 10),
    "blocks.0.norm.weight": (8,),
    "text_model.embeddings.token_embedding.weight": (50, 8),
}
STRUCTS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1 and "token" not in name]
DEFAULT = r"attn\d\.to_(q|k|v|out\.0)\.weight$"  # the configs' own
KEY = jax.random.key(0)


def draw(shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal values of these names and shapes, whatever the name says."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(value.shape, np.float32) for name, value in shapes.items()}


def trained(rank: int = 5, layers: str = "", seed: int = 1) -> dict[str, np.ndarray]:
    """Factors of which neither is zero."""
    return draw(lora_factors.factor_shapes(STRUCTS, layers, rank), seed)


def in_torch(base: dict[str, np.ndarray], factors: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """base + LoRA, merged by numpy in torch's layout."""
    return lora_file.apply_factors(weights.to_torch(base), lora_file.to_lora(factors, scale))


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance * np.abs(value).max(), err_msg=name)


def test_names_and_shapes():
    given = STRUCTS | {"blocks.0.attn1.to_q.table": STRUCTS[Q]}
    made = {
        name: struct.shape for name, struct in lora_factors.factor_shapes(given, r"to_q|conv1|to_out|norm|token", 3).items()
    }
    assert made == {
        "blocks.0.attn1.to_q.lora_A.weight": (8, 3),
        "blocks.0.attn1.to_q.lora_B.weight": (3, 12),
        "blocks.0.attn1.to_out.0.lora_A.weight": (12, 3),
        "blocks.0.attn1.to_out.0.lora_B.weight": (3, 8),
        "blocks.0.conv1.lora_A.weight": (3, 3, 4, 3),
        "blocks.0.conv1.lora_B.weight": (1, 1, 3, 10),
    }


def test_the_rank_is_capped_at_each_layers_own():
    made = lora_factors.factor_shapes(STRUCTS, "", 1000)
    assert {name: made[f"{name[:-7]}.lora_B.weight"].shape[-2] for name in MATRICES} == dict(
        zip(MATRICES, (8, 8, 6, 10), strict=True)
    )
    assert all(made[f"{name[:-7]}.lora_A.weight"].shape[:-1] == SHAPES[name][:-1] for name in MATRICES)


def test_the_start_is_the_base():
    base, factors = draw(STRUCTS), lora_factors.init(STRUCTS, "", 4, KEY)
    assert {name: value.shape for name, value in factors.items()} == {
        name: struct.shape for name, struct in lora_factors.factor_shapes(STRUCTS, "", 4).items()
    }
    added = jax.jit(lora_factors.add)(base, factors, 2.0)
    assert all(np.array_equal(added[name], value) for name, value in base.items())


def test_the_draw_has_pefts_variance_and_hangs_on_key_and_name_alone():
    wide = {f"{name}.weight": jax.ShapeDtypeStruct((3, 3, 64, 256), jnp.float32) for name in "ab"}
    a, b = (value for name, value in lora_factors.init(wide, "", 128, KEY).items() if "lora_A" in name)
    assert a.dtype == np.float32
    assert a.std() == pytest.approx(1 / np.sqrt(3 * 576), rel=0.02)  # of uniform(-1, 1) / sqrt(fan_in)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    (alone, _) = lora_factors.init(wide, "b", 128, KEY).values()
    np.testing.assert_array_equal(alone, b)
    assert not np.array_equal(lora_factors.init(wide, "b", 128, jax.random.key(1))["b.lora_A.weight"], b)


@pytest.mark.parametrize("rank", [1, 5, 1000])
def test_add_is_the_lora_in_torchs_layout(rank):
    base, factors = draw(STRUCTS), trained(rank)
    added = jax.jit(lora_factors.add)(base, factors, 0.7)
    same(weights.to_torch(added), in_torch(base, factors, 0.7))
    changed = {name for name in base if not np.array_equal(added[name], base[name])}
    assert changed == set(MATRICES)


def test_weights_keep_their_dtype():
    half = cast({name: jnp.asarray(value) for name, value in draw(STRUCTS).items()}, jnp.bfloat16)
    added, exact = lora_factors.add(half, trained(), 1.0), lora_factors.add(cast(half, jnp.float32), trained(), 1.0)
    assert {value.dtype for value in added.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.array_equal(added[name], exact[name].astype(jnp.bfloat16)) for name in half)


def test_only_the_factors_learn():
    """The gradients are those of the product's: dA = s dW B^T, dB = s A^T dW; of a convolution over its h*w*in rows."""
    base, factors, slope, scale = draw(STRUCTS), trained(), draw(STRUCTS, 7), 0.7
    loss = lambda base, factors: sum(jnp.vdot(v, slope[name]) for name, v in lora_factors.add(base, factors, scale).items())
    to_base, to_factors = jax.jit(jax.grad(loss, (0, 1)))(base, factors)
    assert not any(np.any(value) for value in to_base.values())
    for name in MATRICES:
        a, b = (f"{name.removesuffix('.weight')}.lora_{part}.weight" for part in "AB")
        r, out = factors[b].shape[-2:]
        down, up, d = factors[a].reshape(-1, r), factors[b].reshape(r, out), slope[name].reshape(-1, out)
        np.testing.assert_allclose(to_factors[a].reshape(-1, r), scale * d @ up.T, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(to_factors[b].reshape(r, out), scale * down.T @ d, rtol=1e-4, atol=1e-4)


def test_a_real_unet_computes_what_its_merged_weights_compute():
    unet = make_unet(unet_config(tiny.UNET, tiny.TEXT, tiny.LATENT))
    base = tiny.random_params(unet.shapes, 0)
    blocks = sum(name.endswith("attn1.to_q.weight") for name in unet.shapes)
    assert len(lora_factors.factor_shapes(unet.shapes, DEFAULT, 3)) == blocks * 2 * 4 * 2  # attentions, projections, factors
    factors = {name: 0.3 * value for name, value in draw(lora_factors.factor_shapes(unet.shapes, "", 3)).items()}
    merged = weights.from_torch(in_torch(base, factors, 1.5), unet.shapes, "merged")
    z, context = draw({"z": np.zeros((2, *tiny.LATENT)), "c": np.zeros((2, tiny.LENGTH, tiny.WIDTH))}, 3).values()
    inputs = (jnp.asarray(z), jnp.asarray([900.0, 20.0]), jnp.asarray(context))
    forward = tiny.quick_jit(lambda p, f, s: unet.apply(lora_factors.add(p, f, s), *inputs))
    added, plain = forward(base, factors, 1.5), forward(base, factors, 0.0)
    assert np.abs(added - plain).max() > 0.1
    np.testing.assert_allclose(added, forward(merged, factors, 0.0), atol=1e-5 * np.abs(added).max())


def test_the_conversion_is_exact_and_the_file_means_the_same(tmp_path):
    """A scale that is a power of two, and layers of which one is capped: no bit of the others is lost in the file."""
    base, factors, scale = draw(STRUCTS), trained(7), lora_factors.scale_of(7, 14)
    layers, torch = lora_file.to_lora(factors, scale), weights.to_torch(factors)
    assert sorted(layers) == sorted(MATRICES)
    for name, layer in layers.items():
        stem = name.removesuffix(".weight")
        assert np.array_equal(layer.down, torch[f"{stem}.lora_A.weight"])
        assert np.array_equal(layer.up, torch[f"{stem}.lora_B.weight"])
    assert (layers[CONV].down.shape, layers[CONV].up.shape, layers[CONV].alpha) == ((7, 4, 3, 3), (10, 7, 1, 1), 14)
    assert layers["blocks.0.proj_in.weight"].alpha == 12  # its rank is 6

    save_file(lora_file.to_kohya(layers), tmp_path / "lora.safetensors")
    read = lora_file.from_kohya(load_file(tmp_path / "lora.safetensors"), STRUCTS)
    assert all(np.array_equal(read[name].down, layers[name].down) for name in (Q, CONV))
    same(weights.to_torch(lora_factors.add(base, factors, scale)), lora_file.apply_factors(weights.to_torch(base), read))


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (16.0, 1.0), (8.0, 0.5), (32.0, 2.0)])
def test_the_scale_is_alpha_over_rank(alpha, scale):
    assert lora_factors.scale_of(16, alpha) == scale


@pytest.mark.parametrize(
    ("layers", "rank", "line"),
    [
        ("to_(q", 4, r"--config.student.lora.layers='to_\(q' is not a regular expression: missing \)"),
        ("to_w", 4, "--config.student.lora.layers='to_w' matches none of 7 weights, such as blocks.0.attn1.to_out.0.bias$"),
        (
            "norm|bias|token",
            4,
            "must match linear or convolution weights, and matches 3 others: blocks.0.attn1.to_out.0.bias, ",
        ),
        (DEFAULT, 0, "--config.student.lora.rank=0 must be at least 1$"),
    ],
)
def test_what_makes_no_adapter_is_refused_in_one_line(layers, rank, line):
    for refused in (
        lambda: lora_factors.factor_shapes(STRUCTS, layers, rank),
        lambda: lora_factors.init(STRUCTS, layers, rank, KEY),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_factors_of_another_network_are_refused_in_one_line():
    base, factors = draw(STRUCTS), trained(5, "to_q|conv1")
    with pytest.raises(ValueError, match=f"^factors are not of this network: 1 missing in the base: {Q}$"):
        lora_factors.add({name: value for name, value in base.items() if name != Q}, factors, 1.0)
    with pytest.raises(ValueError, match=rf"1 of another shape: {Q} \(9, 12\) by \(8, 5\) and \(5, 12\)$"):
        lora_factors.add({**base, Q: np.zeros((9, 12), np.float32)}, factors, 1.0)
    del factors["blocks.0.conv1.lora_B.weight"]
    line = r"^factors must be pairs .*: 1 missing: blocks.0.conv1.lora_B.weight; 1 unexpected: a.weight$"
    for refused in (lambda f: lora_factors.add(base, f, 1.0), lambda f: lora_file.to_lora(f, 1.0)):
        with pytest.raises(ValueError, match=line):
            refused({**factors, "a.weight": np.zeros(1)})
    for alpha in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^--config.student.lora.alpha={alpha} must be 0 "):
            lora_factors.scale_of(4, alpha)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "alpha"), [(4, 0.0), (12, 18.0)])
def test_diffusers_draws_with_the_file_as_we_do_with_the_factors(tmp_path, rank, alpha):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny.write_model(tmp_path), safety_checker=None)
    unet = make_unet(dict(pipe.unet.config))
    base = weights.from_torch(weights.read_tensors(tmp_path / "unet"), unet.shapes, "stock")
    scale = lora_factors.scale_of(rank, alpha)
    factors = {name: 0.2 * value for name, value in draw(lora_factors.factor_shapes(unet.shapes, "", rank)).items()}
    z, context = draw({"z": np.zeros((2, *tiny.LATENT)), "c": np.zeros((2, tiny.LENGTH, tiny.WIDTH))}, 3).values()
    inputs = (jnp.asarray(z), jnp.asarray([900.0, 20.0]), jnp.asarray(context))
    ours = tiny.quick_jit(lambda f: unet.apply(lora_factors.add(base, f, scale), *inputs))(factors)

    given = torch.from_numpy(z.transpose(0, 3, 1, 2).copy()), torch.tensor([900, 20]), torch.from_numpy(context)
    answer = lambda: pipe.unet(*given).sample.detach().numpy().transpose(0, 2, 3, 1)
    before = answer()
    save_file(lora_file.to_kohya(lora_file.to_lora(factors, scale)), tmp_path / "lora.safetensors", metadata={"format": "pt"})
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert np.abs(before - ours).max() > 0.1 * np.abs(ours).max()
    np.testing.assert_allclose(answer(), ours, atol=1e-4 * np.abs(ours).max())
