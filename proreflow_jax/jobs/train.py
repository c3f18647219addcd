"""Trains a stage from its parent's weights to DONE.json."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import loader, record_plan
from proreflow_jax.flow.parameterization import OF_FLOWS
from proreflow_jax.jobs.onlookers import axis, make_onlookers, tracked
from proreflow_jax.jobs.stage_pictures import StagePictures
from proreflow_jax.models.attention_kernels import FUSED
from proreflow_jax.models.network import Params
from proreflow_jax.reflow import loop, pairs
from proreflow_jax.reflow.loss import draw_examples, reflow_loss
from proreflow_jax.reflow.pairs import check_identity, text_context
from proreflow_jax.reflow.train_step import TrainState, averaged, train_step
from proreflow_jax.run import train_state
from proreflow_jax.run.check_config import few_starts
from proreflow_jax.run.compiler_options import compiler_options
from proreflow_jax.run.dataset import encodes, open_source, read_rows
from proreflow_jax.run.experiment import (
    TRAINED,
    Experiment,
    Weights,
    finished_weights,
    first_weights,
    frozen_arrays,
    guidance_contract,
    handed_on,
    load_weights,
    stage_plan,
)
from proreflow_jax.run.outlook import TRAIN, Outlook, compiling
from proreflow_jax.run.pair_source import open_pairs, widened
from proreflow_jax.run.stages import TRAIN_KEY, Done, Stage, read_done, run_key, write_done
from proreflow_jax.run.text_states import WithText, host_context, spares_encoders
from proreflow_jax.runtime import mesh, stopping
from proreflow_jax.runtime.checkpoint import Checkpoints, Restored, digest, fold
from proreflow_jax.runtime.damage import Damaged
from proreflow_jax.runtime.metrics import Metrics, Trace
from proreflow_jax.runtime.processes import first, first_says

log = logging.getLogger(__name__)
IDENTITY_PROMPTS = ("", "a", "a photo", "one two three")  # any will do: the step-0 identity holds for all


def train_stage(experiment: Experiment, stage: Stage, outlook: Outlook, program: Any = None) -> None:
    """Trains what is missing of a stage. The caller holds the stage's lock; `outlook` counts the steps.

    program: `jit_step` of another stage, where pairs are stored: it is not traced again. None: the stage's own.
    """
    config, target = experiment.config, experiment.layout.target
    plan = stage_plan(experiment, stage, handed_on(experiment, stage.parent), TRAINED)
    first(lambda: record_plan.fix_plan(stage.folder, plan))
    if _is_finished(experiment, stage, plan["parent"]):
        log.info("stage %d: done", stage.windows)
        outlook.finished(TRAIN, stage.windows)
        return
    parent, source = load_weights(experiment, stage.parent), _source(experiment, stage)
    if stage.parent is None:
        _identity(experiment, stage, parent)
    with Checkpoints(stage.folder / "checkpoints", config.checkpoint.keep, config.checkpoint.every) as checkpoints:
        start, state, meta = 0, None, {}
        if checkpoints.latest() is not None:
            start, state, meta = _of_this_stage(checkpoints.restore(None, target), experiment, stage, parent.digest)
        elif first_says(stage.done.is_file):
            raise UserError(
                f"{checkpoints.folder} holds no step, though {stage.done} says that the stage is done: bring the last step "
                "back from a copy; with the record moved aside the same command trains the stage from step 0"
            )
        pictures = StagePictures(experiment, stage)
        if start < config.train.steps:
            if stage.parent is None and start == 0 and (line := few_starts(config)):
                log.warning("%s", line)
            log.info("stage %d: training, %d of %d steps done", stage.windows, start, config.train.steps)
            step, lineage = make_train_step(experiment, stage, parent, program), parent.digest
            if state is None:
                state = train_state.fresh_state(experiment.layout, first_weights(experiment, parent))
            del parent
            experiment.denoiser.free()  # state and step have copies of what they need
            state = train_state.stacked(experiment.layout, state)
            begun = Begun(start, meta.get(loop.SUMS, {}), lineage)
            trained = _advance(
                experiment, stage, step, state, checkpoints, source=source, begun=begun, views=(outlook, pictures)
            )
        else:
            lineage, trained = parent.digest, averaged(state)
            if pictures.missing(start):
                pictures.draw(start, trained)
        weights = fold(digest(trained))
        del state, trained
        checkpoints.finish(config.train.steps, target)
    write_done(stage, Done(config.train.steps, weights, lineage, stage.student, guidance_contract(config)))
    outlook.finished(TRAIN, stage.windows)
    outlook.keep()
    stopping.stop_if_asked()


def _is_finished(experiment: Experiment, stage: Stage, parent: str) -> bool:
    """Whether a stage is done, its record and its last step are whole. Says why, if it has to be finished again.

    Raises UserError if record and step are not of one run.
    """
    if not first_says(stage.done.is_file):
        return False
    try:
        done = read_done(stage)
        finished_weights(experiment, stage, done)
    except (Damaged, MissingFile) as error:
        log.warning("stage %d: %s; going on from the newest good step", stage.windows, error)
        return False
    if done.parent != parent:
        raise UserError(
            f"{stage.done} is of a student with another parent, {done.parent[:16]}: put this stage's own record back"
        )
    return True


def _of_this_stage(restored: Restored, experiment: Experiment, stage: Stage, parent: str) -> Restored:
    """The checkpoint itself. Raises UserError if it was saved in another stage or run: all stages have the same shapes."""
    saved = {"seed": restored.meta["seed"], **restored.meta["lineage"]}
    if saved != {"seed": experiment.config.seed, "parent": parent, "windows": stage.windows}:
        raise UserError(
            f"{stage.folder / 'checkpoints'}: step {restored.step} was saved by another stage or run ({saved['windows']} "
            f"windows, seed {saved['seed']}, parent {saved['parent'][:16]}): put this stage's own checkpoints back"
        )
    return restored


def _source(experiment: Experiment, stage: Stage) -> loader.Source:
    """Pair records of this very config, or captions (and images) for the online mode."""
    if stage.online:
        return open_source(experiment.config, experiment.base)
    made = open_pairs(experiment, stage)
    if not spares_encoders(experiment.config, experiment.base):
        return made
    return WithText(made, open_source(experiment.config, experiment.base), experiment.config.seed)


def _identity(experiment: Experiment, stage: Stage, parent: Weights) -> None:
    networks, base = experiment.networks, experiment.base
    if spares_encoders(experiment.config, base):
        context = host_context(base, IDENTITY_PROMPTS)
    else:
        ids = jnp.asarray(base.tokenizer.encode(IDENTITY_PROMPTS))
        context = jax.jit(partial(text_context, networks.condition))(base.text, ids)
    gap = check_identity(
        parent.params,
        context,
        base.latent_shape,
        run_key(experiment.config, TRAIN_KEY, 0),
        denoiser=networks.denoiser,
        schedule=networks.schedule,
        base=experiment.flow,
        student=stage.student,
    )
    if gap is not None:
        kind = "Euler" if experiment.flow.prediction in OF_FLOWS else "DDIM"
        log.info("step-0 identity: the untrained student is its teacher, one %s step a window (gap %.1e)", kind, gap)


def make_train_step(
    experiment: Experiment, stage: Stage, parent: Weights, program: Any = None
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(stacked state, batch) -> (stacked state, numbers): `jit_step` with its frozen arrays, a teacher among them if online."""
    teacher: Params = {}
    if stage.online:
        teacher = parent.params if stage.maker is stage.parent else load_weights(experiment, stage.maker).params
    frozen = frozen_arrays(experiment, stage, teacher, with_vae=stage.online and encodes(experiment.config))
    if not stage.online:
        windows = jax.device_put(np.int32(stage.windows), mesh.replicated(experiment.mesh))
        frozen = frozen._replace(windows=windows)
    stacked, jitted = train_state.stack_frozen(experiment.layout, frozen), program or jit_step(experiment, stage)
    return lambda state, batch: jitted(state, stacked, batch, stage.train_key)


