"""A config and its base model as one value: opened, and checked as far as it can be before anything is written."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax import base_model, inputs
from proreflow_jax.checks import RULES, check_choice, check_config, check_resolution, check_student
from proreflow_jax.data import kinds
from proreflow_jax.data.loader import Source
from proreflow_jax.flow.parameterization import DIFFUSION, Parameterization
from proreflow_jax.flow.schedule import from_config
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import lora_factors, pipeline
from proreflow_jax.reflow import stages
from proreflow_jax.reflow.loss import LossRecipe, check_loss
from proreflow_jax.reflow.pairs import Frozen, Networks, PairRecipe, check_steps
from proreflow_jax.reflow.stages import DONE, Stage
from proreflow_jax.reflow.train_step import TrainState, averaged, init_state, state_shardings
from proreflow_jax.runtime import mesh, optimizer
from proreflow_jax.runtime.checkpoint import Checkpoints, digest, fold
from proreflow_jax.storage import atomic, paths

FREE = (  # fields that a resumed stage may change
    "model.path", "model.revision", "model.like", "model.attention", "train.remat", "train.log_every", *kinds.UNCOUNTED,
)  # fmt: skip
PAIR_KEY, TRAIN_KEY, EVALUATION_KEY = 1, 2, 3  # folded into the run's key, then the stage's windows


class Experiment(NamedTuple):
    """What every verb works with."""

    config: ConfigDict
    run: paths.Location
    base: pipeline.Pipeline
    networks: Networks
    flow: Parameterization  # of the base model
    stages: list[Stage]
    mesh: Mesh


class Weights(NamedTuple):
    """A network somebody hands on: how it is read, and the digest that lineage is made of."""

    params: Params
    flow: Parameterization
    digest: str  # of what was trained: the weights, or their factors
    factors: Params = {}  # low-rank, relative to the base model, where only these were trained


def open_experiment(config: ConfigDict) -> Experiment:
    """Reads the base model and checks the config; writes nothing. Raises ValueError or FileNotFoundError, one line."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    paths.check_reachable(_planned(config, machine)[0])
    return _opened(config, machine, base_model.load(config, machine, partial(places, config, machine)))


def open_outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """The same on devices that need not be here, its base model in shapes: for compiling, not for running."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices, config.mesh.slices)
    return _opened(config, machine, base_model.outline(config, machine))


def _opened(config: ConfigDict, machine: Mesh, base: pipeline.Pipeline) -> Experiment:
    run, plan = _planned(config, machine)
    networks = Networks(base.unet, base.condition, base.vae, from_config(base.scheduler), base.scaling)
    flow = Parameterization(base.scheduler.get("prediction_type", "epsilon"))
    check_choice(flow.prediction, DIFFUSION, "prediction_type in the base model's scheduler_config.json")
    return _fitting(Experiment(config, run, base, networks, flow, plan, machine))


def reopen(experiment: Experiment, config: ConfigDict) -> Experiment:
    """Another config of the same base model on the same mesh, checked alike."""
    run, plan = _planned(config, experiment.mesh)
    return _fitting(experiment._replace(config=config, run=run, stages=plan))


def _planned(config: ConfigDict, machine: Mesh) -> tuple[paths.Location, list[Stage]]:
    """The run's folder and its stages, after all checks that need no base model."""
    run = paths.parse_path(config.root) / paths.check_name(config.name)
    check_config(config, machine)
    check_loss(loss_recipe(config))
    return run, stages.plan_stages(config.stages, run)


def _fitting(experiment: Experiment) -> Experiment:
    """The experiment itself, if its config fits its base model: the reading, teacher's steps, resolution, LoRA's layers."""
    c, side = experiment.config, experiment.base.resolution
    check_student(c, experiment.flow.prediction)
    for stage in experiment.stages:
        check_steps(pair_recipe(experiment, stage), teacher_flow(experiment, stage))
    if c.pairs.start == "data":  # images become latents of the shape that the noise has
        check_resolution(c, side)
    trained_shapes(experiment)
    return experiment


