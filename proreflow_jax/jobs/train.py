"""Trains a stage from its parent's weights to DONE.json."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from proreflow_jax.data import loader, record_plan, records
from proreflow_jax.jobs.pairs import PLANNED, read_rows
from proreflow_jax.reflow import loop, pairs
from proreflow_jax.reflow.identity import check_identity
from proreflow_jax.reflow.loss import draw_examples, reflow_loss
from proreflow_jax.reflow.predict import text_context
from proreflow_jax.reflow.stages import DONE, Stage
from proreflow_jax.reflow.train_step import TrainState, averaged, train_step
from proreflow_jax.run import stacked_state
from proreflow_jax.run.dataset import encodes
from proreflow_jax.run.experiment import TRAIN_KEY, Experiment, Weights, run_key
from proreflow_jax.run.lineage import guidance_contract, load_weights, stage_plan
from proreflow_jax.run.open import open_source
from proreflow_jax.run.recipes import loss_recipe, pair_recipe, parent_stage, student_flow, teacher_flow
from proreflow_jax.run.train_state import fresh_state, frozen_arrays, make_optimizer, state_target, whole_weights
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import Checkpoints, digest, fold
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.processes import first, first_says, leads
from proreflow_jax.runtime.profiler import Trace
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
IDENTITY_PROMPTS = ("", "a", "a photo", "one two three")  # any will do: the step-0 identity holds for all


def train_stage(experiment: Experiment, stage: Stage) -> None:
    """Trains what is missing of a stage. The caller holds the stage's lock."""
    config = experiment.config
    parent = load_weights(experiment, parent_stage(experiment, stage))
    plan = stage_plan(experiment, stage, parent.digest, (*PLANNED, "loss", "train", "optimizer"))
    first(lambda: record_plan.fix_plan(stage.folder, plan))
    if first_says((stage.folder / DONE).is_file):
        log.info("stage %d: done", stage.windows)
        return
    source = _source(experiment, stage)
    if stage.parent is None:
        _identity(experiment, stage, parent)
    with Checkpoints(stage.folder / "checkpoints", config.checkpoint.keep, config.checkpoint.every) as checkpoints:
        start, state = 0, None
        if checkpoints.latest() is not None:
            start, state, _ = checkpoints.restore(None, state_target(experiment))
        if start < config.train.steps:
            log.info("stage %d: training, %d of %d steps done", stage.windows, start, config.train.steps)
            state = fresh_state(experiment, parent) if state is None else state
            parent = parent._replace(params={}, factors={})  # the state has its own copy
            trained = _advance(
                experiment, stage, source, checkpoints, start, stacked_state.hold(experiment, state), parent.digest
            )
        else:
            trained = averaged(state)
        weights = fold(digest(trained))
        del state, trained
        checkpoints.finish(config.train.steps, state_target(experiment))
    flow = student_flow(config, stage)
    done = {"step": config.train.steps, "digest": weights, "parent": parent.digest, "flow": flow._asdict()}
    done |= {"guidance": guidance_contract(config)}
    first(lambda: atomic.write_json(stage.folder / DONE, done))


def _source(experiment: Experiment, stage: Stage) -> loader.Source:
    """Pair records, or captions (and images) for the online mode."""
    if experiment.config.pairs.mode == "online":
        return open_source(experiment)
    return records.PairRecords(paths.local_copy(stage.folder / "pairs"), verify=leads())


def _identity(experiment: Experiment, stage: Stage, parent: Weights) -> None:
    ids = jnp.asarray(experiment.base.tokenizer.encode(IDENTITY_PROMPTS))
    networks = experiment.networks
    gap = check_identity(
        parent.params,
        jax.jit(partial(text_context, networks.condition))(experiment.base.text, ids),
        experiment.base.latent_shape,
        run_key(experiment.config, TRAIN_KEY, 0),
        unet=networks.unet,
        schedule=networks.schedule,
        base=experiment.flow,
        student=student_flow(experiment.config, stage),
    )
    if gap is not None:
        log.info("step-0 identity: the untrained student is its teacher, one DDIM step a window (gap %.1e)", gap)


def _advance(
    experiment: Experiment, stage: Stage, source: loader.Source, checkpoints: Checkpoints, start: int, state: Any, parent: str
) -> Any:
    """Runs the loop from `start` to the end of the stage: a held state -> what it hands on, by torch names."""
    config, let_go = experiment.config, partial(stacked_state.let_go, experiment)
    step = make_train_step(experiment, stage)

    def meta(done: int) -> dict[str, Any]:
        lineage = {"parent": parent, "windows": stage.windows}
        return {
            "seed": config.seed,
            "position": done * config.train.batch,
            "lineage": lineage,
            "guidance": guidance_contract(config),
        }

    with (
        Metrics(stage.folder, start, config.train.steps) as metrics,
        batches_from(experiment, source, start) as batches,
        Trace(stage.folder / "profile", config.profile.steps) as trace,
    ):
        state = loop.run_loop(
            step, state, batches, total=config.train.steps, metrics=metrics, checkpoints=checkpoints,
            log_every=config.train.log_every, meta=meta, trace=trace, let_go=let_go,
        )  # fmt: skip
    return let_go(averaged(state))


