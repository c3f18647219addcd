"""The mesh: rules are total and ordered, what does not divide is replicated, rows land where they belong."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.mesh import FSDP


def test_one_axis_takes_the_devices_that_are_left() -> None:
    mesh = mesh_lib.make_mesh(data=-1, fsdp=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (1, 1, 16)])
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
        for part in [f"batch {batch}", "4 devices", f"accumulation {accumulation}"]:
            assert part in text
        assert "--config.train.batch" in text and "--config.train.accumulation" in text


JOB = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every call of jax.distributed.initialize, which is not made; a clean environment."""
    calls: list[dict] = []
    for key in [*JOB, *(f"JAX_{key}" for key in JOB), "TPU_WORKER_HOSTNAMES"]:
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


@pytest.mark.parametrize("values", [("h:1", "2", ""), ("", "2", "0"), ("h:1", "2", "2"), ("h:1", "two", "0")])
def test_a_partial_job_is_refused(joined: list[dict], monkeypatch: pytest.MonkeyPatch, values: tuple[str, str, str]) -> None:
    for key, value in zip(JOB, values, strict=True):
        monkeypatch.setenv(f"JAX_{key}", value)
    with pytest.raises(ValueError, match="NUM_PROCESSES|COORDINATOR_ADDRESS|PROCESS_ID"):
        mesh_lib.initialize_distributed()
    assert joined == []
