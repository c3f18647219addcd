"""The mesh: rules are total and ordered, what does not divide is replicated, rows land where they belong."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.mesh import COLUMN, FSDP, ROW


def test_one_axis_takes_the_devices_that_are_left() -> None:
    mesh = mesh_lib.make_mesh(data=-1, fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, 3, 1), (-1, -1, -1), (-1, -1, 3), (-1, -1, 16), (0, 8, 1), (1, 1, 16)])
def test_impossible_axes_are_refused_with_their_flags(axes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"--config\.mesh\.data=.*--config\.mesh\.fsdp=.*--config\.mesh\.tensor="):
        mesh_lib.make_mesh(*axes)


def test_first_matching_rule_decides() -> None:
    mesh = mesh_lib.make_mesh(data=1, fsdp=8)
    rules = [("norm", PartitionSpec()), (r"weight$", PartitionSpec("fsdp")), (".*", FSDP)]
    shapes = {"norm.weight": (16,), "conv.weight": (8, 64), "conv.bias": (64,)}
    assert mesh_lib.specs(rules, shapes, mesh) == {
        "norm.weight": PartitionSpec(),
        "conv.weight": PartitionSpec("fsdp"),
        "conv.bias": PartitionSpec("fsdp"),
    }


def test_names_without_a_rule_are_listed_in_one_error() -> None:
    mesh = mesh_lib.make_mesh()
    with pytest.raises(ValueError, match=r"a\.bias, b\.bias"):
        mesh_lib.specs([("weight", PartitionSpec())], {"a.bias": (1,), "a.weight": (1,), "b.bias": (1,)}, mesh)


def test_a_dimension_that_does_not_divide_is_replicated() -> None:
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    rules = [("pair", PartitionSpec(("data", "fsdp"), "tensor")), (".*", PartitionSpec("fsdp", "tensor"))]
    got = mesh_lib.specs(rules, {"odd": (3, 4), "even": (2, 5), "pair": (6, 2)}, mesh)
    assert got["odd"] == PartitionSpec(None, "tensor")
    assert got["even"] == PartitionSpec("fsdp", None)
    assert got["pair"] == PartitionSpec(None, "tensor")  # 6 = 2 x 3 does not split over 2 x 2


@pytest.mark.parametrize("value", [PartitionSpec("fsdp", None), PartitionSpec("model")])
def test_a_rule_that_cannot_hold_is_refused(value: PartitionSpec) -> None:
    with pytest.raises(ValueError, match=r"bias.*--config\.mesh\.rules"):
        mesh_lib.specs([(".*", value)], {"bias": (8,)}, mesh_lib.make_mesh())


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 3, 3, 32), PartitionSpec(None, None, None, "fsdp")),
        ((64, 32), PartitionSpec("fsdp")),
        ((33, 8), PartitionSpec(None, "fsdp")),  # the larger one does not divide
        ((8, 8), PartitionSpec(None, "fsdp")),
        ((7,), PartitionSpec()),
        ((), PartitionSpec()),
        ((0, 8), PartitionSpec(None, "fsdp")),
    ],
)
def test_fsdp_splits_the_largest_dimension_that_divides(shape: tuple[int, ...], spec: PartitionSpec) -> None:
    mesh = mesh_lib.make_mesh(data=1, fsdp=8)
    assert mesh_lib.fsdp_spec(shape, mesh) == spec
    placed = jax.device_put(np.zeros(shape, np.float32), mesh_lib.shardings(mesh, {"x": spec})["x"])
    assert placed.is_fully_replicated == (spec == PartitionSpec())


@pytest.mark.parametrize(
    ("shape", "column", "row"),
    [
        ((16, 64), (None, "tensor"), ("tensor", "fsdp")),
        ((64, 16), ("fsdp", "tensor"), ("tensor", "fsdp")),
        ((3, 3, 8, 16), (None, None, "fsdp", "tensor"), (None, None, "tensor", "fsdp")),
        ((16,), ("tensor",), ("fsdp",)),  # a bias belongs to the outputs
        ((5, 7), (), ()),
        ((6, 16), (None, "tensor"), ("tensor", "fsdp")),
        ((0, 0), (), ()),
    ],
)
def test_layers_split_by_outputs_or_inputs_and_fsdp_takes_the_rest(shape: tuple, column: tuple, row: tuple) -> None:
    mesh = mesh_lib.make_mesh(data=1, fsdp=4, tensor=2)
    if shape == (16, 64):
        column = ("fsdp", "tensor")  # the only other dimension
    found = mesh_lib.specs([("a", COLUMN), ("b", ROW)], {"a": shape, "b": shape}, mesh)
    assert found == {"a": PartitionSpec(*column), "b": PartitionSpec(*row)}


def test_without_a_tensor_axis_split_layers_lie_as_all_others() -> None:
    mesh = mesh_lib.make_mesh(data=1, fsdp=8)
    for shape in ((16, 64), (64, 16), (3, 3, 8, 16), (16,), (7, 7)):
        found = mesh_lib.specs([("a", COLUMN), ("b", ROW)], {"a": shape, "b": shape}, mesh)
        assert set(found.values()) == {mesh_lib.fsdp_spec(shape, mesh)}


@dataclass(frozen=True)
class Chip:
    """A TPU chip as far as a mesh asks: v5e hosts have 2x2 chips each, as in the slice v5e:4x4."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def v5e_chips(slices: int, side: int) -> list[Chip]:
    """The chips of some slices of side x side, host by host, as jax lists them."""
    per_slice, hosts = side * side, side // 2
    place = lambda i: (i % 4 % 2 + 2 * (i // 4 % hosts), i % 4 // 2 + 2 * (i // 4 // hosts))
    return [
        Chip(s * per_slice + i, s * per_slice // 4 + i // 4, s, (*place(i), 0)) for s in range(slices) for i in range(per_slice)
    ]


def test_slices_lie_along_the_data_axis_and_nothing_else_crosses_them() -> None:
    chips = v5e_chips(slices=2, side=4)
    mesh = mesh_lib.make_mesh(1, -1, 1, chips[::-1], slices=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = mesh_lib.make_mesh(-1, 4, 2, chips, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 2}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    within = [{chip.slice_index for chip in part.flat} for part in np.moveaxis(mesh.devices, 0, -1).reshape(8, 4)]
    assert within == [{0, 1}] * 8


@pytest.mark.parametrize(
    ("slices", "side", "axes"), [(1, 4, (1, 16)), (1, 8, (1, 64)), (1, 16, (4, 64)), (2, 4, (2, 16)), (4, 16, (16, 64))]
)
def test_left_open_a_small_slice_shares_one_state_and_a_large_one_several(slices: int, side: int, axes: tuple) -> None:
    mesh = mesh_lib.make_mesh(-1, -1, 1, v5e_chips(slices, side), slices=slices)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == axes
    assert dict(mesh_lib.make_mesh(-1, -1, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}  # eight devices


@pytest.mark.parametrize("devices", [*range(1, 65), 72, 96, 128, 192, 384, 1000, 1024])
def test_those_who_share_a_state_are_all_up_to_64_and_beyond_divide_devices_and_layers(devices: int) -> None:
    ways = mesh_lib.sharing(devices)
    assert devices % ways == 0
    assert ways == devices if devices <= 64 else 64 % ways == 0 and ways >= 8


def test_weights_that_rules_would_split_and_that_stay_whole_are_a_share_of_all() -> None:
    mesh, shapes = mesh_lib.make_mesh(data=1, fsdp=8), {"odd": (9, 10), "even": (16, 5), "norm": (30,)}
    share = lambda *rules: mesh_lib.whole_share([*rules, (".*", FSDP)], shapes, mesh)
    assert share() == pytest.approx(120 / 200)
    assert share(("norm", PartitionSpec())) == pytest.approx(90 / 200)  # which was asked for
    assert mesh_lib.whole_share([(".*", FSDP)], shapes, mesh_lib.make_mesh(fsdp=1)) == 0


@pytest.mark.parametrize(
    ("slices", "given", "words"),
    [(1, 2, ("--config.mesh.slices=1", "32 TPU chips lie in 2")), (2, 1, ("--config.mesh.slices=2", "lie in 1"))],
)
def test_another_number_of_slices_than_there_are_is_refused(slices: int, given: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        mesh_lib.make_mesh(1, -1, 1, v5e_chips(given, 4), slices=slices)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_hosts_with_gpus_are_no_slices_of_a_tpu() -> None:
    """The GPUs of each host have a slice_index of their own."""
    cards = [Chip(i, i // 8, i // 8, (0, 0, 0), "gpu", "NVIDIA H100 80GB HBM3") for i in range(16)]
    assert mesh_lib.make_mesh(1, -1, 1, cards).devices.flatten().tolist() == cards
    assert dict(mesh_lib.make_mesh(1, -1, 1, cards, slices=2).shape) == {"data": 2, "fsdp": 8, "tensor": 1}


def test_devices_that_know_no_slice_are_cut_into_equal_runs() -> None:
    mesh = mesh_lib.make_mesh(1, -1, 2, slices=2)
    assert [[device.id for device in part.flat] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"--config\.mesh\.slices=3.*8 devices"):
        mesh_lib.make_mesh(slices=3)
    with pytest.raises(ValueError, match=r"4 devices of each of --config\.mesh\.slices=2"):
        mesh_lib.make_mesh(1, 8, 1, slices=2)


@pytest.mark.parametrize(
    ("slices", "axes"), [(1, (1, -1, 1)), (1, (-1, 1, 1)), (1, (2, 2, 4)), (2, (1, -1, 1)), (2, (2, -1, 2))]
)
def test_every_row_of_a_batch_is_fed_by_the_hosts_whose_chips_hold_it(slices: int, axes: tuple[int, int, int]) -> None:
    """A mesh follows the wires, so a host's rows are not one range: on v5e:4x4 the first host holds 0, 1, 6 and 15."""
    chips = v5e_chips(slices, 4)
    mesh = mesh_lib.make_mesh(*axes, chips, slices=slices)
    batch = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    fed = {host: set(mesh_lib.own_rows(mesh, batch, host).tolist()) for host in range(4 * slices)}
    for index, chip in np.ndenumerate(mesh.devices):
        at = index[0] * mesh.shape["fsdp"] + index[1]
        assert {2 * at, 2 * at + 1} <= fed[chip.process_index]
    assert set().union(*fed.values()) == set(range(batch))
    if axes[2] == 1:
        assert sum(map(len, fed.values())) == batch  # nobody reads another's rows


def test_rows_of_a_batch_keep_their_order_over_eight_devices() -> None:
    mesh = mesh_lib.make_mesh(data=2, fsdp=4)
    rows = {"states": np.arange(16 * 6, dtype=np.float32).reshape(16, 2, 3), "first": np.arange(16, dtype=np.int32)}
    batch = mesh_lib.put_batch(mesh, rows, 16)
    for name, array in rows.items():
        assert batch[name].sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), array.ndim)
        np.testing.assert_array_equal(np.asarray(batch[name]), array)
    assert {shard.data.shape for shard in batch["first"].addressable_shards} == {(2,)}
    starts = [int(shard.data[0]) for shard in batch["first"].addressable_shards]
    assert sorted(starts) == list(range(0, 16, 2))


def test_a_replicated_array_is_whole_everywhere() -> None:
    placed = jax.device_put(np.arange(4), mesh_lib.replicated(mesh_lib.make_mesh(fsdp=2)))
    assert placed.is_fully_replicated and len(placed.addressable_shards) == 8


def test_check_batch_names_numbers_and_flags() -> None:
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    mesh_lib.check_batch(8, 2, mesh)  # tensor does not split a batch
    for batch, accumulation in [(12, 2), (0, 1), (8, 0), (6, 1)]:
        with pytest.raises(ValueError) as error:
            mesh_lib.check_batch(batch, accumulation, mesh)
        text = str(error.value)
        assert "\n" not in text
        for part in [f"global batch {batch} ", "per-device batch ", "4 devices", f"accumulation {accumulation} "]:
            assert part in text
        assert "--config.train.batch" in text and "--config.train.accumulation" in text


JOB = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every call of jax.distributed.initialize, which is not made; a clean environment."""
    calls: list[dict] = []
    asked = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS")
    for key in [*JOB, *(f"JAX_{key}" for key in JOB), *asked]:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def test_nothing_is_joined_unless_the_environment_says_so(joined: list[dict]) -> None:
    assert mesh_lib.initialize_distributed() is False
    assert joined == []


def test_a_local_job_binds_loopback_and_beats_every_ten_seconds(joined: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in zip(JOB, ("127.0.0.1:1234", "2", "1"), strict=True):
        monkeypatch.setenv(key, value)
    assert mesh_lib.initialize_distributed() is True
    assert joined == [
        {
            "coordinator_address": "127.0.0.1:1234",
            "num_processes": 2,
            "process_id": 1,
            "coordinator_bind_address": "127.0.0.1:1234",
            "heartbeat_timeout_seconds": 10,
        }
    ]


def test_a_pod_is_joined_by_jax_itself(joined: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert mesh_lib.initialize_distributed() is True
    assert joined == [{"heartbeat_timeout_seconds": 10}]


@pytest.fixture
def tpu_vm(joined: list[dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PCI bus with one other device of Google's and one v5e chip, and libtpu."""
    for name, vendor, device in (("0000:00:03.0", "0x1ae0", "0x0042"), ("0000:00:04.0", "0x1ae0", "0x0063")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    monkeypatch.setattr(mesh_lib, "PCI", tmp_path)
    monkeypatch.setattr(mesh_lib, "find_spec", lambda name: name)
    return tmp_path


def test_a_verb_started_by_hand_on_a_cloud_tpu_vm_joins_its_slice(tpu_vm: Path, joined: list[dict]) -> None:
    assert mesh_lib.initialize_distributed() is True
    assert joined == [{"heartbeat_timeout_seconds": 10}]


@pytest.mark.parametrize("without", ["chip", "bus", "libtpu", "metadata", "platform", "hosts"])
def test_no_other_machine_asks_the_network(
    tpu_vm: Path, joined: list[dict], monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    if without == "chip":
        (tpu_vm / "0000:00:04.0" / "vendor").write_text("0x10de\n")
    elif without == "bus":
        monkeypatch.setattr(mesh_lib, "PCI", tpu_vm / "nowhere")
    elif without == "libtpu":
        monkeypatch.setattr(mesh_lib, "find_spec", lambda name: None)
    else:
        variables = {"metadata": ("TPU_SKIP_MDS_QUERY", "1"), "platform": ("JAX_PLATFORMS", "cpu")}
        monkeypatch.setenv(*variables.get(without, ("TPU_WORKER_HOSTNAMES", "localhost")))
    assert mesh_lib.initialize_distributed() is False
    assert joined == []


ADDRESSES = ("10.0.0.1", "h:", ":1", "h:port", "h:0", "h:65536")
PARTIAL = [
    ("h:1", "2", ""),
    ("", "2", "0"),
    ("h:1", "2", "2"),
    ("h:1", "two", "0"),
    *((address, "2", "0") for address in ADDRESSES),
]


@pytest.mark.parametrize("values", PARTIAL)
def test_a_partial_job_is_refused(joined: list[dict], monkeypatch: pytest.MonkeyPatch, values: tuple[str, str, str]) -> None:
    for key, value in zip(JOB, values, strict=True):
        monkeypatch.setenv(f"JAX_{key}", value)
    with pytest.raises(ValueError, match="NUM_PROCESSES|COORDINATOR_ADDRESS|PROCESS_ID"):
        mesh_lib.initialize_distributed()
    assert joined == []


def test_sparse_cores_are_asked_of_the_chips_that_have_them_and_of_several_alone() -> None:
    def chips(kind: str, count: int) -> SimpleNamespace:
        return SimpleNamespace(size=count, devices=np.array([SimpleNamespace(device_kind=kind)] * count))

    assert mesh_lib.compiler_options(chips("TPU v6 lite", 16), True) == mesh_lib.BY_SPARSE_CORES
    for machine, asked in ((chips("TPU v6 lite", 16), False), (chips("TPU v6 lite", 1), True), (chips("TPU v5", 8), True)):
        assert mesh_lib.compiler_options(machine, asked) == {}
    assert mesh_lib.compiler_options(mesh_lib.make_mesh(), True) == {}
