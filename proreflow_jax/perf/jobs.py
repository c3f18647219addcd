"""The jobs of a config as compiled functions: the same functions that the verbs jit, with shapes in place of arrays.

`plan` compiles them for TPU slices, `bench` runs them on the machine at hand.
"""

from collections.abc import Callable
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
from proreflow_jax.jobs.write_records import AHEAD
from proreflow_jax.models import network
from proreflow_jax.models.network import Context
from proreflow_jax.perf import flops, resident
from proreflow_jax.perf.resident import BATCH, ENCODERS, STATE, STUDENT
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.run import cli, train_state
from proreflow_jax.run.dataset import encodes
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh

JOBS = ("pairs", "train", "sample")
WITHOUT_PROTOCOL = 1.0  # guidance of the digits' samples


class Job(NamedTuple):
    """One jitted function of one stage."""

    name: str  # of JOBS
    windows: int  # of the stage
    jitted: Any
    arguments: tuple[Any, ...]  # shapes with shardings, in the function's order
    classes: resident.Classes  # of the arguments
    images: int  # of one call, over all devices
    at_once: int  # images on one device at the same time
    calls: int  # of a whole stage; 0: not part of a stage
    useful: Callable[[], float]  # FLOPs that one call needs, over all devices; recomputation does not count
    beside: resident.Classes  # other arrays that are alive on the devices
    rest: tuple[Any, ...] = ()  # shapes of the arguments by torch names, if the job takes stacks
    hold: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda rest: rest  # arrays by torch names -> arguments


def jobs(experiment: Experiment, stage: Stage, plain: Experiment | None = None) -> dict[str, Job]:
    """The jobs of a stage by name; no pairs in the online mode.

    `plain` is the same experiment with networks whose FLOPs can be counted; those of kernels can't.
    """
    plain = plain or experiment
    by_name = {"train": train_job(experiment, stage, plain), "sample": sample_job(experiment, stage, plain)}
    return by_name if stage.online else {"pairs": pairs_job(experiment, stage, plain), **by_name}