class Begun(NamedTuple):
    """Where a stage goes on."""

    start: int  # steps done
    sums: dict[str, Any]  # of the line of metrics that is under way there
    parent: str  # digest of the weights that the stage started from


def _advance(
    experiment: Experiment,
    stage: Stage,
    step: Callable,
    state: Any,
    checkpoints: Checkpoints,
    *,
    source: loader.Source,
    begun: Begun,
    views: tuple[Outlook, StagePictures],
) -> Params:
    """Runs the loop from where the stage stands to its end: a stacked state -> the weights to hand on, by torch names."""
    config, start, (outlook, pictures) = experiment.config, begun.start, views

    def meta(done: int) -> dict[str, Any]:
        position, lineage = done * config.train.batch, {"parent": begun.parent, "windows": stage.windows}
        return {"seed": config.seed, "position": position, "lineage": lineage, "guidance": guidance_contract(config)}

    unstacked = partial(train_state.unstacked, experiment.layout)
    with (
        tracked(experiment) as tracker,
        Metrics(stage.folder, start, tracker=tracker, **axis(experiment, stage)) as metrics,
        batches_from(experiment, stage, source, start) as batches,
        Trace(stage.folder / "profile", config.profile.steps) as trace,
        outlook.part(TRAIN, stage.windows, start) as progress,
    ):
        onlookers = make_onlookers(experiment, metrics, progress, outlook, pictures)
        onlookers.pictured(start, state)
        compiling("the train step", experiment.networks.denoiser)
        progress.restart()
        state = loop.run_loop(
            step, state, batches, total=config.train.steps, metrics=metrics, checkpoints=checkpoints,
            log_every=config.train.log_every, meta=meta, trace=trace, let_go=unstacked, sums=begun.sums, onlookers=onlookers,
        )  # fmt: skip
    return unstacked(averaged(state))


