"""The mesh and what lies on it: axes (data, fsdp, tensor), (regex -> PartitionSpec) tables, batches, jax.distributed.

A batch is split over data and fsdp; parameters over fsdp, and over tensor where a rule says so. Axes have type
Auto: the partitioner derives what the rules leave open.
"""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from proreflow_jax.runtime.rules import first_match

AXES = ("data", "fsdp", "tensor")
FSDP = "largest dimension over fsdp"  # a rule's value: see `fsdp_spec`
HEARTBEAT_SECONDS = 10

Spec = PartitionSpec | str


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices, or those given; one axis may be -1 and takes what is left.

    Raises ValueError if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _fill((data, fsdp, tensor), len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def platform(mesh: Mesh) -> str:
    """What the devices of a mesh are, "cpu", "gpu" or "tpu": those it is compiled for, which need not be this machine's."""
    return mesh.devices.flat[0].platform


def _fill(axes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    named = ", ".join(f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, axes, strict=True))
    if any(size < 1 and size != -1 for size in axes) or axes.count(-1) > 1:
        raise ValueError(f"{named}: every axis must be positive, and at most one may be -1 (takes what is left)")
    known = math.prod(size for size in axes if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in axes)
    if math.prod(filled) != devices:
        raise ValueError(f"{named} do not multiply to the {devices} devices of this machine: set one of them to -1")
    return filled


def specs(rules: Sequence[tuple[str, Spec]], shapes: Mapping[str, Sequence[int]], mesh: Mesh) -> dict[str, PartitionSpec]:
    """{name: PartitionSpec} by the first rule that matches; a value is a PartitionSpec or `FSDP`.

    A mesh axis that does not divide its dimension is dropped there: the dimension is replicated. Raises ValueError
    naming every name that no rule matches, or a rule with more dimensions than its array, or an axis the mesh
    lacks.
    """
    values = first_match(rules, shapes, "--config.mesh.rules")
    return {name: _fit(name, value, tuple(shapes[name]), mesh) for name, value in values.items()}


def fsdp_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The largest dimension that the fsdp axis divides lies over fsdp (the last of equals); nothing else is split."""
    size = mesh.shape["fsdp"]
    fits = [(length, d) for d, length in enumerate(shape) if length and length % size == 0]
    if size == 1 or not fits:
        return PartitionSpec()
    _, chosen = max(fits)
    return PartitionSpec(*("fsdp" if d == chosen else None for d in range(chosen + 1)))


def _fit(name: str, value: Spec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if value == FSDP:
        return fsdp_spec(shape, mesh)
    if len(value) > len(shape):
        raise ValueError(f"{value} has more dimensions than {name} of shape {shape}: change --config.mesh.rules")
    return PartitionSpec(*(_fit_axis(name, axis, length, mesh) for axis, length in zip(value, shape, strict=False)))


def _fit_axis(name: str, axis: str | tuple[str, ...] | None, length: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    unknown = [a for a in axes if a not in mesh.shape]
    if unknown:
        raise ValueError(f"{name} is split over {unknown[0]}, not an axis of {AXES}: change --config.mesh.rules")
    return axis if length % math.prod(mesh.shape[a] for a in axes) == 0 else None


def shardings(mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> dict[str, NamedSharding]:
    """The specs as shardings on this mesh."""
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis lies over data and fsdp, the rest is whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def own_rows(mesh: Mesh, batch: int) -> range:
    """The rows of a global batch that this process's devices hold; all of them where the batch is split within each process.

    Raises ValueError if they are not one range: the mesh's devices lie in another order than the processes.
    """
    parts = {(part.start or 0, part.stop or batch) for (part,) in _parts(mesh, batch).values()}
    own = range(min(start for start, _ in parts), max(stop for _, stop in parts))
    if len(own) != sum(stop - start for start, stop in parts):
        raise ValueError(
            f"process {jax.process_index()} holds rows {sorted(parts)}: let --config.mesh.tensor lie within a process"
        )
    return own


def _parts(mesh: Mesh, batch: int) -> Mapping[jax.Device, tuple[slice, ...]]:
    return batch_sharding(mesh).addressable_devices_indices_map((batch,))


def put_batch(mesh: Mesh, rows: Mapping[str, np.ndarray], batch: int) -> dict[str, jax.Array]:
    """This process's rows (`own_rows` of a global batch) of each array -> global arrays (b, ...), split by `batch_sharding`."""
    sharding, begin = batch_sharding(mesh), own_rows(mesh, batch).start

    def placed(array: np.ndarray) -> jax.Array:
        part = lambda index: array[(index[0].start or 0) - begin : (index[0].stop or batch) - begin]
        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, part)

    return {name: placed(array) for name, array in rows.items()}


def check_batch(batch: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch` splits into `accumulation` equal parts that each split over data x fsdp."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or accumulation < 1 or batch % (accumulation * ways):
        raise ValueError(
            f"batch {batch} is no positive multiple of {ways} devices (data x fsdp) x accumulation {accumulation}: "
            f"change --config.train.batch or --config.train.accumulation"
        )


def initialize_distributed() -> bool:
    """Join the other processes if the environment names them; True if this process is now part of a job.

    Either JAX_COORDINATOR_ADDRESS (or COORDINATOR_ADDRESS), NUM_PROCESSES and PROCESS_ID (both also with the prefix
    JAX_), or a TPU pod, where jax finds the rest. One process counts too: jax's preemption notice needs it. Call it
    before jax looks for devices. A lost process ends the job after HEARTBEAT_SECONDS. Raises ValueError if the
    variables are partial.
    """
    named = {key: os.environ.get(f"JAX_{key}") or os.environ.get(key) for key in JOB}
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not any(named.values()) and not pod:
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    arguments = _job(named) if any(named.values()) else {}
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return True


JOB = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def _job(named: Mapping[str, str | None]) -> dict[str, str | int]:
    missing = [key for key in JOB if not named[key]]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not set: a job of several processes needs {', '.join(JOB)}")
    address, processes, index = (str(named[key]) for key in JOB)
    if not (processes.isdigit() and index.isdigit() and int(index) < int(processes)):
        raise ValueError(f"NUM_PROCESSES={processes}, PROCESS_ID={index}: need whole numbers with PROCESS_ID below")
    job = {"coordinator_address": address, "num_processes": int(processes), "process_id": int(index)}
    if address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]"):
        job["coordinator_bind_address"] = address  # jax binds every interface otherwise, without authentication
    return job
