"""One cell of a grid of methods: a method at a seed, trained and measured in memory at a given compute.

The algorithm is that of the verbs, function by function; what differs is that pairs and states stay in memory, that compute is
given instead of steps, and that programs are compiled once per shape for all methods, seeds, alphas and numbers of steps.

Compute is counted in forwards of the UNet on one image: a teacher's as they are (two with guidance, two a step of Heun's), an
update as three for each of its images, forward and backward. Text encoder and VAE are not counted.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax import UserError
from proreflow_jax.data import digits, loader
from proreflow_jax.evaluation import classifier, frechet, trajectory
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs import score_digits
from proreflow_jax.models.network import Params
from proreflow_jax.reflow import pairs, train_step
from proreflow_jax.reflow.loss import draw_examples, reflow_loss
from proreflow_jax.reflow.pairs import make_predict, text_context
from proreflow_jax.run.dataset import encodes, open_source, read_rows
from proreflow_jax.run.experiment import Experiment, frozen_arrays
from proreflow_jax.run.stages import EVALUATION_KEY, Stage, run_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.metrics import check_finite

UPDATE = 3  # forwards' worth of an update, an image
CALLS = {"heun": 2}  # network calls a solver step; the others: 1


class Spent(NamedTuple):
    """What one stage costs."""

    windows: int
    examples: int  # pair records
    updates: int
    forwards: int


class Numbers(NamedTuple):
    """What differs between runs of one compiled update."""

    alpha: float
    window_start_prob: float
    steps: int  # of the learning rate's schedule


class Programs(NamedTuple):
    """Compiled once per shape, reused by every cell."""

    pairs: Callable[..., dict[str, jax.Array]]  # (frozen, batch, recipe=, flow=)
    update: Callable[..., tuple[train_step.TrainState, Any]]  # (state, frozen, batch, key, numbers, flow=, loss=)
    draw: score_digits.Draw
    walk: Callable[..., tuple[jax.Array, jax.Array]]  # (params, z, context, flow=, nodes=)
    context: Callable[..., Any]


class CellInputs(NamedTuple):
    """What every method of a seed is measured by."""

    noise: jax.Array  # (n, h, w, c)
    ids: np.ndarray
    labels: np.ndarray
    reference: np.ndarray  # the teacher's own many-step latents from that noise
    teacher: tuple[np.ndarray, np.ndarray]  # moments of its images
    judge: score_digits.DigitsJudge


def budget(experiment: Experiment, stage: Stage) -> Spent:
    """What a stage of the experiment's method may cost: an equal share of config.reproduce.forwards.

    `pair_share` of it goes to the teacher, rounded down to whole batches of pairs, the rest to updates.
    Raises ValueError if that is not enough for one batch of pairs and one update.
    """
    config, recipe = experiment.config, stage.pairs
    share = config.reproduce.forwards // len(experiment.stages)
    calls = 1 if stage.teacher.windows else CALLS.get(recipe.solver, 1)
    crossed = recipe.windows if recipe.start == "noise" else 1
    cost = recipe.steps * crossed * calls * (1 if recipe.guidance == 1 else 2)
    examples = int(config.reproduce.pair_share * share / cost) // config.pairs.batch * config.pairs.batch
    updates = (share - examples * cost) // (UPDATE * config.train.batch)
    if examples < 1 or updates < 1:
        raise UserError(
            f"--config.reproduce.forwards={config.reproduce.forwards} leaves {share} for stage {stage.windows}: not enough for "
            f"one batch of {config.pairs.batch} pairs of {cost} forwards each in a share of {config.reproduce.pair_share} and "
            f"an update of {config.train.batch} images"
        )
    return Spent(stage.windows, examples, updates, examples * cost + updates * UPDATE * config.train.batch)


def make_programs(experiment: Experiment) -> Programs:
    """The functions that cells call, for one base model, batch and optimizer."""
    networks, config = experiment.networks, experiment.config

    def update(
        before: train_step.TrainState,
        frozen: pairs.Frozen,
        batch: Any,
        key: jax.Array,
        numbers: Numbers,
        *,
        flow: Parameterization,
        loss: Any,
    ) -> tuple[train_step.TrainState, Any]:
        recipe = loss._replace(alpha=numbers.alpha, window_start_prob=numbers.window_start_prob)
        bound = {"flow": flow, "networks": networks, "loss": recipe}
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

    def walk(
        params: Params, z: jax.Array, context: Any, flow: Parameterization, nodes: tuple[float, ...]
    ) -> tuple[jax.Array, jax.Array]:
        predict = solvers.guided(make_predict(networks.unet, params, config.model.sampling_dtype), context, None, 1)
        return trajectory.trajectory(flow, networks.schedule, predict, z, np.asarray(nodes))

    whole = mesh.replicated(experiment.mesh)
    return Programs(
        jax.jit(partial(pairs.cross_windows, networks=networks), static_argnames=("recipe", "flow")),
        jax.jit(update, static_argnames=("flow", "loss"), donate_argnums=0, out_shardings=(whole, None)),
        score_digits.make_draw(experiment),
        jax.jit(walk, static_argnames=("flow", "nodes")),
        jax.jit(partial(text_context, networks.condition)),
    )


def train_student(experiment: Experiment, programs: Programs, store: dict[Any, Any]) -> tuple[Params, list[Spent]]:
    """The last stage's student of the experiment's method, and what each stage cost.

    store: keeps the pairs that the base model made, for other methods that need the same; their cost counts all the same.
    """
    config, base = experiment.config, experiment.unet.params()
    params, spent = base, []
    for stage in experiment.stages:
        cost = budget(experiment, stage)
        if stage.maker:
            records = stage_pairs(experiment, stage, params, cost.examples, programs)
        else:
            same = (config.seed, cost.examples, stage.pairs)
            records = store[same] = store.get(same) or stage_pairs(experiment, stage, base, cost.examples, programs)
        loss = stage.loss
        numbers = Numbers(loss.alpha, loss.window_start_prob, cost.updates)
        loss = loss._replace(alpha=0.0, window_start_prob=0.0)  # what the compiled program depends on
        frozen = frozen_arrays(experiment, stage, {}, with_vae=False)
        rule = train_step.make_optimizer({**config.optimizer, "steps": cost.updates})
        fresh = train_step.init_state({name: jnp.array(value) for name, value in params.items()}, rule, config.train.ema > 0)
        now = jax.device_put(fresh, mesh.replicated(experiment.mesh))
        order = _order(config.seed, cost, config.train.batch)
        for rows in order:
            batch = mesh.put_batch(experiment.mesh, {name: values[rows] for name, values in records.items()}, len(rows))
            now, metrics = programs.update(now, frozen, batch, stage.train_key, numbers, flow=stage.student, loss=loss)
        check_finite(cost.updates, {"loss": float(metrics["loss"])})
        params = train_step.averaged(now)
        spent.append(cost)
    return params, spent


def _order(seed: int, cost: Spent, batch: int) -> np.ndarray:
    """Records of each update, (updates, batch): shuffled epochs, as `loader.Loader` reads them."""
    total = cost.updates * batch
    epochs = [loader.permutation(seed, epoch, cost.examples) for epoch in range(-(-total // cost.examples))]
    return np.concatenate(epochs)[:total].reshape(cost.updates, batch)


def stage_pairs(
    experiment: Experiment, stage: Stage, teacher: Params, count: int, programs: Programs
) -> Mapping[str, np.ndarray]:
    """Records 0 to count - 1 of a stage, stacked."""
    config = experiment.config
    read = partial(read_rows, config, experiment.base.tokenizer, open_source(config, experiment.base))
    frozen = frozen_arrays(experiment, stage, teacher, with_vae=encodes(config))
    parts = []
    for begin in range(0, count, config.pairs.batch):
        rows = read(np.arange(begin, begin + config.pairs.batch))
        batch = mesh.put_batch(experiment.mesh, rows, config.pairs.batch)
        parts.append(jax.device_get(programs.pairs(frozen, batch, recipe=stage.pairs, flow=stage.teacher)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def cell_inputs(experiment: Experiment, seed: int, programs: Programs, judge: score_digits.DigitsJudge) -> CellInputs:
    """The noise of a seed, and what the teacher draws from it in config.evaluate.teacher_steps[0] steps."""
    e = experiment.config.evaluate
    labels, ids = score_digits.prompts(experiment, e.examples)
    noise = jax.random.normal(
        jax.random.fold_in(run_key(experiment.config, EVALUATION_KEY, 0), seed), (e.examples, *experiment.base.latent_shape)
    )
    base = experiment.unet.params()
    latents, images = score_digits.sample_rows(
        programs.draw, base, experiment.flow, noise, ids, steps=e.teacher_steps[0], batch=e.batch
    )
    score_digits.check_latents(latents, labels)
    return CellInputs(noise, ids, labels, latents, _moments(judge, images), judge)


def _moments(judge: score_digits.DigitsJudge, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return frechet.moments(classifier.features(judge.judges, digits.to_pixels8(images)))


def read_as(flow: Parameterization, steps: int) -> Parameterization:
    """How a flow is read in so many steps: in fewer than its windows, as a student of that many windows.

    Of a ddim_eps student that is what the stock DDIM scheduler does.
    """
    return flow._replace(windows=min(flow.windows, steps))


def measure_student(
    experiment: Experiment, params: Params, flow: Parameterization, programs: Programs, inputs: CellInputs
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """(numbers, first images by steps) of a network: at each of config.reproduce.steps, and how its flow bends."""
    e, scores, images = experiment.config.evaluate, {}, {}
    for steps in experiment.config.reproduce.steps:
        way = read_as(flow, steps)
        latents, pictures = score_digits.sample_rows(
            programs.draw, params, way, inputs.noise, inputs.ids, steps=steps, batch=e.batch
        )
        scores[str(steps)] = score_digits.scores(inputs.judge, latents, pictures, inputs.reference, inputs.labels)
        scores[str(steps)]["frechet_teacher"] = frechet.frechet_distance(_moments(inputs.judge, pictures), inputs.teacher)
        images[steps] = pictures[: e.columns]
    count, nodes = e.study.examples, windows.sampling_nodes(e.study.steps, max(flow.windows, 1))
    context = programs.context(experiment.base.text, jnp.asarray(inputs.ids[:count]))
    walked = programs.walk(params, inputs.noise[:count], context, flow=flow, nodes=tuple(nodes.tolist()))
    bends = trajectory.straightness(*walked, nodes, max(flow.windows, 1))[1]
    return {"steps": scores, "bend": np.mean(bends, axis=0).tolist()}, images
