"""Classes of arrays that live on the devices while a job runs: the program's arguments, and other arrays beside them.

A test compares these classes with the arrays that are alive on the devices in a small run of each job.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from proreflow_jax.evaluation import clip_score, judges, protocols
from proreflow_jax.models.efficientnet import make_efficientnet
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.train_state import parameter_shardings
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths

STATE = "state"  # of the optimizer: weights or factors, moments, average
TEACHER = "teacher"  # denoiser that makes the pairs
STUDENT = "student"  # denoiser that is sampled, and others that wait for their turn
BASE = "base"  # denoiser of the base model, where neither teacher nor student is the same arrays
ENCODERS = "encoders"  # text encoders and VAE
JUDGES = "judges"  # FID's and CLIP's networks
BATCH = "batch"  # and the one that is put on the devices meanwhile
OUTPUTS = "outputs"  # not yet read by the host
CLASSES = (STATE, TEACHER, STUDENT, BASE, ENCODERS, JUDGES, BATCH, OUTPUTS)
Classes = Mapping[str, Any]  # class -> tree of shapes with shardings


def frozen_classes(frozen: Frozen) -> dict[str, Any]:
    """The frozen arrays of a step by class."""
    return {
        TEACHER: frozen.teacher,
        BASE: frozen.base,
        ENCODERS: (frozen.text, frozen.vae, frozen.empty, frozen.key, frozen.unprompted),
    }


def beside_pairs(experiment: Experiment, by_base: bool, under_way: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Beside the teacher: batches under way, and for a LoRA's student the base model and the factors that were added to it.

    under_way: inputs and outputs of the calls that were sent before and are not fetched.
    """
    factors, (batches, outputs) = _factors(experiment), zip(*under_way, strict=True)
    merged = {BASE: denoiser_shapes(experiment), TEACHER: factors} if factors and not by_base else {}
    return merged | {BATCH: batches, OUTPUTS: outputs}


def beside_samples(experiment: Experiment, rows: Any) -> dict[str, Any]:
    """Beside the student that is sampled: the base model, and what the protocol's job keeps.

    By COCO's protocols images are judged on the devices, and a batch begins before the host has read the one before it. So are
    the emoji, one batch after the other, beside the student that comes along.
    The digits' table holds all its students from the beginning, and is judged on the host.
    """
    e, base, factors = experiment.config.evaluate, denoiser_shapes(experiment), _factors(experiment)
    if e.protocol == protocols.DIGITS:
        waiting = {windows for windows, _ in e.student_steps}
        return {BASE: base, STUDENT: [factors, *[(base, factors)] * (len(waiting) - 1)]}
    side, split = experiment.base.resolution, mesh.batch_sharding(experiment.mesh)
    images = jax.ShapeDtypeStruct((len(rows["number"]), side, side, 3), np.uint8, sharding=split)
    shipped = [base] if "gate" in e and e.gate.shipped_steps else []
    return {BASE: base, STUDENT: [factors, *shipped], JUDGES: _judges(experiment), BATCH: rows, OUTPUTS: images}


def denoiser_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The base model's denoiser in float32, by --config.mesh.rules."""
    return _by_rules(experiment, experiment.base.denoiser.shapes)


def sum_classes(*classes: Classes) -> dict[str, int]:
    """Bytes of one device by class, all of CLASSES, before arrays are filled up to tiles."""
    return {name: sum(bytes_on_device(part[name]) for part in classes if name in part) for name in CLASSES}


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of arrays (or shapes with shardings), before they are filled up to tiles."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    width = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize  # 8: a threefry key's words
    return width * math.prod(shape)


def _factors(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    return _by_rules(experiment, experiment.layout.shapes) if experiment.layout.scale else {}


def _by_rules(experiment: Experiment, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    where = parameter_shardings(experiment.config, experiment.mesh, shapes)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[name]) for name, s in shapes.items()}


def _judges(experiment: Experiment) -> Any:
    e, whole = experiment.config.evaluate, mesh.replicated(experiment.mesh)
    place = lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole)
    if e.protocol in protocols.EMOJI:
        return jax.tree.map(place, make_efficientnet(protocols.PROTOCOLS[e.protocol].size).shapes)
    clip = paths.local_copy(paths.parse_path(e.clip, clip_score.FLAG), clip_score.FLAG).expanduser() if e.clip else None
    return jax.tree.map(place, judges.judge_shapes(clip))
