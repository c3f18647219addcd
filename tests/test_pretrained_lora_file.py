"""A delta's LoRA is its best approximation of that rank, and diffusers reads the file as the same student."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_model

from proreflow_jax.pretrained import lora_file, weights

SHAPES = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "down_blocks.0.attentions.0.norm.weight": (8,),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 6, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (12, 8),
    "down_blocks.0.resnets.0.time_emb_proj.weight": (6, 16),
    "mid_block.resnets.1.conv2.weight": (4, 12, 3, 3),
}
NAMES = {
    "conv_in": "conv_in",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "down_blocks.0.downsamplers.0.conv": "down_blocks_0_downsamplers_0_conv",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "add_embedding.linear_2": "label_emb_0_2",
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: list[str]) -> float:
    """|one - other| / |one| over these tensors."""
    part = lambda tensors: np.concatenate([np.float64(tensors[name]).ravel() for name in names])
    return float(np.linalg.norm(part(one) - part(other)) / np.linalg.norm(part(one)))


def products(factors: dict[str, lora_file.Factors]) -> dict[str, np.ndarray]:
    return {name: lora_file.product(layer) for name, layer in factors.items()}


def file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_base_and_delta_make_the_student_again():
    base, student = draw(SHAPES, 0), draw(SHAPES, 1)
    change = lora_file.delta(student, base)
    assert distance(student, lora_file.merge_delta(base, change), list(SHAPES)) < 1e-6
    halfway = {name: (base[name] + student[name]) / 2 for name in base}
    assert distance(halfway, lora_file.merge_delta(base, change, 0.5), list(SHAPES)) < 1e-6
    half = {name: value.astype(np.float16) for name, value in base.items()}
    merged = lora_file.merge_delta(half, lora_file.delta(student, half))
    assert {value.dtype for value in merged.values()} == {np.dtype(np.float16)}
    assert distance(student, merged, list(SHAPES)) < 1e-3
    assert {lora_file.delta(*two)["conv_in.weight"].dtype for two in ((student, half), (half, student))} == {
        np.dtype(np.float32)
    }


def test_files_are_read_once(tmp_path, monkeypatch):
    """Tensor by tensor, and no tensor a second time for its shape."""
    read, get = [], weights.Tensors.__getitem__
    monkeypatch.setattr(weights.Tensors, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    base, change = (weights.Tensors([file(tmp_path / str(seed), draw(SHAPES, seed))]) for seed in (0, 1))
    lora_file.merge_delta(base, change)
    assert sorted(read) == sorted([*SHAPES] * 2)
    read.clear()
    lora_file.apply_factors(base, lora_file.decompose(draw(SHAPES), 2)[0])
    assert sorted(read) == sorted(SHAPES)


def test_strided_arrays_survive_the_file(tmp_path):
    """Ours come transposed from jax's layout, and safetensors writes the bytes of a strided array in their own order."""
    base, student = draw({"a.weight": (3, 5)}, 0), draw({"a.weight": (5, 3)}, 1)
    student = {"a.weight": student["a.weight"].T}
    base = {"a.weight": np.asfortranarray(base["a.weight"])}
    change = lora_file.delta(student, base)
    np.testing.assert_array_equal(load_file(file(tmp_path / "d", change))["a.weight"], change["a.weight"])
    merged = lora_file.merge_delta(base, change)
    np.testing.assert_array_equal(load_file(file(tmp_path / "m", merged))["a.weight"], merged["a.weight"])
    factors = lora_file.decompose(change, 2)[0]
    strided = {n: lora_file.Factors(np.asfortranarray(f.up), np.asfortranarray(f.down), f.alpha) for n, f in factors.items()}
    read = load_file(file(tmp_path / "f", lora_file.to_kohya(strided)))
    assert all(np.array_equal(read[name], value) for name, value in lora_file.to_kohya(factors).items())


def test_full_rank_is_the_delta_itself():
    change = draw(SHAPES)
    factors, report = lora_file.decompose(change, 1000)
    assert sorted(factors) == sorted(MATRICES)
    assert distance(change, products(factors), MATRICES) < 1e-5
    assert report["energy"] == pytest.approx(1, abs=1e-9)
    ranks = {name: layer.down.shape[0] for name, layer in factors.items()}
    assert ranks == {name: min(SHAPES[name][0], int(np.prod(SHAPES[name][1:]))) for name in MATRICES}
    assert all(layer.alpha == ranks[name] for name, layer in factors.items())
    conv = factors["conv_in.weight"]
    assert (conv.up.shape, conv.down.shape) == ((8, 8, 1, 1), (8, 4, 3, 3))