def loss_recipe(config: ConfigDict) -> LossRecipe:
    """The loss as the step wants it."""
    return LossRecipe(**config.loss, dtype=config.model.dtype)


def student_flow(config: ConfigDict, stage: Stage) -> Parameterization:
    """How the student of a stage is read."""
    return Parameterization(config.student.prediction, stage.windows, config.student.path)


def _made_by_base(config: ConfigDict, stage: Stage) -> bool:
    return stage.parent is None or config.pairs.teacher == "base"


def teacher_flow(experiment: Experiment, stage: Stage) -> Parameterization:
    """How the network that makes a stage's pairs is read."""
    if _made_by_base(experiment.config, stage):
        return experiment.flow
    before = experiment.stages[[s.windows for s in experiment.stages].index(stage.windows) - 1]
    return student_flow(experiment.config, before)


def pair_recipe(experiment: Experiment, stage: Stage) -> PairRecipe:
    """How a stage's pairs are made. Teacher steps a window grow as windows merge, so the solver's step stays the same."""
    config, teacher = experiment.config, teacher_flow(experiment, stage)
    per_window = config.pairs.steps * experiment.stages[0].windows // stage.windows
    if teacher.windows:
        per_window = config.pairs.substeps * teacher.windows // stage.windows
    return PairRecipe(
        windows=stage.windows,
        start=config.pairs.start,
        steps=per_window,
        solver=config.pairs.solver,
        guidance=1.0 if teacher.windows else config.pairs.guidance,  # a student has learned it already
        dropout=config.pairs.prompt_dropout,
        latent=experiment.base.latent_shape,
        dtype=config.model.teacher_dtype,
    )


def run_key(config: ConfigDict, purpose: int, windows: int) -> jax.Array:
    """The one key of a job, from the run's seed, what it is for, and the stage."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), windows)


def places(config: ConfigDict, machine: Mesh, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Where a network's parameters live, by --config.mesh.rules: {name: sharding}."""
    return mesh.shardings(machine, mesh.specs(_rules(config), {name: shape.shape for name, shape in shapes.items()}, machine))


def _rules(config: ConfigDict) -> list[tuple[str, Any]]:
    return [(pattern, RULES[value]) for pattern, value in config.mesh.rules]


def base_weights(experiment: Experiment) -> Weights:
    """The base model's UNet."""
    params = experiment.base.params["unet"]
    return Weights(params, experiment.flow, fold(digest(params)))


