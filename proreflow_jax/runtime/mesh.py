"""The mesh: axes (data, fsdp, tensor), tables of (regex, PartitionSpec), batches, jax.distributed.

A batch is split over data and fsdp; parameters over fsdp, and over tensor where a rule says so. Slices, whose network is
slow, lie along data: between them go the gradients' sums and nothing else. Axes have type Auto: the partitioner derives the
shardings that the rules leave open.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from proreflow_jax import UserError

AXES = ("data", "fsdp", "tensor")
FSDP = "largest dimension over fsdp"  # a rule's value: see `fsdp_spec`
COLUMN = "outputs over tensor"  # a rule's value: see `split_spec`
ROW = "inputs over tensor"  # likewise
HEARTBEAT_SECONDS = 10
WIDEST = 64  # devices that share one state, if a config leaves it open: it divides the widths of Stable Diffusion's layers
JOB = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # vendor on the PCI bus
SPARSE_CORES = "TPU v6 lite"  # the kind of chip whose compiler was seen to give transfers to them (docs/plan.md)
BY_SPARSE_CORES = {  # options of libtpu 0.0.51's compiler
    **{f"xla_tpu_enable_sparse_core_collective_offload_{what}": "true" for what in ("all_gather", "2d_all_gather")},
    **{f"xla_tpu_enable_sparse_core_collective_offload_{what}": "true" for what in ("all_reduce", "reduce_scatter")},
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
TPU_CHIPS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v3, v4, v5p, v5e, v6e, 7x: jax's own list

Spec = PartitionSpec | str


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, slices: int = 1
) -> Mesh:
    """A (slices x data, fsdp, tensor) mesh over all devices, or those given; one axis may be -1: all that are left.

    data and fsdp may both be -1: fsdp is then `sharing`, data the rest. All are of one slice. A TPU knows its slice. Other
    devices are cut into `slices` equal runs: a GPU's slice_index is its host, and jax.make_mesh refuses several. Raises
    ValueError if the axes do not multiply to the devices of a slice, or TPUs lie in another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    groups = _slices(devices, slices)
    shape = _fill((data, fsdp, tensor), len(groups[0]), slices)
    placed = [mesh_utils.create_device_mesh(shape, devices=group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(placed), AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice, equally many, in the order of the slices."""
    known = {getattr(device, "slice_index", None) or 0 for device in devices if device.platform == "tpu"}
    if known and len(known) != count:
        raise UserError(f"--config.mesh.slices={count}, and the {len(devices)} TPU chips lie in {len(known)}: set it to that")
    if count < 1 or len(devices) % count:
        raise UserError(f"--config.mesh.slices={count} does not divide the {len(devices)} devices into equal slices")
    size = len(devices) // count
    if known:
        devices = sorted(devices, key=lambda device: getattr(device, "slice_index", None) or 0)  # order within one stays
    return [list(devices[at : at + size]) for at in range(0, len(devices), size)]


def platform(mesh: Mesh) -> str:
    """The kind of a mesh's devices, "cpu", "gpu" or "tpu": of the devices to compile for, on this machine or not."""
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh, sparse_cores: bool) -> dict[str, str]:
    """Options of a jit on this mesh. sparse_cores: a v6e's carry out transfers while the chip computes, where it would wait."""
    asked = sparse_cores and mesh.size > 1 and mesh.devices.flat[0].device_kind == SPARSE_CORES
    return dict(BY_SPARSE_CORES) if asked else {}


def _fill(axes: tuple[int, ...], devices: int, slices: int = 1) -> tuple[int, ...]:
    flags = ", ".join(f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, axes, strict=True))
    if axes[:2] == (-1, -1) and axes[2] > 0:
        axes = (-1, sharing(max(1, devices // axes[2])), axes[2])
    if any(size < 1 and size != -1 for size in axes) or axes.count(-1) > 1:
        raise UserError(f"{flags}: every axis must be positive; one may be -1 (takes what is left), or data and fsdp both")
    known = math.prod(size for size in axes if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in axes)
    if math.prod(filled) != devices:
        where = "this machine" if slices == 1 else f"each of --config.mesh.slices={slices}"
        raise UserError(f"{flags} do not multiply to the {devices} devices of {where}: set one of them to -1")
    return filled


def sharing(devices: int) -> int:
    """How many of a slice's devices share one state: all, up to WIDEST; of more, the greatest common divisor with it.

    What more devices save is little, and costs: a weight whose dimensions they do not divide stays whole on each.
    """
    return devices if devices <= WIDEST else math.gcd(devices, WIDEST)


def specs(rules: Sequence[tuple[str, Spec]], shapes: Mapping[str, Sequence[int]], mesh: Mesh) -> dict[str, PartitionSpec]:
    """{name: PartitionSpec} by the first rule that matches; a value is a PartitionSpec, `FSDP`, `COLUMN` or `ROW`.

    A mesh axis that does not divide its dimension is dropped there: the dimension is replicated. Raises ValueError
    naming every name that no rule matches, or a rule with more dimensions than its array, or an axis the mesh
    lacks.
    """
    values = first_match(rules, shapes, "--config.mesh.rules")
    return {name: _fit(name, value, tuple(shapes[name]), mesh) for name, value in values.items()}


def whole_share(rules: Sequence[tuple[str, Spec]], shapes: Mapping[str, Sequence[int]], mesh: Mesh) -> float:
    """Of all weights, the share that rules would split and that stay whole on each device: fsdp divides no dimension."""
    split = {name for name, value in first_match(rules, shapes, "--config.mesh.rules").items() if isinstance(value, str)}
    where, sizes = specs(rules, shapes, mesh), {name: math.prod(shape) for name, shape in shapes.items()}
    whole = sum(size for name, size in sizes.items() if name in split and "fsdp" not in where[name])
    return whole / sum(sizes.values()) if mesh.shape["fsdp"] > 1 else 0.0


def fsdp_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The largest dimension that the fsdp axis divides lies over fsdp (the last of equals); nothing else is split."""
    return _spread({}, shape, mesh)


def split_spec(value: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """A layer split over tensor by its outputs (`COLUMN`, the last dimension) or inputs (`ROW`, the last but one, no bias).

    The largest other dimension that fsdp divides lies over fsdp. A dimension that tensor does not divide stays whole. A
    column layer before a row layer needs one sum over tensor (Shoeybi et al. 2019, sec. 3).
    """
    size, d = mesh.shape["tensor"], len(shape) - (1 if value == COLUMN else 2)
    taken = {d: "tensor"} if size > 1 and d >= 0 and shape[d] and shape[d] % size == 0 else {}
    return _spread(taken, shape, mesh)


def _spread(taken: dict[int, str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The dimensions that are taken, and fsdp over the largest of the others that it divides."""
    size = mesh.shape["fsdp"]
    fits = [(length, d) for d, length in enumerate(shape) if d not in taken and length and length % size == 0]
    if size > 1 and fits:
        taken = taken | {max(fits)[1]: "fsdp"}
    return PartitionSpec(*(taken.get(d) for d in range(max(taken, default=-1) + 1)))


def _fit(name: str, value: Spec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if value in (COLUMN, ROW):
        return split_spec(value, shape, mesh)
    if value == FSDP:
        return fsdp_spec(shape, mesh)
    if len(value) > len(shape):
        raise UserError(f"{value} has more dimensions than {name} of shape {shape}: change --config.mesh.rules")
    return PartitionSpec(*(_fit_axis(name, axis, length, mesh) for axis, length in zip(value, shape, strict=False)))


def _fit_axis(name: str, axis: str | tuple[str, ...] | None, length: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    unknown = [a for a in axes if a not in mesh.shape]
    if unknown:
        raise UserError(f"{name} is split over {unknown[0]}, not an axis of {AXES}: change --config.mesh.rules")
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


@lru_cache(maxsize=64)
def own_rows(mesh: Mesh, batch: int, process: int | None = None) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that a process's devices hold, ascending; this process by default. The array is read-only.

    They need not be one range: a mesh follows the wires of a slice, a host's chips are neighbours in two or three directions.
    """
    process = jax.process_index() if process is None else process
    parts = batch_sharding(mesh).devices_indices_map((batch,)).items()
    starts = {part.start or 0: part.stop or batch for device, (part,) in parts if device.process_index == process}
    rows = np.concatenate([np.arange(start, starts[start]) for start in sorted(starts)])
    rows.flags.writeable = False
    return rows


def put_batch(mesh: Mesh, rows: Mapping[str, np.ndarray], batch: int) -> dict[str, jax.Array]:
    """This process's rows (`own_rows` of a global batch) of each array -> global arrays (b, ...), split by `batch_sharding`."""
    sharding, own = batch_sharding(mesh), own_rows(mesh, batch)

    def placed(array: np.ndarray) -> jax.Array:
        part = lambda index: array[slice(*np.searchsorted(own, (index[0].start or 0, index[0].stop or batch)))]
        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, part)

    return {name: placed(array) for name, array in rows.items()}


def ways(mesh: Mesh) -> int:
    """Devices that a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_split(batch: int, flag: str, mesh: Mesh) -> None:
    """Raises ValueError, one line, unless the batch that `flag` names splits over the devices."""
    if batch < 1 or batch % ways(mesh):
        raise UserError(f"{flag}={batch} must be a positive multiple of {ways(mesh)} devices (data x fsdp)")


def check_batch(batch: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless batch = per-device batch x devices (data x fsdp) x accumulation, in whole numbers."""
    if batch < 1 or accumulation < 1 or batch % (accumulation * ways(mesh)):
        each = batch / (accumulation * ways(mesh)) if accumulation > 0 else math.nan
        parts = f"per-device batch {each:g} x {ways(mesh)} devices (data x fsdp) x accumulation {accumulation}"
        mend = "needs positive whole numbers: change --config.train.batch or --config.train.accumulation"
        raise UserError(f"global batch {batch} = {parts} {mend}")


def initialize_distributed() -> bool:
    """Join the other processes if the environment names them; True if this process is now part of a job.

    The environment names COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID (each may have the prefix JAX_). On a TPU slice
    (`_on_tpu_slice`) jax finds them itself. One process counts too: jax's preemption notice needs it. Call it before jax
    looks for devices. A lost process ends the job after HEARTBEAT_SECONDS. Raises ValueError if the variables are partial.
    """
    variables = {key: os.environ.get(f"JAX_{key}") or os.environ.get(key) for key in JOB}
    if not any(variables.values()) and not _on_tpu_slice():
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    arguments = _job(variables) if any(variables.values()) else {}
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return True


def _on_tpu_slice() -> bool:
    """Whether jax can find this job by itself: GKE's variables name several hosts, or this is a Cloud TPU VM.

    A VM is known by its chips on the PCI bus, with libtpu installed. There jax asks Google's metadata server for the other
    hosts. No other machine asks the network. TPU_SKIP_MDS_QUERY or a JAX_PLATFORMS without tpu say no.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_PROCESS_ADDRESSES")
    if hosts:
        return "," in hosts
    tpu_allowed = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu").split(",") and "TPU_SKIP_MDS_QUERY" not in os.environ
    return tpu_allowed and find_spec("libtpu") is not None and _has_tpu_chips(PCI)


def _has_tpu_chips(bus: Path) -> bool:
    read = lambda path: path.read_text().strip() if path.is_file() else ""
    devices = bus.iterdir() if bus.is_dir() else ()
    return any(read(device / "vendor") == GOOGLE and read(device / "device") in TPU_CHIPS for device in devices)


def _job(variables: Mapping[str, str | None]) -> dict[str, str | int]:
    missing = [key for key in JOB if not variables[key]]
    if missing:
        raise UserError(f"{' and '.join(missing)} not set: a job of several processes needs {', '.join(JOB)}")
    address, processes, index = (str(variables[key]) for key in JOB)
    if not (processes.isdigit() and index.isdigit() and int(index) < int(processes)):
        raise UserError(f"NUM_PROCESSES={processes}, PROCESS_ID={index}: need whole numbers with PROCESS_ID below")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"COORDINATOR_ADDRESS={address}: needs host:port, a port from 1 to 65535")
    job = {"coordinator_address": address, "num_processes": int(processes), "process_id": int(index)}
    if host in ("127.0.0.1", "localhost", "[::1]"):
        job["coordinator_bind_address"] = address  # jax binds every interface otherwise, without authentication
    return job


def first_match(rules: Sequence[tuple[str, Any]], names: Iterable[str], flag: str) -> dict[str, Any]:
    """{name: value of the first rule that matches}. `flag` is the flag that mends the table.

    Raises ValueError, one line, naming every name no rule matches.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    matches = {name: [value for pattern, value in compiled if pattern.search(name)][:1] for name in names}

    lost = [name for name, values in matches.items() if not values]
    if lost:
        raise UserError(f"no rule of {flag} matches {', '.join(lost)}: end the table with ('.*', ...)")
    return {name: values[0] for name, values in matches.items()}