def test_factors_are_balanced():
    for layer in lora_file.decompose(draw(SHAPES), 3)[0].values():
        up, down = layer.up.reshape(-1, 3), layer.down.reshape(3, -1)
        np.testing.assert_allclose(up.T @ up, down @ down.T, atol=1e-5)  # and both are diagonal: the singular values
        np.testing.assert_allclose(up.T @ up, np.diag(np.diag(up.T @ up)), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_error_is_the_root_of_the_discarded_energy(rank):
    """Eckart-Young; numpy's SVD is the witness."""
    change = draw(SHAPES)
    spectra = [np.linalg.svd(change[n].reshape(len(change[n]), -1).astype(np.float64))[1] ** 2 for n in MATRICES]
    discarded = sum(s[rank:].sum() for s in spectra) / sum(s.sum() for s in spectra)
    factors, report = lora_file.decompose(change, rank)
    assert distance(change, products(factors), MATRICES) == pytest.approx(np.sqrt(discarded), rel=1e-5)
    assert report["error"] == pytest.approx(np.sqrt(discarded), rel=1e-6)
    assert report["energy"] == pytest.approx(1 - discarded, rel=1e-6)


def test_no_other_factors_come_closer():
    """Neither random directions, each with the best second factor, nor the LoRA's own ones a little turned."""
    rng, rank = np.random.default_rng(3), 3
    for name, layer in lora_file.decompose(draw(SHAPES), rank)[0].items():
        matrix = draw(SHAPES)[name].reshape(SHAPES[name][0], -1)
        best = np.linalg.norm(matrix - lora_file.product(layer).reshape(matrix.shape))
        own = layer.up.reshape(-1, rank)
        for turned in (0.01, 0.1, 1e6):
            for _ in range(20):
                q = np.linalg.qr(own + turned * rng.standard_normal(own.shape))[0]
                assert np.linalg.norm(matrix - q @ (q.T @ matrix)) > best


def test_energy_grows_with_rank_to_one_and_agrees_with_decompose():
    change, ranks = draw(SHAPES), [1, 2, 3, 5, 7, 1000]
    table = lora_file.decompose(change, 4, ranks)[1]["energies"]
    assert [row[0] for row in table] == ranks
    assert np.all(np.diff([row[1] for row in table]) > 0)
    assert table[-1][1] == pytest.approx(1, abs=1e-12)
    for rank, energy, error in table:
        report = lora_file.decompose(change, rank)[1]
        assert (report["energy"], report["error"]) == pytest.approx((energy, error), abs=1e-6)


def test_the_report_tells_what_is_lost():
    change = draw(SHAPES)
    change["conv_in.weight"] *= 0  # a layer that did not change gets no factors
    outer = np.outer(np.arange(1, 13), np.arange(1, 9)).astype(np.float32)
    change["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"] = outer
    factors, report = lora_file.decompose(change, 1)
    assert "conv_in.weight" not in factors
    assert (report["rank"], report["layers"]) == (1, 4)
    assert report["parameters"] == (8 + 6) + (12 + 8) + (6 + 16) + (4 + 108)
    shares = [share for _, _, share in report["worst"]]
    assert shares == sorted(shares)
    assert report["worst"][-1] == (MATRICES[2], 1, pytest.approx(1))
    vectors = ["conv_in.bias", "down_blocks.0.attentions.0.norm.weight"]
    energy = lambda names: sum(np.sum(np.float64(change[name]) ** 2) for name in names)
    assert report["left_out"] == {"tensors": 2, "energy": pytest.approx(energy(vectors) / energy(SHAPES))}


def test_what_does_not_fit_is_refused_in_one_line():
    base, more = draw(SHAPES), {f"x{i}.weight": np.zeros((2, 2), np.float32) for i in range(6)}
    other = {**base, **more, "conv_in.bias": np.zeros(9, np.float32)}
    del other["conv_in.weight"]
    line = (
        "student and base are not of the same network: 6 only in the student: x0.weight, x1.weight, x2.weight, x3.weight "
        "and 2 more; 1 only in the base: conv_in.weight; 1 of another shape: conv_in.bias (9,) against (8,)"
    )
    with pytest.raises(ValueError) as caught:
        lora_file.delta(other, base)
    assert str(caught.value) == line
    with pytest.raises(ValueError, match="base and delta are not of the same network: 1 only in the base: conv_in.weight; "):
        lora_file.merge_delta(base, other)
    factors = lora_file.decompose(base, 2)[0]
    with pytest.raises(ValueError, match="^base and LoRA are not of the same network: 1 only in the LoRA: conv_in.weight$"):
        lora_file.apply_factors({n: v for n, v in base.items() if n != "conv_in.weight"}, factors)
    with pytest.raises(ValueError, match=r"1 of another shape: conv_in.weight \(8, 5, 3, 3\) against \(8, 4, 3, 3\)"):
        lora_file.apply_factors({**base, "conv_in.weight": np.zeros((8, 5, 3, 3), np.float32)}, factors)
    with pytest.raises(ValueError, match="rank 0: .*--rank"):
        lora_file.decompose(base, 0)
    with pytest.raises(ValueError, match="rank 0: .*--rank"):
        lora_file.decompose(base, 4, [0])
    with pytest.raises(ValueError, match="no LoRA between them"):
        lora_file.decompose(lora_file.delta(base, base), 2)
    with pytest.raises(ValueError, match="1 not finite: conv_in.bias"):
        lora_file.decompose({**base, "conv_in.bias": np.full(8, np.nan, np.float32)}, 2)


def test_names_are_kohyas():
    assert {name: lora_file.kohya_name(f"{name}.weight") for name in NAMES} == {
        n: f"lora_unet_{kohyas}" for n, kohyas in NAMES.items()
    }
    tensors = lora_file.to_kohya(lora_file.decompose(draw(SHAPES), 3)[0])
    stems = [lora_file.kohya_name(name) for name in MATRICES]
    assert sorted(tensors) == sorted(f"{s}.{part}" for s in stems for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (8, 3, 1, 1)


def test_a_kohya_layer_means_alpha_over_rank_times_up_down_with_one_alpha_for_all():
    factors = lora_file.decompose(draw(SHAPES), 8)[0]
    assert len({layer.alpha for layer in factors.values()}) > 1
    tensors = lora_file.to_kohya(factors)
    assert {float(value) for name, value in tensors.items() if name.endswith("alpha")} == {8.0}
    for name, layer in factors.items():
        up, down = (tensors[f"{lora_file.kohya_name(name)}.lora_{part}.weight"] for part in ("up", "down"))
        r = len(down)
        meant = 8 / r * (up.reshape(-1, r) @ down.reshape(r, -1))
        np.testing.assert_allclose(meant.reshape(SHAPES[name]), lora_file.product(layer), atol=1e-5)


def test_pefts_names_hold_no_alpha_and_one_rank_and_give_the_factors_back():
    factors = lora_file.decompose(draw(SHAPES), 8)[0]
    factors |= {name: layer._replace(alpha=3.0 * layer.alpha) for name, layer in list(factors.items())[:2]}
    tensors = lora_file.to_peft(factors)
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")} == {8}
    assert tensors.keys() == {f"unet.{n.removesuffix('.weight')}.lora_{x}.weight" for n in factors for x in "AB"}
    again = lora_file.from_peft(tensors, SHAPES)
    assert again.keys() == factors.keys()
    for name, value in products(factors).items():
        np.testing.assert_allclose(lora_file.product(again[name]), value, atol=1e-5)


def changed(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A student far from the base in every linear and convolution weight, and nowhere else."""
    rng = np.random.default_rng(5)
    noise = lambda v: (0.5 * v.std() * rng.standard_normal(v.shape)).astype(np.float32) if v.ndim > 1 else 0
    return {name: value + noise(value) for name, value in base.items()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """(stock pipeline, its UNet's tensors, the UNet's answer as a function of the UNet)."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = write_model(tmp_path_factory.mktemp("stock"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    normal = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x, context = normal(2, 4, 4, 4), normal(2, 8, 8)
    answer = lambda: pipe.unet(x, torch.tensor([900, 20]), context).sample.detach().numpy()
    with torch.no_grad():
        yield pipe, weights.read_tensors(folder / "unet"), answer


def gap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


NAMINGS = pytest.mark.parametrize("write", [lora_file.to_kohya, lora_file.to_peft])


@NAMINGS
@pytest.mark.parametrize("rank", [1000, 12])
def test_diffusers_reads_the_file_as_the_student(stock, tmp_path, rank, write):
    torch = pytest.importorskip("torch")
    pipe, base, answer = stock
    put = lambda tensors: pipe.unet.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    put(base)
    change = lora_file.delta(changed(base), base)
    factors = lora_file.decompose(change, rank)[0]
    assert len({layer.alpha for name, layer in factors.items() if "attn" in name}) > 1  # capped ones among the others
    file(tmp_path / "lora.safetensors", write(factors))
    before = answer()
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = answer()
    pipe.unload_lora_weights()
    assert gap(answer(), before) == 0
    put(lora_file.merge_delta(base, change) if rank == 1000 else lora_file.apply_factors(base, factors))
    assert gap(answer(), before) > 0.1  # the delta matters
    assert gap(loaded, answer()) < 1e-3


@NAMINGS
def test_sdxls_own_embedding_is_read_too(tmp_path, write):
    """add_embedding, which diffusers knows under kohya's name for it only."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = dict(sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=(2, 4))
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    states = dict(cross_attention_dim=8, transformer_layers_per_block=(1, 2), use_linear_projection=True)
    micro = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56)
    unet = diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes, **states, **micro)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.rand(2, 6) * 8}
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([900, 20]), torch.randn(2, 8, 8))
    answer = lambda: unet(*inputs, added_cond_kwargs=added).sample.detach().numpy()
    base = {name: value.numpy().copy() for name, value in unet.state_dict().items()}
    student = changed(base)
    file(tmp_path / "lora.safetensors", write(lora_file.decompose(lora_file.delta(student, base), 1000)[0]))
    stock = diffusers.StableDiffusionXLPipeline
    tensors, alphas = stock.lora_state_dict(tmp_path, weight_name="lora.safetensors", unet_config=unet.config)
    stock.load_lora_into_unet(tensors, alphas, unet)
    loaded = answer()
    unet.unload_lora()
    before = answer()
    unet.load_state_dict({name: torch.from_numpy(value) for name, value in student.items()})
    assert gap(answer(), before) > 0.1
    assert gap(loaded, answer()) < 1e-3