def choose_jobs(config: ConfigDict, stage: int, jobs: str) -> list[tuple[int, str]]:
    """(windows, job) by the flags --stage and --jobs, in the order in which they would run."""
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
    jitted = pairs.jit_pairs(stage, experiment.networks, machine, config)
    frozen = frozen_shapes(experiment, stage, True, encodes(config))._replace(base={})  # which this program does not read
    arguments = frozen, prompt_shapes(experiment, b)
    under_way = [(arguments[1], fetched_shapes(experiment, stage))] * AHEAD
    shards = -(-config.pairs.examples // config.pairs.shard_size)
    calls = shards * -(-config.pairs.shard_size // b)
    useful = partial(_counted, pairs.jit_pairs(stage, plain.networks, machine, config), arguments)
    return Job(
        name="pairs",
        windows=stage.windows,
        jitted=jitted,
        arguments=arguments,
        classes={**resident.frozen_classes(frozen), BATCH: arguments[1]},
        images=b,
        at_once=b // mesh.ways(experiment.mesh),
        calls=calls,
        useful=useful,
        beside=resident.beside_pairs(experiment, stage.maker is None, under_way),
    )


def train_job(experiment: Experiment, stage: Stage, plain: Experiment) -> Job:
    """train: one update."""
    config, layout, online = experiment.config, experiment.layout, stage.online
    b = config.train.batch
    frozen = frozen_shapes(experiment, stage, online, online and encodes(config))
    if not online:
        frozen = frozen._replace(windows=_shape(mesh.replicated(experiment.mesh), (), np.int32))
    stacked = train_state.frozen_shapes(layout, frozen)
    batch = prompt_shapes(experiment, b) if online else record_shapes(experiment, stage, widened=True)
    key = _key(experiment, stage)
    arguments = train_state.stacked_shapes(layout), stacked, batch, key
    rest = layout.target, frozen, batch, key

    def hold(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        state, networks, *others = arrays
        return train_state.stacked(layout, state), train_state.stack_frozen(layout, networks), *others

    at_once = b // mesh.ways(experiment.mesh) // config.train.accumulation
    draw, loss = train.step_parts(plain, stage)

    def useful() -> float:
        examples = jax.eval_shape(draw, frozen, batch, key)
        backward = 1 if config.student.lora.rank else 2  # no gradients of the weights beside the factors
        student = layout.shapes, frozen.base, examples
        return _counted(draw, (frozen, batch, key)) + (1 + backward) * _counted(loss, student)

    return Job(
        name="train",
        windows=stage.windows,
        jitted=train.jit_step(experiment, stage),
        arguments=arguments,
        classes={STATE: arguments[0], **resident.frozen_classes(stacked), BATCH: (batch, key)},
        images=b,
        at_once=at_once,
        calls=config.train.steps,
        useful=useful,
        beside={BATCH: batch},
        rest=rest,
        hold=hold,
    )


def sample_job(experiment: Experiment, stage: Stage, plain: Experiment) -> Job:
    """evaluate: one batch of pictures by the stage's student, in as many steps as windows, with the protocol's guidance."""
    e, base, machine = experiment.config.evaluate, experiment.base, experiment.mesh
    b = -(-e.batch // mesh.ways(experiment.mesh)) * mesh.ways(experiment.mesh)
    protocol = protocols.PROTOCOLS.get(e.protocol)
    guidance = float(e.guidance or (protocol.guidance if protocol else WITHOUT_PROTOCOL))
    options = stage.student, stage.windows, guidance
    vae = network.make_vae(plain.networks.vae.config)  # whole: the ends of strips are computed twice
    plain = plain._replace(networks=plain.networks._replace(vae=vae))
    frozen = frozen_shapes(experiment, stage, True, True)
    split = partial(_shape, mesh.batch_sharding(machine))
    rows = {"number": split((b,), np.uint32), "ids": split((b, base.tokenizer.length), np.int32)}
    whole = partial(_shape, mesh.replicated(machine))
    empty, key = whole((1, base.tokenizer.length), np.int32), _key(experiment, stage)
    arguments = frozen.teacher, frozen.text, frozen.vae, empty, rows, key
    return Job(
        name="sample",
        windows=stage.windows,
        jitted=score_coco.jit_draw(experiment, *options),
        arguments=arguments,
        classes={STUDENT: frozen.teacher, ENCODERS: (frozen.text, frozen.vae, empty), BATCH: (rows, key)},
        images=b,
        at_once=b // mesh.ways(experiment.mesh),
        calls=0,
        useful=partial(_counted, score_coco.jit_draw(plain, *options), arguments),
        beside=resident.beside_samples(experiment, rows),
    )


def frozen_shapes(experiment: Experiment, stage: Stage, teacher: bool, with_vae: bool) -> Frozen:
    """`lineage.frozen_arrays`, as shapes with shardings."""
    base, config = experiment.base, experiment.config
    whole = partial(_everywhere, experiment)
    denoiser = resident.denoiser_shapes(experiment)
    text = {name: encoder.shapes for name, encoder in base.networks.items() if name in base.text}
    spared = base.denoiser_name == "transformer" and _cached_text(config)  # as `text_states.spares_encoders`
    return Frozen(
        text={} if spared else whole(text),
        vae=whole(base.vae.shapes) if with_vae else {},
        teacher=denoiser if teacher else {},
        empty=_shape(mesh.replicated(experiment.mesh), (base.tokenizer.length,), np.int32),
        key=_key(experiment, stage),
        base=train_state.beside_trained(experiment.layout, denoiser),
        unprompted=whole(_context_shapes(experiment, 1)) if spared else None,
    )


def prompt_shapes(experiment: Experiment, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of numbered prompts (and images, or cached latents and texts), as of `pairs.read_rows`."""
    config, base = experiment.config, experiment.base
    split = partial(_shape, mesh.batch_sharding(experiment.mesh))
    rows = {"index": split((b,), np.int32), "ids": split((b, experiment.base.tokenizer.length), np.int32)}
    if encodes(config):
        rows["image"] = split((b, base.resolution, base.resolution, 3), np.uint8)
    elif config.pairs.start == "data":
        rows |= {name: split((b, *base.latent_shape), jnp.dtype(config.cache.storage)) for name in kinds.LATENTS}
    return rows | (_text_shapes(experiment, b) if _cached_text(config) else {})


def _cached_text(config: ConfigDict) -> bool:
    return kinds.has_latents(config.data) and config.cache.text


def _context_shapes(experiment: Experiment, b: int) -> Context:
    base = experiment.base
    return jax.eval_shape(base.condition, base.text, jax.ShapeDtypeStruct((b, base.tokenizer.length), np.int32))


def _text_shapes(experiment: Experiment, b: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the text states that a cache holds."""
    split, dtype = partial(_shape, mesh.batch_sharding(experiment.mesh)), jnp.dtype(experiment.config.cache.storage)
    states = zip(kinds.TEXTS, _context_shapes(experiment, b), strict=False)
    return {name: split(value.shape, dtype) for name, value in states if value is not None}


def record_shapes(experiment: Experiment, stage: Stage, widened: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of pair records, as of `data.records`, or as the train step takes them (`pair_source.widened`)."""
    config, split = experiment.config, partial(_shape, mesh.batch_sharding(experiment.mesh))
    bounds = record_bounds(config, stage)
    b, bounds = config.train.batch, max(config.stages) + 1 if widened and config.pairs.start == "noise" else bounds
    spared = experiment.base.denoiser_name == "transformer" and _cached_text(config)
    texts = _text_shapes(experiment, b) if spared else {}  # read beside the records
    return {
        "states": split((b, bounds, *experiment.base.latent_shape), jnp.dtype(config.pairs.storage)),
        "first": split((b,), np.int32),
        "ids": split((b, experiment.base.tokenizer.length), np.int32),
        **texts,
    }


def fetched_shapes(experiment: Experiment, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what the host fetches of a batch of pairs, as of `pairs.jit_pairs`."""
    config, base, whole = experiment.config, experiment.base, partial(_shape, mesh.replicated(experiment.mesh))
    b, bounds = config.pairs.batch, record_bounds(config, stage)
    return {
        "states": whole((b, bounds, *base.latent_shape), jnp.dtype(config.pairs.storage)),
        "first": whole((b,), np.int32),
        "ids": whole((b, base.tokenizer.length), np.int32),
        **dict.fromkeys(("finite", "fits"), whole((b,), np.bool_)),
    }


def record_bounds(config: Any, stage: Stage) -> int:
    """States of one record: both ends of a window, or every bound of a trajectory."""
    return stage.windows + 1 if config.pairs.start == "noise" else 2


def storage(experiment: Experiment, stage: Stage) -> dict[str, int]:
    """Bytes of a stage on the disk: pairs and checkpoints."""
    config = experiment.config
    record = {name: shape.shape[1:] for name, shape in record_shapes(experiment, stage).items()}
    width = {"states": jnp.dtype(config.pairs.storage).itemsize, "first": 4, "ids": 4}
    one = sum(width[name] * int(np.prod(shape)) for name, shape in record.items() if name in width)
    stored = 0 if stage.online else config.pairs.examples
    state = sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(experiment.layout.target))
    return {"pairs": one * stored, "checkpoints": state * config.checkpoint.keep}


def _counted(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    return flops.total(flops.count(function, *arguments))


def _shape(place: NamedSharding, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _everywhere(experiment: Experiment, tree: Any) -> Any:
    whole = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.tree.map(lambda shape: _shape(whole, shape.shape, shape.dtype), tree)


def _key(experiment: Experiment, stage: Stage) -> jax.ShapeDtypeStruct:
    return _shape(mesh.replicated(experiment.mesh), stage.train_key.shape, stage.train_key.dtype)
