"""One cell of a grid of methods: a method at a seed and a budget, trained in memory.

The algorithm is that of the verbs, function by function; what differs is that pairs and states stay in memory, that compute is
given instead of steps, and that programs are compiled once per shape for all methods, seeds, budgets and alphas.

Compute is counted in forwards of the UNet on one image: a teacher's as they are (two with guidance, two a step of Heun's), an
update as three for each of its images, forward and backward. Text encoder and VAE are not counted.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from proreflow_jax import UserError
from proreflow_jax.data import loader
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Params
from proreflow_jax.reflow import pairs, train_step
from proreflow_jax.reflow.loss import draw_examples, reflow_loss
from proreflow_jax.run.dataset import encodes
from proreflow_jax.run.experiment import Experiment, frozen_arrays
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.metrics import check_finite

UPDATE = 3  # forwards' worth of an update, an image
CALLS = {"heun": 2}  # network calls a solver step; the others: 1

Rows = Callable[[Experiment, Stage], Callable[[np.ndarray], dict[str, np.ndarray]]]  # -> record numbers -> inputs of pairs


class Spent(NamedTuple):
    """What one stage costs."""

    windows: int
    records: int  # of pairs
    updates: int
    examples: int  # that the updates saw: updates times batch
    forwards: int


class Numbers(NamedTuple):
    """What differs between runs of one compiled program."""

    alpha: float
    window_start_prob: float
    steps: int  # of the learning rate's schedule
    count: int  # of the call's updates, at most config.reproduce.chunk


class Programs(NamedTuple):
    """Compiled once per shape, reused by every cell."""

    pairs: Callable[..., dict[str, jax.Array]]  # (frozen, batch, recipe=, flow=)
    update: Callable[..., tuple[train_step.TrainState, Any]]  # (state, frozen, batch, key, numbers, flow=, loss=)


def budget(experiment: Experiment, stage: Stage, forwards: int) -> Spent:
    """What a stage of the experiment's method may cost: an equal share of `forwards`.

    `pair_share` of it goes to the teacher, rounded down to whole batches of pairs, the rest to updates.
    Raises UserError if that is not enough for one batch of pairs and one update.
    """
    config, recipe = experiment.config, stage.pairs
    share = forwards // len(experiment.stages)
    calls = 1 if stage.teacher.windows else CALLS.get(recipe.solver, 1)
    crossed = recipe.windows if recipe.start == "noise" else 1
    cost = recipe.steps * crossed * calls * (1 if recipe.guidance == 1 else 2)
    batch = config.train.batch
    records = int(config.reproduce.pair_share * share / cost) // config.pairs.batch * config.pairs.batch
    updates = (share - records * cost) // (UPDATE * batch)
    if records < 1 or updates < 1:
        raise UserError(
            f"--config.reproduce.budgets: {forwards} leaves {share} for stage {stage.windows}: not enough for one batch of "
            f"{config.pairs.batch} pairs of {cost} forwards each in a share of {config.reproduce.pair_share} and an update of "
            f"{batch} images"
        )
    return Spent(stage.windows, records, updates, updates * batch, records * cost + updates * UPDATE * batch)


def make_programs(experiment: Experiment) -> Programs:
    """The functions that cells call, for one base model, batch and optimizer."""
    networks, config = experiment.networks, experiment.config

    def update(
        before: train_step.TrainState, frozen: pairs.Frozen, batch: Any, key: jax.Array, numbers: Numbers, **static: Any
    ) -> tuple[train_step.TrainState, dict[str, Any]]:
        recipe = static["loss"]._replace(alpha=numbers.alpha, window_start_prob=numbers.window_start_prob)
        bound = {"flow": static["flow"], "networks": networks, "loss": recipe}
        return train_step.train_step(
            before,
            frozen,
            batch,
            key,
            draw=partial(draw_examples, **bound),
            loss=partial(reflow_loss, **bound),
            optimizer=train_step.make_optimizer({**config.optimizer, "steps": numbers.steps}),
            ema_decay=config.train.ema,
            accumulation=1,
            unroll=True,
        )

    def updates(
        before: train_step.TrainState,
        frozen: pairs.Frozen,
        batches: Any,
        key: jax.Array,
        numbers: Numbers,
        *,
        flow: Parameterization,
        loss: Any,
    ) -> tuple[train_step.TrainState, dict[str, Any]]:
        """numbers.count updates, one for each of the leading axis of `batches`; of chunk 1 one update, without that axis."""
        one = lambda now, batch: update(now, frozen, batch, key, numbers, flow=flow, loss=loss)
        if config.reproduce.chunk == 1:
            return one(before, batches)

        def turn(i: jax.Array, carry: Any) -> Any:
            now, metrics = one(carry[0], jax.tree.map(lambda x: x[i], batches))
            return now, {"loss": metrics["loss"]}

        return jax.lax.fori_loop(0, numbers.count, turn, (before, {"loss": jnp.zeros(())}))

    whole = mesh.replicated(experiment.mesh)
    return Programs(
        jax.jit(partial(pairs.cross_windows, networks=networks), static_argnames=("recipe", "flow")),
        jax.jit(updates, static_argnames=("flow", "loss"), donate_argnums=0, out_shardings=(whole, None)),
    )


def train_student(
    experiment: Experiment, programs: Programs, rows: Rows, forwards: int, store: dict[Any, Any]
) -> tuple[Params, list[Spent]]:
    """The last stage's student of the experiment's method, and what each stage cost.

    rows: reads the inputs of pairs.
    store: keeps the pairs that the base model made, for other methods that need the same; their cost counts all the same.
    """
    config, base = experiment.config, experiment.denoiser.params()
    params, spent = base, []
    for stage in experiment.stages:
        cost = budget(experiment, stage, forwards)
        read = rows(experiment, stage)
        if stage.maker:
            records = stage_pairs(experiment, stage, params, cost.records, programs, read)
        else:
            same = (config.seed, cost.records, stage.pairs)
            records = store[same] = store.get(same) or stage_pairs(experiment, stage, base, cost.records, programs, read)
        params = _train_stage(experiment, stage, params, records, cost, programs)
        spent.append(cost)
    return params, spent


def _train_stage(
    experiment: Experiment, stage: Stage, start: Params, records: Mapping[str, np.ndarray], cost: Spent, programs: Programs
) -> Params:
    """The averaged weights after the stage's updates."""
    config, chunk = experiment.config, experiment.config.reproduce.chunk
    loss = stage.loss._replace(alpha=0.0, window_start_prob=0.0)  # what the compiled program depends on
    frozen = frozen_arrays(experiment, stage, {}, with_vae=False)
    rule = train_step.make_optimizer({**config.optimizer, "steps": cost.updates})
    fresh = train_step.init_state({name: jnp.array(value) for name, value in start.items()}, rule, config.train.ema > 0)
    now = jax.device_put(fresh, mesh.replicated(experiment.mesh))
    order = _order(config.seed, cost, config.train.batch)
    split = mesh.batch_sharding(experiment.mesh)
    if chunk > 1:
        split = NamedSharding(experiment.mesh, PartitionSpec(None, *split.spec))
    for begin in range(0, cost.updates, chunk):
        rows = order[begin : begin + chunk]
        count = len(rows)
        rows = np.concatenate([rows, np.repeat(rows[-1:], chunk - count, axis=0)])  # one shape, one program
        rows = rows if chunk > 1 else rows[0]
        batches = jax.device_put({name: values[rows] for name, values in records.items()}, split)
        numbers = Numbers(stage.loss.alpha, stage.loss.window_start_prob, cost.updates, count)
        now, metrics = programs.update(now, frozen, batches, stage.train_key, numbers, flow=stage.student, loss=loss)
    check_finite(cost.updates, {"loss": float(metrics["loss"])})
    return train_step.averaged(now)