def load_weights(experiment: Experiment, stage: Stage | None) -> Weights:
    """The finished student of a stage (its average where there is one), or the base model for None.

    Raises FileNotFoundError if the stage is not done, ValueError if its weights are not those its DONE.json names.
    """
    if stage is None:
        return base_weights(experiment)
    if not (stage.folder / DONE).is_file():
        raise FileNotFoundError(f"{stage.folder / DONE} is missing: run distill, or train --stage={stage.windows}")
    done = atomic.read_json(stage.folder / DONE)
    with Checkpoints(stage.folder / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(done["step"], state_target(experiment)).state
    trained = averaged(state)
    found = fold(digest(trained))
    if found != done["digest"]:
        raise ValueError(f"{stage.folder}: the weights are not those of {DONE}: remove the folder and run the stage again")
    if not experiment.config.student.lora.rank:
        return Weights(trained, Parameterization(**done["flow"]), found)
    add = partial(whole_weights, config=experiment.config)
    params = jax.jit(add)(trained, experiment.base.params["unet"])
    return Weights(params, Parameterization(**done["flow"]), found, trained)


def trained_shapes(experiment: Experiment) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a stage trains: all weights of the UNet, or low-rank factors. Raises ValueError for a regex without a layer."""
    l, shapes = experiment.config.student.lora, experiment.networks.unet.shapes
    return lora_factors.shapes(shapes, l.layers, l.rank) if l.rank else shapes


def lora_scale(config: ConfigDict) -> float:
    """What the factors' product counts."""
    return lora_factors.scale_of(config.student.lora.rank, config.student.lora.alpha)


def whole_weights(trained: Params, base: Params, *, config: ConfigDict) -> Params:
    """What is trained -> the UNet's weights: the one function in front of `apply` that makes a student a LoRA."""
    return lora_factors.add(base, trained, lora_scale(config)) if config.student.lora.rank else trained


def parent_stage(experiment: Experiment, stage: Stage) -> Stage | None:
    """The stage a stage starts from; None is the base model."""
    return next((other for other in experiment.stages if other.folder == stage.parent), None)


def frozen_arrays(experiment: Experiment, teacher: Params, stage: Stage, with_vae: bool) -> Frozen:
    """The arrays that a stage's jobs read and never change, on every device."""
    place = mesh.replicated(experiment.mesh)
    vae = experiment.base.params["vae"] if with_vae else {}
    beside = experiment.base.params["unet"] if experiment.config.student.lora.rank else {}
    empty = experiment.base.tokenizer.encode([""])[0]
    put = partial(jax.device_put, device=place)
    key = run_key(experiment.config, PAIR_KEY, stage.windows)
    return Frozen(put(experiment.base.text), put(vae), teacher, put(empty), key, beside)


def make_optimizer(config: ConfigDict) -> Any:
    """The optax chain of a stage."""
    return optimizer.make({**config.optimizer, "steps": config.train.steps})


def fresh_state(experiment: Experiment, parent: Weights) -> TrainState:
    """A state that starts from given weights, born where it lives; a LoRA goes on with the factors of the stage before."""
    l, start = experiment.config.student.lora, parent.params
    if l.rank:
        key = jax.random.key(experiment.config.seed)
        start = parent.factors or lora_factors.init(experiment.networks.unet.shapes, l.layers, l.rank, key)
    init = lambda p: init_state(p, make_optimizer(experiment.config), experiment.config.train.ema > 0)
    return jax.jit(init, out_shardings=state_places(experiment))(start)


def _state_shapes(experiment: Experiment) -> TrainState:
    config = experiment.config
    init = lambda p: init_state(p, make_optimizer(config), config.train.ema > 0)
    return jax.eval_shape(init, trained_shapes(experiment))


def state_places(experiment: Experiment) -> Any:
    """Shardings of the training state by --config.mesh.rules."""
    return state_shardings(experiment.mesh, _rules(experiment.config), _state_shapes(experiment))


def state_target(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the training state, for a restore."""
    place = lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)
    return jax.tree.map(place, _state_shapes(experiment), state_places(experiment))


def check_ready(experiment: Experiment, stage: Stage) -> None:
    """Raises FileNotFoundError, one line, if the stage that another starts from is not done; ValueError for bad data or rules.

    A job asks this before it makes its folder. The digits are written by the job itself, so nothing is asked of them.
    """
    state_places(experiment)
    before = parent_stage(experiment, stage)
    if before is not None and not (before.folder / DONE).is_file():
        raise FileNotFoundError(f"{before.folder / DONE} is missing: run distill, or train --stage={before.windows}")
    if experiment.config.data.kind == "digits":
        paths.parse_local(experiment.config.data.path, inputs.DATA)
    else:
        open_source(experiment)


def open_source(experiment: Experiment) -> Source:
    """The captions, and images or their latents, of the config; see `inputs.open_source`."""
    return inputs.open_source(experiment.config, experiment.base)


def stage_plan(experiment: Experiment, stage: Stage, parent: str, blocks: Sequence[str]) -> dict[str, Any]:
    """What may not change while a stage is under way: the named blocks of the config, flat, and the parent's digest.

    Left out is what changes no result: where the base model lies (its digest is the first parent) and how often is logged.
    """
    config = experiment.config
    plan: dict[str, Any] = {"examples": config.pairs.examples, "shard_size": config.pairs.shard_size, "windows": stage.windows}
    for block in blocks:
        plan |= {f"{block}.{name}": _plain(value) for name, value in config[block].items()}
    plan |= kinds.identity(inputs.here(config.data))
    return {name: value for name, value in plan.items() if name not in FREE} | {"seed": config.seed, "parent": parent}


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON gives back."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping | ConfigDict) else value
