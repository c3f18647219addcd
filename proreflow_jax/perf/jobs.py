"""The jobs of a config as what is compiled: the very functions that the verbs jit, with shapes in place of arrays.

`plan` compiles them for slices that are not here, `bench` runs them on the machine at hand.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import kinds
from proreflow_jax.evaluation import protocols
from proreflow_jax.jobs import pairs, score_coco, train
from proreflow_jax.perf import flops, tpu_compile
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.run import cli, train_state
from proreflow_jax.run.dataset import encodes
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.runtime import mesh

JOBS = ("pairs", "train", "sample")
STATE, FROZEN, BATCH = "state", "frozen", "batch"  # classes of arguments
WITHOUT_PROTOCOL = 1.0  # guidance of the digits' samples


class Job(NamedTuple):
    """One jitted function of one stage."""

    name: str  # of JOBS
    windows: int  # of the stage
    jitted: Any
    arguments: tuple[Any, ...]  # shapes with shardings, in the function's order
    classes: tuple[str, ...]  # of the arguments
    images: int  # that one call works on, over all devices
    at_once: int  # images whose activations lie on one device together
    calls: int  # in a whole stage; 0: as often as somebody wants pictures
    useful: Callable[[], float]  # FLOPs of one call, over all devices: what the method needs, nothing computed twice
    rest: tuple[Any, ...] = ()  # of a job that holds its arguments in stacks: shapes of them by torch names
    hold: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda rest: rest  # arrays by torch names -> arrays as it takes them


def jobs(experiment: Experiment, stage: Stage, plain: Experiment | None = None) -> dict[str, Job]:
    """The jobs of a stage by name; no pairs where the train step makes its own.

    `plain` is the same experiment with networks of which every product can be counted, where `experiment` has kernels that
    cannot.
    """
    plain = plain or experiment
    made = {"train": train_job(experiment, stage, plain), "sample": sample_job(experiment, stage, plain)}
    return made if stage.online else {"pairs": pairs_job(experiment, stage, plain), **made}


def wanted(config: ConfigDict, stage: int, jobs: str) -> list[tuple[int, str]]:
    """(windows, job) of everything that is asked for, in the order in which it would run."""
    if stage and stage not in config.stages:
        raise UserError(f"--stage={stage} is not a stage of this config: --config.stages has {list(config.stages)}")
    chosen = [cli.choose(name.strip(), JOBS, "--jobs") for name in jobs.split(",")]
    online = config.pairs.mode == "online"
    names = [name for name in JOBS if name in chosen and not (online and name == "pairs")]
    return [(windows, name) for windows in ([stage] if stage else config.stages) for name in names]


def pairs_job(experiment: Experiment, stage: Stage, plain: Experiment) -> Job:
    """make_pairs: one batch of trajectories."""
    config = experiment.config
    b, machine = config.pairs.batch, experiment.mesh
    jitted = pairs.jit_pairs(stage, experiment.networks, machine)
    arguments = frozen_shapes(experiment, stage, True, encodes(config)), prompt_shapes(experiment, b)
    shards = -(-config.pairs.examples // config.pairs.shard_size)
    calls = shards * -(-config.pairs.shard_size // b)
    useful = partial(_counted, pairs.jit_pairs(stage, plain.networks, machine), arguments)
    return Job("pairs", stage.windows, jitted, arguments, (FROZEN, BATCH), b, b // mesh.ways(experiment.mesh), calls, useful)


def train_job(experiment: Experiment, stage: Stage, plain: Experiment) -> Job:
    """train: one update."""
    config, layout, online = experiment.config, experiment.layout, stage.online
    b = config.train.batch
    frozen = frozen_shapes(experiment, stage, online, online and encodes(config))
    held = train_state.frozen_shapes(layout, frozen)
    batch = prompt_shapes(experiment, b) if online else record_shapes(experiment, stage)
    key = _key(experiment, stage)
    arguments, rest = (train_state.stacked_shapes(layout), held, batch, key), (layout.target, frozen, batch, key)
    hold = lambda made: (train_state.stacked(layout, made[0]), train_state.stack_frozen(layout, made[1]), *made[2:])
    at_once = b // mesh.ways(experiment.mesh) // config.train.accumulation
    draw, loss = train.step_parts(plain, stage)

    def useful() -> float:
        drawn = jax.eval_shape(draw, frozen, batch, key)
        backward = 1 if config.student.lora.rank else 2  # no gradients of the weights beside the factors
        student = layout.shapes, frozen.base, drawn
        return _counted(draw, (frozen, batch, key)) + (1 + backward) * _counted(loss, student)

    classes = (STATE, FROZEN, BATCH, BATCH)
    jitted = train.jit_step(experiment, stage)
    return Job("train", stage.windows, jitted, arguments, classes, b, at_once, config.train.steps, useful, rest, hold)


def sample_job(experiment: Experiment, stage: Stage, plain: Experiment) -> Job:
    """evaluate: one batch of pictures by the stage's student, in as many steps as windows, by the guidance of the protocol."""
    e, base, machine = experiment.config.evaluate, experiment.base, experiment.mesh
    b = -(-e.batch // mesh.ways(experiment.mesh)) * mesh.ways(experiment.mesh)
    named = protocols.PROTOCOLS.get(e.protocol)
    guidance = float(e.guidance or (named.guidance if named else WITHOUT_PROTOCOL))
    options = stage.student, stage.windows, guidance
    frozen = frozen_shapes(experiment, stage, True, True)
    split = partial(_shape, mesh.batch_sharding(machine))
    rows = {"number": split((b,), np.uint32), "ids": split((b, base.tokenizer.length), np.int32)}
    whole = partial(_shape, mesh.replicated(machine))
    empty, seed = whole((1, base.tokenizer.length), np.int32), whole((), np.uint32)
    arguments = frozen.teacher, frozen.text, frozen.vae, empty, rows, seed
    classes = (FROZEN,) * 4 + (BATCH,) * 2
    jitted, useful = (
        score_coco.jit_draw(experiment, *options),
        partial(_counted, score_coco.jit_draw(plain, *options), arguments),
    )
    return Job("sample", stage.windows, jitted, arguments, classes, b, b // mesh.ways(experiment.mesh), 0, useful)


def frozen_shapes(experiment: Experiment, stage: Stage, teacher: bool, with_vae: bool) -> Frozen:
    """`lineage.frozen_arrays`, as shapes with shardings."""
    base, config = experiment.base, experiment.config
    whole = partial(_everywhere, experiment)
    by_rules = train_state.parameter_shardings(config, experiment.mesh, base.unet.shapes)
    unet = {name: _shape(by_rules[name], shape.shape, shape.dtype) for name, shape in base.unet.shapes.items()}
    text = {name: encoder.shapes for name, encoder in base.networks.items() if name in base.text}
    return Frozen(
        text=whole(text),
        vae=whole(base.vae.shapes) if with_vae else {},
        teacher=unet if teacher else {},
        empty=_shape(mesh.replicated(experiment.mesh), (base.tokenizer.length,), np.int32),
        key=_key(experiment, stage),
        base=unet if config.student.lora.rank else {},
    )


def prompt_shapes(experiment: Experiment, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of numbered prompts (and images, or a cache by the block `cache`), as `pairs.read_rows` makes it."""
    config, base = experiment.config, experiment.base
    split = partial(_shape, mesh.batch_sharding(experiment.mesh))
    rows = {"index": split((b,), np.int32), "ids": split((b, experiment.base.tokenizer.length), np.int32)}
    if encodes(config):
        rows["image"] = split((b, base.resolution, base.resolution, 3), np.uint8)
    elif config.pairs.start == "data":
        rows |= {name: split((b, *base.latent_shape), jnp.dtype(config.cache.storage)) for name in kinds.LATENTS}
    if kinds.has_latents(config.data) and config.cache.text:
        told = jax.eval_shape(base.condition, base.text, jax.ShapeDtypeStruct(rows["ids"].shape, np.int32))
        kept = {name: value for name, value in zip(kinds.TEXTS, told, strict=False) if value is not None}
        rows |= {name: split(value.shape, jnp.dtype(config.cache.storage)) for name, value in kept.items()}
    return rows


def record_shapes(experiment: Experiment, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of pair records, as `data.records` keeps them."""
    config, split = experiment.config, partial(_shape, mesh.batch_sharding(experiment.mesh))
    b, bounds = config.train.batch, record_bounds(config, stage)
    return {
        "states": split((b, bounds, *experiment.base.latent_shape), jnp.dtype(config.pairs.storage)),
        "first": split((b,), np.int32),
        "ids": split((b, experiment.base.tokenizer.length), np.int32),
    }


def record_bounds(config: Any, stage: Stage) -> int:
    """States of one record: both ends of a window, or every bound of a trajectory."""
    return stage.windows + 1 if config.pairs.start == "noise" else 2


def storage(experiment: Experiment, stage: Stage) -> dict[str, int]:
    """Bytes that a stage leaves on the disk: its pairs and the checkpoints that it keeps."""
    config = experiment.config
    record = {name: shape.shape[1:] for name, shape in record_shapes(experiment, stage).items()}
    width = {"states": jnp.dtype(config.pairs.storage).itemsize, "first": 4, "ids": 4}
    one = sum(width[name] * int(np.prod(shape)) for name, shape in record.items())
    stored = 0 if stage.online else config.pairs.examples
    state = sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(experiment.layout.target))
    return {"pairs": one * stored, "checkpoints": state * config.checkpoint.keep}


def argument_bytes(job: Job) -> dict[str, int]:
    """Bytes of a job's arguments on one device by class, before they are filled up to tiles."""
    found = dict.fromkeys((STATE, FROZEN, BATCH), 0)
    for kind, argument in zip(job.classes, job.arguments, strict=True):
        found[kind] += tpu_compile.held(argument)
    return found


def _counted(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    return flops.total(flops.count(function, *arguments))


def _shape(place: NamedSharding, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _everywhere(experiment: Experiment, tree: Mapping[str, Any]) -> Any:
    whole = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.tree.map(lambda shape: _shape(whole, shape.shape, shape.dtype), dict(tree))


def _key(experiment: Experiment, stage: Stage) -> jax.ShapeDtypeStruct:
    return _shape(mesh.replicated(experiment.mesh), stage.train_key.shape, stage.train_key.dtype)