def make_train_step(experiment: Experiment, stage: Stage) -> Any:
    """(held state, batch) -> (held state, numbers), jitted with the shardings of the mesh; the state is donated."""
    config, online = experiment.config, experiment.config.pairs.mode == "online"
    jitted, teacher = jit_step(experiment, stage), {}
    if online:
        by_base = teacher_flow(experiment, stage).windows == 0
        teacher = load_weights(experiment, None if by_base else parent_stage(experiment, stage)).params
    frozen = stacked_state.hold_frozen(
        experiment, frozen_arrays(experiment, teacher, stage, with_vae=online and encodes(config))
    )
    key = run_key(config, TRAIN_KEY, stage.windows)
    return lambda state, batch: jitted(state, frozen, batch, key)


def jit_step(experiment: Experiment, stage: Stage) -> Any:
    """(held state, held frozen arrays, batch, key) -> (held state, numbers); compiles without any weights."""
    config, loose = experiment.config, stacked_state.loose_frozen(experiment)
    draw, of_weights = step_parts(experiment, stage)

    def step(state: TrainState, frozen: pairs.Frozen, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        return update(state, loose(frozen), batch, key, loss=lambda trained, drawn: of_weights(trained, frozen.base, drawn))

    update = partial(
        train_step,
        draw=draw,
        optimizer=make_optimizer(config),
        ema_decay=config.train.ema,
        accumulation=config.train.accumulation,
        unroll=mesh.platform(experiment.mesh) == "cpu",
        in_order=experiment.mesh if _sums_in_order(experiment) else None,
        tables=(stacked_state.trained_table(experiment),),
    )
    places = jax.tree.map(lambda shape: shape.sharding, stacked_state.held_shapes(experiment))
    rows, whole = mesh.batch_sharding(experiment.mesh), mesh.replicated(experiment.mesh)
    return jax.jit(step, in_shardings=(places, None, rows, None), out_shardings=(places, whole), donate_argnums=0)


def _sums_in_order(experiment: Experiment) -> bool:
    """On CPUs with the state whole on each: there it costs little, and several processes make the very bits of one.

    Two devices' sums have one order. Not around splash kernels, which spread themselves over the devices.
    """
    machine, form = experiment.mesh, experiment.config.model.attention
    return mesh.platform(machine) == "cpu" and machine.shape["data"] == machine.size > 2 and form != "splash"


def step_parts(experiment: Experiment, stage: Stage) -> tuple[Callable, Callable]:
    """A step's two pure functions: draw(frozen, batch, key) -> drawn, and loss(trained, base, drawn) -> (mean, numbers)."""
    config, networks = experiment.config, experiment.networks
    flow, loss, online = student_flow(config, stage), loss_recipe(config), config.pairs.mode == "online"
    examples = partial(draw_examples, flow=flow, networks=networks, loss=loss)
    made = partial(
        pairs.cross_windows, recipe=pair_recipe(experiment, stage), flow=teacher_flow(experiment, stage), networks=networks
    )
    of_weights = partial(reflow_loss, flow=flow, networks=networks, loss=loss)

    def draw(frozen: pairs.Frozen, batch: dict, key: jax.Array) -> dict:
        return examples(frozen, made(frozen, batch) if online else batch, key)

    return draw, lambda trained, base, drawn: of_weights(whole_weights(trained, base, config=config), drawn)


@contextmanager
def batches_from(experiment: Experiment, source: loader.Source, start: int) -> Iterator[Iterator[tuple[int, dict]]]:
    """(steps done before, global batch on the mesh) from `start` on: records, or numbered prompts for the online mode."""
    config, machine = experiment.config, experiment.mesh
    b = config.train.batch
    rows = mesh.own_rows(machine, b)
    if config.pairs.mode == "online":
        numbers = lambda step: step * b + rows
        with loader.Ahead(lambda step: (step, read_rows(experiment, source, numbers(step))), count(start), depth=2) as batches:
            yield ((step, mesh.put_batch(machine, batch, b)) for step, batch in batches)
        return
    with loader.Loader(source, b, config.seed, start_step=start, rows=rows) as batches:
        yield ((step, mesh.put_batch(machine, batch, b)) for step, batch in batches)
