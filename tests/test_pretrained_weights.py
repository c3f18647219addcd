"""Conversion is total: torch -> ours -> torch is bit-equal, and whatever does not fit is named in one line."""

import json
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from proreflow_jax.models import network
from proreflow_jax.pretrained import weights

UNET = dict(
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    block_out_channels=[4, 8],
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=2,
    cross_attention_dim=6,
    in_channels=4,
    out_channels=4,
)
CLIP = dict(hidden_size=6, vocab_size=11, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1)
CLIP |= dict(projection_dim=5, max_position_embeddings=7, architectures=["CLIPTextModelWithProjection"])
SHAPES = {
    "unet": network.make_unet(UNET).shapes,
    "unet, linear": network.make_unet(UNET | dict(use_linear_projection=True)).shapes,
    "vae": network.make_vae(dict(block_out_channels=[4, 8], latent_channels=3, norm_num_groups=2)).shapes,
    "text": network.make_text_encoder(CLIP).shapes,
}
SMALL = {
    "conv.weight": jax.ShapeDtypeStruct((3, 3, 2, 4), np.float32),
    "conv.bias": jax.ShapeDtypeStruct((4,), np.float32),
    "linear.weight": jax.ShapeDtypeStruct((2, 5), np.float32),
    "token_embedding.weight": jax.ShapeDtypeStruct((6, 3), np.float32),
}
TABLES = ("token_embedding.weight", "position_embedding.weight")


