"""A slice's jobs by shapes and shardings alone, nothing compiled: state, transfers, what hosts read and write, hours.

What only the compiler knows is left out: temporaries, tiles, and how much of the transfers hides behind the work. Hours are the
FLOPs that the method needs at a share of the chips' peak, which the caller names.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proreflow_jax.perf import jobs, resident
from proreflow_jax.perf.estimate import Target
from proreflow_jax.perf.jobs import Job
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.pair_source import group_readers
from proreflow_jax.run.stages import Stage, find_stage
from proreflow_jax.run.train_state import parameter_shardings, whole_share

SUM, GATHERS = 1, {"none": 1}  # sums of gradients a part of a batch; gathers of the weights there, by train.remat: else 2


Jobs = Sequence[tuple[int, str]]  # (windows, job), as of `jobs.choose_jobs`


def numbers(both: tuple[Experiment, Experiment], place: Target, chosen: Jobs, share: float) -> tuple[dict, list[dict]]:
    """`slice_numbers`, and `job_numbers` of the chosen jobs; `both` as of `estimate.outlines`."""
    experiment, plain = both
    one = lambda stage, name: job_numbers(experiment, stage, jobs.jobs(experiment, stage, plain)[name], place, share)
    return slice_numbers(experiment), [one(find_stage(experiment.stages, windows), name) for windows, name in chosen]


def slice_numbers(experiment: Experiment) -> dict[str, Any]:
    """What all jobs of a config have alike on a slice.

    Returns chips, slices, hosts, groups of pair shards, mesh {axis: size}, and state {bytes: of one chip, by shardings;
    promised: all of it over fsdp and tensor; whole: the share of the denoiser's weights that stays whole on each chip}.
    """
    machine, target = experiment.mesh, experiment.layout.target
    total = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(target))
    state = {
        "bytes": resident.bytes_on_device(target),
        "promised": total / (machine.shape["fsdp"] * machine.shape["tensor"]),
        "whole": whole_share(experiment.config, machine, experiment.base.denoiser.shapes),
    }
    config = experiment.config
    counts = {"chips": machine.size, "slices": config.mesh.slices, "groups": config.train.groups, "hosts": _hosts(experiment)}
    return {**counts, "mesh": dict(machine.shape), "state": state}


def job_numbers(experiment: Experiment, stage: Stage, job: Job, place: Target, share: float) -> dict[str, Any]:
    """One job: bytes of one chip, of one call's transfers, of what a host reads, writes and copies; seconds and hours.

    `sent_bytes` is [least, most] of what a chip receives as gathered weights and sums of gradients, by the size of the results,
    as `plan` counts compiled programs. The least keeps gathered weights for all of a call, the most gathers them for each
    forward. None where layers are split over tensor.
    """
    arrays = resident.sum_classes(job.classes, job.beside)
    flops = job.useful()
    full = flops / place.count / place.chip.peak
    seconds, sent = full / share, _sent(experiment, stage, job.name)
    return {
        "stage": job.windows,
        "job": job.name,
        "slice": place.slice,
        "images": job.images,
        "at_once": job.at_once,
        "calls": job.calls,
        "memory": {**arrays, "total": sum(arrays.values()), "available": place.chip.memory},
        "fits": sum(arrays.values()) + arrays[resident.STATE] <= place.chip.memory,
        "useful_flops": flops,
        "seconds": seconds,
        "share": share,
        "full_speed_hours": full * job.calls / 3600,
        "hours": seconds * job.calls / 3600,
        "chip_hours": seconds * job.calls / 3600 * place.count,
        "sent_bytes": sent,
        "sent_seconds": [value / place.chip.links for value in sent] if sent else None,
        "between_slices_bytes": _between(experiment, job.name),
        "host": _host(experiment, stage, job, seconds),
        "storage": jobs.storage(experiment, stage),
    }


def _hosts(experiment: Experiment) -> int:
    return len({device.process_index for device in experiment.mesh.devices.flat})


def _sent(experiment: Experiment, stage: Stage, name: str) -> list[float] | None:
    config, machine = experiment.config, experiment.mesh
    if machine.shape["tensor"] > 1:
        return None
    gathered = _gathered_weights(experiment)
    width = lambda field: gathered * jnp.dtype(config.model[field]).itemsize
    forwards = (stage.windows if config.pairs.start == "noise" else 1) * stage.pairs.steps
    if name == "sample":
        once, often = width("sampling_dtype"), stage.windows
    elif name == "pairs":
        once, often = width("teacher_dtype"), forwards
    else:
        parts = config.train.accumulation
        own = parts * (GATHERS.get(config.train.remat, 2) * width("dtype") + SUM * _gradients(experiment))
        teacher = width("teacher_dtype") if stage.online and not experiment.layout.teacher_whole else 0
        return [own + teacher, own + teacher * forwards]
    return [once, once * often]


def _gathered_weights(experiment: Experiment) -> int:
    """Numbers of the denoiser's weights that lie in pieces over fsdp."""
    shapes = experiment.base.denoiser.shapes
    where = parameter_shardings(experiment.config, experiment.mesh, shapes)
    split = experiment.mesh.shape["fsdp"] > 1
    return sum(math.prod(shape.shape) for name, shape in shapes.items() if split and "fsdp" in where[name].spec)


def _gradients(experiment: Experiment) -> int:
    """Bytes of one sum of gradients, in the dtype of the computation."""
    size = sum(math.prod(shape.shape) for shape in experiment.layout.shapes.values())
    return size * jnp.dtype(experiment.config.model.dtype).itemsize if experiment.mesh.size > 1 else 0


def _between(experiment: Experiment, name: str) -> float:
    """Bytes of gradients' sums that one chip sends to other slices a call, each chip its share of them."""
    slices = experiment.config.mesh.slices
    if name != "train" or slices == 1:
        return 0.0
    own = _gradients(experiment) / (experiment.mesh.size // slices)
    return experiment.config.train.accumulation * 2 * (slices - 1) / slices * own


def _host(experiment: Experiment, stage: Stage, job: Job, seconds: float) -> dict[str, float]:
    """Rows and bytes a second of one host of many alike, and bytes that it copies before a stage's training from a bucket."""
    hosts, config = _hosts(experiment), experiment.config
    rows = job.images / seconds / hosts
    if job.name == "sample":
        return {"rows_per_second": rows}
    stored = job.name == "train" and not stage.online
    read = jobs.record_shapes(experiment, stage) if stored else jobs.prompt_shapes(experiment, job.images)
    numbers = {"rows_per_second": rows, "read_bytes_per_second": rows * _row_bytes(read)}
    pairs = jobs.storage(experiment, stage)["pairs"]
    if job.name == "pairs":
        return numbers | {"written_bytes_per_second": rows * pairs / config.pairs.examples}
    if not stored:
        return numbers
    readers = group_readers(experiment.mesh, config.train.batch, config.train.groups)
    most = max(Counter(process for by in readers.values() for process in by).values())
    return numbers | {"copied_bytes": pairs * most / config.train.groups}


def _row_bytes(rows: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(shape.dtype.itemsize * math.prod(shape.shape[1:]) for shape in rows.values())
