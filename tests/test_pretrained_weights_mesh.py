"""Parameters are born where they live: bit-equal to `from_torch` on any mesh; of a file only the shards are read."""

from collections import Counter
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from proreflow_jax.pretrained import weights
from proreflow_jax.runtime import mesh

SIZES = {  # in our layout
    "conv.weight": (3, 3, 8, 16),
    "up.weight": (3, 3, 24, 8),  # more inputs than outputs: fsdp cuts torch's inner axis
    "conv.bias": (16,),
    "linear.weight": (16, 8),
    "embeddings.token_embedding.weight": (40, 8),
    "mid.attentions.0.to_q.weight": (8, 8),
}
SHAPES = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SIZES.items()}
RULES = {  # name -> rules of mesh.specs
    "fsdp": [(".*", mesh.FSDP)],
    "replicated": [(".*", PartitionSpec())],
    "two axes": [("conv.weight", PartitionSpec(None, None, "fsdp", "tensor")), (".*", mesh.FSDP)],
}
MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 2, 2)}  # devices -> (data, fsdp, tensor)


def torch_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors of SHAPES under torch's names in torch's layout, one under its old name."""
    rng = np.random.default_rng(0)
    made = {n: rng.standard_normal(shape) for n, shape in SIZES.items()}
    turned = {n: v.transpose(3, 2, 0, 1) if v.ndim == 4 else v if "token" in n else v.T for n, v in made.items()}
    return {n.replace("to_q", "query"): np.ascontiguousarray(v, dtype) for n, v in turned.items()}


@pytest.fixture
def file(tmp_path: Path) -> weights.Tensors:
    save_file(torch_tensors(), tmp_path / "model.safetensors")
    return weights.read_tensors(tmp_path)


def shardings(devices: int, rules: str = "fsdp", axes: tuple[int, int, int] | None = None) -> dict[str, NamedSharding]:
    """Where each parameter lies on the first few devices."""
    made = mesh.make_mesh(*(axes or MESHES[devices]), devices=jax.devices()[:devices])
    return mesh.shardings(made, mesh.specs(RULES[rules], SIZES, made))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Bytes read from files by name of tensor, and the number of readings under (name, "times")."""
    found, part = Counter(), weights.Tensors.part

    def counted(self: weights.Tensors, name: str, index: tuple[slice, ...]) -> np.ndarray:
        value = part(self, name, index)
        found.update({name: value.nbytes, (name, "times"): 1})
        return value

    monkeypatch.setattr(weights.Tensors, "part", counted)
    return found


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("devices", MESHES)
def test_any_mesh_holds_what_from_torch_gives(file, devices, rules):
    expected, where = weights.from_torch(file, SHAPES, "file"), shardings(devices, rules)
    for source in (file, torch_tensors()):
        placed = weights.place(source, SHAPES, where, "file")
        assert list(placed) == list(SHAPES)
        for name, value in placed.items():
            assert value.sharding == where[name] and value.dtype == np.float32
            assert np.array_equal(np.asarray(value), expected[name]), name
            for shard in value.addressable_shards:
                assert np.array_equal(np.asarray(shard.data), expected[name][shard.index]), name


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_in_parts_too_and_may_stay_half(tmp_path, stored):
    save_file(torch_tensors(stored), tmp_path / "model.safetensors")
    file = weights.read_tensors(tmp_path)
    for dtype in (np.float32, stored):
        placed = weights.place(file, SHAPES, shardings(4), "file", dtype)
        expected = weights.from_torch(file, SHAPES, "file", dtype)
        assert all(value.dtype == dtype and np.array_equal(value, expected[name]) for name, value in placed.items())


def test_each_device_of_four_costs_a_quarter_of_the_model(file, reads):
    placed = weights.place(file, SHAPES, shardings(4, axes=(1, 4, 1)), "file")
    times = [count for key, count in reads.items() if isinstance(key, tuple)]
    model = sum(value.nbytes for value in torch_tensors().values())
    assert sum(count for key, count in reads.items() if isinstance(key, str)) == model
    assert times == [4] * len(SIZES)
    for device in jax.devices()[:4]:
        shards = [s.data.nbytes for value in placed.values() for s in value.addressable_shards if s.device == device]
        assert sum(shards) == model // 4


def test_a_process_reads_what_its_devices_hold_and_nothing_else(file, reads):
    """The callback is all that reads; the slices of one device's shards, as one process of four would ask for them."""
    where = shardings(4, axes=(1, 4, 1))
    first = jax.devices()[0]
    expected = weights.from_torch(torch_tensors(), SHAPES, "file")
    for name, torch in weights.names_today(file, SHAPES).items():
        index = where[name].devices_indices_map(SIZES[name])[first]
        read = weights._reader(name, lambda at, torch=torch: file.part(torch, at), np.float32, [])
        assert np.array_equal(read(index), expected[name][index])
    model = sum(value.nbytes for value in torch_tensors().values())
    assert sum(count for key, count in reads.items() if isinstance(key, str)) == model // 4


def test_what_several_devices_hold_is_read_once(file, reads):
    """Whole on eight devices: once. Split in two over four pairs of devices: each half once."""
    weights.place(file, SHAPES, shardings(8, "replicated"), "file")
    assert {reads[name, "times"] for name in file} == {1}
    reads.clear()
    weights.place(file, SHAPES, shardings(8, axes=(4, 2, 1)), "file")
    assert {reads[name, "times"] for name in file} == {2}
    assert sum(reads[name] for name in file) == sum(value.nbytes for value in torch_tensors().values())


def test_a_plain_mapping_gives_each_tensor_once():
    taken = []

    class Lazy(dict):
        def __getitem__(self, name):
            taken.append(name)
            return super().__getitem__(name)

    weights.place(Lazy(torch_tensors()), SHAPES, shardings(8), "lazy")
    assert sorted(taken) == sorted(torch_tensors())


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (lambda t: t.pop("conv.bias"), ("1 missing: conv.bias",)),
        (lambda t: t.update({"stranger.bias": np.zeros(1, np.float32)}), ("1 unexpected: stranger.bias",)),
        (lambda t: t.update({"linear.weight": np.zeros((16, 8), np.float32)}), ("linear.weight (8, 16) instead of (16, 8)",)),
        (lambda t: t["up.weight"].__setitem__((7, 23, 2, 2), np.inf), ("1 not finite: up.weight",)),
        (
            lambda t: t.update({"conv.bias": np.full(16, np.nan, np.float32), "up.weight": np.full((8, 24, 3, 3), np.nan)}),
            ("2 not finite: conv.bias, up.weight",),
        ),
    ],
    ids=["missing", "unexpected", "shape", "infinite", "two"],
)
def test_what_does_not_fit_is_named_as_by_from_torch(tmp_path, change, needles, lazy):
    tensors = torch_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    source = weights.read_tensors(tmp_path) if lazy else tensors
    with pytest.raises(ValueError) as placed:
        weights.place(source, SHAPES, shardings(4, axes=(1, 4, 1)), "some/unet")
    with pytest.raises(ValueError) as whole:
        weights.from_torch(source, SHAPES, "some/unet")
    assert str(placed.value) == str(whole.value) and "\n" not in str(placed.value)
    assert [needle for needle in needles if needle not in str(placed.value)] == []


def test_names_and_shapes_are_refused_before_anything_is_read(tmp_path, reads):
    for change in ({"stranger": np.zeros(1)}, {"linear.weight": np.zeros((3, 3))}):
        save_file(torch_tensors() | change, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"unexpected|another shape"):
            weights.place(weights.read_tensors(tmp_path), SHAPES, shardings(2), "some/unet")
    assert not reads