def _order(seed: int, cost: Spent, batch: int) -> np.ndarray:
    """Records of each update, (updates, batch): shuffled epochs, as `loader.Loader` reads them."""
    epochs = [loader.permutation(seed, epoch, cost.records) for epoch in range(-(-cost.examples // cost.records))]
    return np.concatenate(epochs)[: cost.examples].reshape(cost.updates, batch)


def stage_pairs(
    experiment: Experiment, stage: Stage, teacher: Params, count: int, programs: Programs, read: Callable[..., Any]
) -> Mapping[str, np.ndarray]:
    """Records 0 to count - 1 of a stage, stacked. read: record numbers -> inputs of pairs."""
    config = experiment.config
    frozen = frozen_arrays(experiment, stage, teacher, with_vae=encodes(config))
    parts = []
    for begin in range(0, count, config.pairs.batch):
        batch = mesh.put_batch(experiment.mesh, read(np.arange(begin, begin + config.pairs.batch)), config.pairs.batch)
        parts.append(jax.device_get(programs.pairs(frozen, batch, recipe=stage.pairs, flow=stage.teacher)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_as(flow: Parameterization, steps: int) -> Parameterization:
    """How a flow is read in so many steps: in fewer than its windows, as a student of that many windows.

    Of a ddim_eps student that is what the stock DDIM scheduler does.
    """
    return flow._replace(windows=min(flow.windows, steps))