def torch_tensors(shapes, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors in torch's layout for these shapes, made without our converter."""
    rng = np.random.default_rng(0)
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    axes = lambda name, shape: (0, 1) if name.endswith(TABLES) else order[len(shape)]
    shape = lambda name, value: [value.shape[axis] for axis in axes(name, value.shape)]
    return {name: rng.normal(size=shape(name, value)).astype(dtype) for name, value in shapes.items()}


def one_line(caught) -> str:
    """The error's text, which must be one line."""
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", SHAPES)
def test_round_trip_is_bit_equal(kind):
    before = torch_tensors(SHAPES[kind])
    ours = weights.from_torch(before, SHAPES[kind], kind)
    assert {name: value.shape for name, value in ours.items()} == {n: s.shape for n, s in SHAPES[kind].items()}
    after = weights.to_torch(ours)
    assert after.keys() == before.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(value.flags["C_CONTIGUOUS"] for value in after.values())


def test_layouts_by_hand():
    """Convolutions (out, in, h, w) -> (h, w, in, out), linear (out, in) -> (in, out), tables as they are."""
    before = torch_tensors(SMALL)
    ours = weights.from_torch(before, SMALL, "small")
    assert ours["conv.weight"][1, 2, 0, 3] == before["conv.weight"][3, 0, 1, 2]
    assert ours["linear.weight"][1, 4] == before["linear.weight"][4, 1]
    assert np.array_equal(ours["token_embedding.weight"], before["token_embedding.weight"])


def test_missing_tensor_is_named():
    tensors = torch_tensors(SMALL)
    del tensors["linear.weight"]
    with pytest.raises(ValueError, match=r"1 missing: linear\.weight") as caught:
        weights.from_torch(tensors, SMALL, "some/unet")
    assert one_line(caught).startswith("some/unet")


def test_unexpected_tensor_is_named():
    with pytest.raises(ValueError, match=r"1 unexpected: stranger\.bias") as caught:
        weights.from_torch(torch_tensors(SMALL) | {"stranger.bias": np.zeros(1)}, SMALL, "small")
    one_line(caught)


def test_wrong_shape_is_named_with_both_shapes():
    with pytest.raises(ValueError, match=r"conv\.bias \(5,\) instead of \(4,\)") as caught:
        weights.from_torch(torch_tensors(SMALL) | {"conv.bias": np.zeros(5)}, SMALL, "small")
    one_line(caught)


def test_transposed_linear_weight_is_refused():
    tensors = torch_tensors(SMALL)
    tensors["linear.weight"] = tensors["linear.weight"].T
    with pytest.raises(ValueError, match=r"linear\.weight \(5, 2\) instead of \(2, 5\)"):
        weights.from_torch(tensors, SMALL, "small")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensor_that_is_not_finite_is_named(value):
    tensors = torch_tensors(SMALL)
    tensors["conv.weight"][1, 1, 1, 1] = value
    with pytest.raises(ValueError, match=r"1 not finite: conv\.weight") as caught:
        weights.from_torch(tensors, SMALL, "small")
    one_line(caught)


def test_all_kinds_of_mismatch_stand_in_one_error_and_long_lists_are_counted():
    tensors = {"conv.bias": np.full(4, np.nan), "linear.weight": np.zeros((2, 2))}
    tensors |= {f"extra.{i}": np.zeros(1) for i in range(9)}
    with pytest.raises(ValueError) as caught:
        weights.from_torch(tensors, SMALL, "small")
    text = one_line(caught)
    parts = ["2 missing: conv.weight, token", "9 unexpected: extra.0", "and 5 more", "linear.weight (2, 2)"]
    assert [part for part in (*parts, "not finite: conv.bias") if part not in text] == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_become_float32_without_a_change_of_value(tmp_path, dtype):
    tensors = torch_tensors(SMALL, dtype)
    weights.save_tensors(tmp_path / "model.safetensors", tensors)
    ours = weights.from_torch(weights.read_tensors(tmp_path), SMALL, "half")
    assert all(value.dtype == np.float32 for value in ours.values())
    back = weights.to_torch(ours, dtype)
    assert all(value.dtype == dtype and np.array_equal(value, tensors[name]) for name, value in back.items())


def test_saved_file_is_what_diffusers_expects(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.save_tensors(path, torch_tensors(SMALL))
    header = path.read_bytes()[8:200].decode()
    assert '"__metadata__":{"format":"pt"}' in header
    assert load_file(path).keys() == SMALL.keys()


def shard(folder: Path, tensors: dict[str, np.ndarray], names: dict[str, str] | None = None) -> None:
    """Writes two shards and an index, the index with `names` laid over the right file names."""
    keys, half = list(tensors), len(tensors) // 2
    files = {"model-00001-of-00002.safetensors": keys[:half], "model-00002-of-00002.safetensors": keys[half:]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    table = {key: file for file, keys in files.items() for key in keys} | (names or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_sharded_files_are_joined(tmp_path):
    before = torch_tensors(SMALL)
    shard(tmp_path, before)
    after = weights.read_tensors(tmp_path)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "C:\\model", ""])
def test_index_cannot_point_outside_its_folder(tmp_path, name):
    """Even where the file is there and valid."""
    save_file({"conv.bias": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    shard(folder, torch_tensors(SMALL), {"conv.bias": name})
    with pytest.raises(ValueError, match="is not a plain file name") as caught:
        weights.read_tensors(folder)
    one_line(caught)


@pytest.mark.parametrize("variant, dtype", [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_half_precision_variants_are_read_and_full_precision_comes_first(tmp_path, variant, dtype):
    half = torch_tensors(SMALL, dtype)
    shard(tmp_path, half)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / f"model.safetensors.index.{variant}.json")
    assert all(np.array_equal(weights.read_tensors(tmp_path)[name], half[name]) for name in half)
    weights.save_tensors(tmp_path / f"model.{variant}.safetensors", {"whole": half["conv.bias"]})
    assert list(weights.read_tensors(tmp_path)) == ["whole"]
    weights.save_tensors(tmp_path / "model.safetensors", torch_tensors(SMALL))
    assert weights.read_tensors(tmp_path)["conv.bias"].dtype == np.float32


def test_a_pickle_is_refused_with_what_converts_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*save_pretrained") as caught:
        weights.read_tensors(tmp_path)
    one_line(caught)


def test_a_model_never_lies_in_memory_twice(tmp_path, monkeypatch):
    """While tensors become parameters, at most one of those read is alive."""
    weights.save_tensors(tmp_path / "model.safetensors", torch_tensors(SMALL, np.float16))
    alive, most = weakref.WeakSet(), []
    read = weights.Tensors.__getitem__

    def counted(self, name):
        alive.add(kept := read(self, name).view(Counted))
        most.append(len(alive))
        return kept

    monkeypatch.setattr(weights.Tensors, "__getitem__", counted)
    assert len(weights.from_torch(weights.read_tensors(tmp_path), SMALL, "half")) == len(most) == len(SMALL)
    assert max(most) <= 2  # the one being read, and the one before, which its variable still holds


class Counted(np.ndarray):
    """An array that can be referred to weakly and hashed."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_missing_shard_is_named(tmp_path):
    shard(tmp_path, torch_tensors(SMALL))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="model-00002-of-00002") as caught:
        weights.read_tensors(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as caught:
        weights.read_tensors(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    weights.save_tensors(path, torch_tensors(SMALL))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file") as caught:
        weights.read_tensors(tmp_path)
    one_line(caught)


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors") as caught:
        weights.read_tensors(tmp_path)
    assert str(tmp_path) in one_line(caught)


def test_a_written_file_is_as_readable_as_the_umask_has_it(tmp_path):
    (tmp_path / "plain").touch()
    weights.save_tensors(tmp_path / "model.safetensors", {"a": np.zeros(3, np.float32)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
