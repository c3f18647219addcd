"""The digits as a testbed: the embedded model, measured by the digits' judges."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax.data import digits
from proreflow_jax.evaluation import classifier, frechet, trajectory
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs import digits_judge, score_digits
from proreflow_jax.models.network import Params
from proreflow_jax.reflow.pairs import make_predict, text_context
from proreflow_jax.reproduction.cell import read_as
from proreflow_jax.reproduction.testbed import Testbed, measured_steps
from proreflow_jax.run.dataset import open_source, read_rows
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_experiment
from proreflow_jax.run.stages import EVALUATION_KEY, Stage, fold_seed, run_key


class Instruments(NamedTuple):
    """What all cells are measured with; programs are compiled once per shape."""

    draw: score_digits.Draw
    walk: Callable[..., tuple[jax.Array, jax.Array]]  # (params, z, context, flow=, nodes=)
    context: Callable[..., Any]
    judge: digits_judge.DigitsJudge


class Inputs(NamedTuple):
    """What every method of a seed is measured by."""

    noise: jax.Array  # (n, h, w, c)
    ids: np.ndarray
    labels: np.ndarray
    reference: np.ndarray  # the teacher's own many-step latents from that noise
    teacher: tuple[np.ndarray, np.ndarray]  # moments of its images


def rows(experiment: Experiment, stage: Stage) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The reader of captions and images, of any stage."""
    config, base = experiment.config, experiment.base
    return partial(read_rows, config, base.tokenizer, open_source(config, base))


def make_instruments(experiment: Experiment) -> Instruments:
    """Judge and programs of one base model."""
    networks, config = experiment.networks, experiment.config

    def walk(
        params: Params, z: jax.Array, context: Any, flow: Parameterization, nodes: tuple[float, ...]
    ) -> tuple[jax.Array, jax.Array]:
        predict = make_predict(networks.denoiser, networks.schedule, params, config.model.sampling_dtype)
        predict = solvers.guided(predict, context, None, 1)
        return trajectory.trajectory(flow, networks.schedule, predict, z, np.asarray(nodes))

    return Instruments(
        score_digits.make_draw(experiment),
        jax.jit(walk, static_argnames=("flow", "nodes")),
        jax.jit(partial(text_context, networks.condition)),
        digits_judge.make_digits_judge(config.data.resolution),
    )


def make_inputs(experiment: Experiment, seed: int, instruments: Instruments) -> Inputs:
    """The noise of a seed, and what the teacher draws from it in config.evaluate.teacher_steps[0] steps."""
    e = experiment.config.evaluate
    labels, ids = score_digits.prompts(experiment, e.examples)
    noise = jax.random.normal(
        fold_seed(run_key(experiment.config, EVALUATION_KEY, 0), seed), (e.examples, *experiment.base.latent_shape)
    )
    base = experiment.denoiser.params()
    latents, images = score_digits.sample_rows(
        instruments.draw, base, experiment.flow, noise, ids, steps=e.teacher_steps[0], batch=e.batch
    )
    digits_judge.check_latents(latents, labels)
    return Inputs(noise, ids, labels, latents, _moments(instruments.judge, images))


def _moments(judge: digits_judge.DigitsJudge, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return frechet.moments(classifier.features(judge.judges, digits.to_pixels8(images)))


def measure_student(
    experiment: Experiment, params: Params, flow: Parameterization, instruments: Instruments, inputs: Inputs
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """(numbers, first images by steps) of a network: at each number of steps, and how its flow bends."""
    config, scores, images = experiment.config, {}, {}
    e, judge = config.evaluate, instruments.judge
    for steps in measured_steps(config, flow.windows):
        way = read_as(flow, steps)
        latents, pictures = score_digits.sample_rows(
            instruments.draw, params, way, inputs.noise, inputs.ids, steps=steps, batch=e.batch
        )
        scores[str(steps)] = digits_judge.scores(judge, latents, pictures, inputs.reference, inputs.labels)
        scores[str(steps)]["frechet_teacher"] = frechet.frechet_distance(_moments(judge, pictures), inputs.teacher)
        if steps in config.reproduce.steps:
            images[steps] = pictures[: e.columns]
    count, nodes = e.study.examples, windows.sampling_nodes(e.study.steps, max(flow.windows, 1))
    context = instruments.context(experiment.base.text, jnp.asarray(inputs.ids[:count]))
    walked = instruments.walk(params, inputs.noise[:count], context, flow=flow, nodes=tuple(nodes.tolist()))
    bends = trajectory.straightness(experiment.networks.schedule, *walked, nodes, max(flow.windows, 1))[1]
    return {"steps": scores, "bend": np.mean(bends, axis=0).tolist()}, images


def _notes(config: ConfigDict) -> str:
    return (
        f"n = {config.evaluate.examples} images. Distance: RMS of the latents' difference to the teacher's own "
        f"{config.evaluate.teacher_steps[0]}-step result from the same noise and prompt. Frechet distances in the features of "
        f"{classifier.FEATURES}: to that result's images, and to the {classifier.REAL}; kernel distance to as many "
        "of these, the same digits as the prompts'. Guidance 1."
    )


DIGITS = Testbed(
    open=open_experiment,
    check=score_digits.check_digits,
    prepare=lambda experiment: open_source(experiment.config, experiment.base),
    rows=rows,
    instruments=make_instruments,
    inputs=make_inputs,
    measure=measure_student,
    measures={
        "distance": "Distance to the teacher",
        "frechet_teacher": "Frechet distance to the teacher",
        "frechet": "Frechet distance to the real digits",
        "kernel": "Kernel distance to the real digits, times 1000",
    },
    short={"distance": "distance", "frechet_teacher": "Frechet, teacher", "frechet": "Frechet, real", "kernel": "kernel, real"},
    real="frechet",
    notes=_notes,
)