def jit_step(experiment: Experiment, stage: Stage) -> Any:
    """(stacked state, stacked frozen arrays, batch, key) -> (stacked state, numbers), with the shardings of the mesh.

    The state is donated. Compiles without any weights. Of stored pairs all stages have the same.
    """
    config, machine, layout = experiment.config, experiment.mesh, experiment.layout
    unstack = train_state.unstack_frozen(layout)
    draw, of_weights = step_parts(experiment, stage)

    def step(state: TrainState, frozen: pairs.Frozen, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        return update(
            state, unstack(frozen), batch, key, loss=lambda trained, examples: of_weights(trained, frozen.base, examples)
        )

    update = partial(
        train_step,
        draw=draw,
        optimizer=layout.optimizer,
        ema_decay=config.train.ema,
        accumulation=config.train.accumulation,
        unroll=mesh.platform(machine) == "cpu",
        in_order=machine if _sums_in_order(experiment) else None,
        tables=(layout.table,),
    )
    shardings = jax.tree.map(lambda shape: shape.sharding, train_state.stacked_shapes(layout))
    rows, whole = mesh.batch_sharding(machine), mesh.replicated(machine)
    places = dict(in_shardings=(shardings, None, rows, None), out_shardings=(shardings, whole), donate_argnums=0)
    return jax.jit(step, **places, compiler_options=compiler_options(experiment.networks.denoiser, machine, config))


def _sums_in_order(experiment: Experiment) -> bool:
    """On CPUs with the state whole on each: there it costs little, and several processes make the very bits of one.

    Two devices' sums have one order. Not around a TPU's kernels, which spread themselves over the devices.
    """
    machine, form = experiment.mesh, experiment.config.model.attention
    return mesh.platform(machine) == "cpu" and machine.shape["data"] == machine.size > 2 and form not in FUSED["tpu"]


def step_parts(experiment: Experiment, stage: Stage) -> tuple[Callable, Callable]:
    """A step's two pure functions: draw(frozen, batch, key) -> drawn, and loss(trained, base, drawn) -> (mean, numbers).

    Of stored pairs they are the same in every stage, so that one program is compiled: what differs are `frozen.windows` and
    filling behind the batch's states (`pair_source.widened`).
    """
    networks, whole = experiment.networks, partial(train_state.whole_weights, experiment.layout)
    student = stage.student if stage.online else stage.student._replace(windows=max(experiment.config.stages))
    examples = partial(draw_examples, flow=student, networks=networks, loss=stage.loss)
    crossed = partial(pairs.cross_windows, recipe=stage.pairs, flow=stage.teacher, networks=networks)
    of_weights = partial(reflow_loss, flow=student, networks=networks, loss=stage.loss)

    def draw(frozen: pairs.Frozen, batch: dict, key: jax.Array) -> dict:
        return examples(frozen, crossed(frozen, batch) if stage.online else pairs.spoken(frozen, batch, networks), key)

    return draw, lambda trained, base, examples: of_weights(whole(trained, base), examples)


@contextmanager
def batches_from(
    experiment: Experiment, stage: Stage, source: loader.Source, start: int
) -> Iterator[Iterator[tuple[int, dict]]]:
    """(steps done before, global batch on the mesh) from `start` on: records, or numbered prompts for the online mode."""
    config, machine, b = experiment.config, experiment.mesh, experiment.config.train.batch
    rows = mesh.own_rows(machine, b)
    if stage.online:
        read = partial(read_rows, config, experiment.base.tokenizer, source)
        reader = loader.Ahead(lambda step: (step, read(step * b + rows)), count(start), depth=2)
    else:
        reader = loader.Loader(source, b, config.seed, start_step=start, rows=rows, groups=config.train.groups)
    with reader as batches:
        yield widened(experiment, stage, ((step, mesh.put_batch(machine, batch, b)) for step, batch in batches))
