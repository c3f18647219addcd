"""What evaluate --study adds to the table: how the flows of a run bend, and what an error of direction or of magnitude costs.

The paper's Fig. 1a and 1b, straightness per window, and velocity errors against the teacher at uniform times and exactly at
window starts. Every number is a mean over examples, then mean and standard deviation over seeds of the noise.
"""

import logging
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import digits
from proreflow_jax.evaluation import figures, trajectory
from proreflow_jax.flow import solvers, windows
from proreflow_jax.reflow.predict import make_predict, text_context
from proreflow_jax.reflow.stages import find_stage
from proreflow_jax.run.experiment import Experiment, Weights
from proreflow_jax.run.lineage import load_weights
from proreflow_jax.run.recipes import EVALUATION_KEY, run_key
from proreflow_jax.runtime.processes import check_alone
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
NUMBERS = "study.json"
TIME = "time t (1: noise, 0: data)"
UNIFORM = 8  # times in each window that stand for uniform t
MAP = 32  # times of the map of velocities, at most


class StudyInputs(NamedTuple):
    """What every method starts from: the same noise and prompts."""

    noise: list[jax.Array]  # one for each seed, (b, h, w, c)
    context: Any
    nodes: np.ndarray  # (steps + 1,), from 1 down to 0; holds the bounds of every stage


def check_study(config: ConfigDict) -> None:
    """Raises ValueError, one line, for a study that cannot be carried out."""
    check_alone("evaluate --study")
    figures.check_matplotlib()
    s = config.evaluate.study
    for name in ("steps", "perturbed_steps"):
        windows.check_steps(s[name], 1000)
    if bad := [count for count in config.stages if s.steps % count]:
        raise UserError(f"--config.evaluate.study.steps={s.steps} must be a multiple of {bad[0]}, a count of --config.stages")
    if s.seeds < 2 or s.examples < 1:
        raise UserError(f"--config.evaluate.study.seeds={s.seeds} must be at least 2 and .examples={s.examples} at least 1")
    if not s.sizes or any(not 0 < size <= 2 for size in s.sizes):
        raise UserError(f"--config.evaluate.study.sizes={s.sizes} must be relative errors in (0, 2]")


def study_flow(experiment: Experiment) -> dict[str, Any]:
    """Measures, writes study.json and the pictures into the run's folder, and returns the numbers."""
    config, s = experiment.config, experiment.config.evaluate.study
    base = load_weights(experiment, None)
    students = {n: load_weights(experiment, find_stage(experiment.stages, n)) for n in config.stages}
    given = _given(experiment)
    walks = {0: _walks(experiment, base, given)} | {n: _walks(experiment, each, given) for n, each in students.items()}
    numbers = {
        "settings": {**s, "sizes": list(s.sizes), "spread": "standard deviation over seeds"},
        "straightness": _straightness(walks, given.nodes, config.stages),
        "velocity_error": {str(n): _errors(experiment, n, base, student, walks[0], given) for n, student in students.items()},
        "discrepancy": _discrepancy(walks[0], given.nodes),
        "perturbation": _perturbation(experiment, base, given),
    }
    atomic.write_json(experiment.run / NUMBERS, numbers)
    _draw(experiment, numbers)
    return numbers


def _given(experiment: Experiment) -> StudyInputs:
    config, s = experiment.config, experiment.config.evaluate.study
    texts = [digits.caption(i % 10, i // 10) for i in range(s.examples)]
    read = jax.jit(partial(text_context, experiment.networks.condition))
    context = read(experiment.base.text, experiment.base.tokenizer.encode(texts))
    keys = jax.random.split(run_key(config, EVALUATION_KEY, 1), s.seeds)
    shape = (s.examples, *experiment.base.latent_shape)
    nodes = windows.sampling_nodes(s.steps, max(config.stages))
    return StudyInputs([jax.random.normal(key, shape) for key in keys], context, nodes)


def _predict(experiment: Experiment, params: Any, context: Any) -> solvers.Predict:
    return solvers.guided(make_predict(experiment.networks.unet, params), context, None, 1)


def _walks(experiment: Experiment, weights: Weights, given: StudyInputs) -> list[tuple[jax.Array, jax.Array]]:
    """(states, velocities) at every node, for each seed."""
    log.info("study: the path of the %s", _name(weights.flow.windows))
    schedule = experiment.networks.schedule

    @jax.jit
    def walk(params: Any, z: jax.Array, context: Any) -> tuple[jax.Array, jax.Array]:
        return trajectory.trajectory(weights.flow, schedule, _predict(experiment, params, context), z, given.nodes)

    return [walk(weights.params, z, given.context) for z in given.noise]


def _name(count: int) -> str:
    return f"{count}-window student" if count else "base model"


def _spread(values: Any) -> dict[str, Any]:
    """Numbers of each seed, the seeds in front -> their mean and standard deviation."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean(axis=0).tolist(), "spread": values.std(axis=0, ddof=1).tolist()}


def _straightness(walks: dict[int, list], nodes: np.ndarray, counts: tuple[int, ...]) -> dict[str, Any]:
    """Relative straightness: of a student in its own windows, of the base model in those of every stage and in one."""
    relative = lambda walk, n: np.mean(trajectory.straightness(*walk, nodes, n)[1], axis=0)
    rows = [(0, n) for n in (*counts, 1)] + [(n, n) for n in counts]
    return {f"{_name(who)}, {n} windows": _spread([relative(walk, n) for walk in walks[who]]) for who, n in dict.fromkeys(rows)}


def _errors(
    experiment: Experiment, n: int, base: Weights, student: Weights, walks: list, given: StudyInputs
) -> dict[str, dict[str, Any]]:
    """Relative error and cosine to the base model's chords, of the student and of the untrained one (the base read as it)."""
    flow = find_stage(experiment.stages, n).student
    log.info("study: velocity errors in %d windows", n)
    schedule, step = experiment.networks.schedule, (len(given.nodes) - 1) // n
    found: dict[str, dict[str, Any]] = {}
    for where, times in (("uniform", trajectory.window_times(n, UNIFORM)), ("starts", windows.bounds(n)[:-1, None])):

        @jax.jit
        def error(params: Any, states: jax.Array, context: Any, times: np.ndarray = times) -> tuple[jax.Array, jax.Array]:
            velocity = solvers.make_velocity(flow, schedule, _predict(experiment, params, context))
            return trajectory.velocity_error(velocity, schedule, flow.path, states, times)

        for who, weights in (("untrained", base), ("trained", student)):
            both = [jax.device_get(error(weights.params, states[::step], given.context)) for states, _ in walks]
            relative, cosine = ([np.mean(one[i], axis=(0, 2)) for one in both] for i in (0, 1))
            found[f"{who}, {where}"] = {"relative": _spread(relative), "cosine": _spread(cosine)}
    return found


def _discrepancy(walks: list, nodes: np.ndarray) -> dict[str, Any]:
    """Fig. 1a: velocities of the base model at pairs of times on its own path."""
    every = -(-(len(nodes) - 1) // MAP)
    maps = [jax.device_get(trajectory.discrepancy(velocities[::every])) for _, velocities in walks]
    distance, cosine = ([np.mean(one[i], axis=0) for one in maps] for i in (0, 1))
    return {"times": nodes[:-1][::every].tolist(), "distance": _spread(distance), "cosine": _spread(cosine)}


def _perturbation(experiment: Experiment, base: Weights, given: StudyInputs) -> dict[str, Any]:
    """Fig. 1b: distance of the base model's samples to those without errors; the protocol is `trajectory.perturbed_samples`."""
    s, schedule = experiment.config.evaluate.study, experiment.networks.schedule
    nodes = windows.sampling_nodes(s.perturbed_steps, 1).astype(np.float32)
    sizes = np.asarray((0.0, *s.sizes), np.float32)

    @jax.jit
    def draw(params: Any, z: jax.Array, context: Any, key: jax.Array, kind: trajectory.Kind) -> jax.Array:
        step = solvers.make_step(base.flow, schedule, _predict(experiment, params, context))
        samples = trajectory.perturbed_samples(step, z, nodes, key, kind, sizes)
        return trajectory.distances(samples, samples[0])

    found: dict[str, Any] = {"sizes": sizes.tolist()}
    for name, kind in trajectory.KINDS.items():
        log.info("study: perturbed steps, %s", name)
        keys = [jax.random.key(seed) for seed in range(len(given.noise))]
        rows = [draw(base.params, z, given.context, key, kind) for z, key in zip(given.noise, keys, strict=True)]
        apart = np.asarray(jax.device_get(rows))
        found[name] = {"rms": _spread(np.sqrt(np.mean(apart**2, axis=2))), "median": _spread(np.median(apart, axis=2))}
    return found


def _draw(experiment: Experiment, numbers: dict[str, Any]) -> None:
    """The pictures: discrepancy.png, perturbation.png, and windows-N.png for each stage."""
    s, run = experiment.config.evaluate.study, experiment.run
    of = f"{s.examples} prompts, {s.seeds} seeds"
    found = numbers["discrepancy"]
    panels = [
        figures.Panel("L2 distance (RMS)", np.asarray(found["distance"]["mean"])),
        figures.Panel("cosine similarity", np.asarray(found["cosine"]["mean"]), "diverging", (-1, 1)),
    ]
    title = f"Velocities of the base model at pairs of times, {of}"
    figures.heat_maps(run / "discrepancy.png", panels, found["times"], TIME, title)
    study = numbers["perturbation"]
    lines = [
        figures.Line(name.replace("_", ", "), study["sizes"], study[name]["rms"]["mean"], study[name]["rms"]["spread"])
        for name in trajectory.KINDS
    ]
    labels = "relative error r of each step's velocity", "distance to the sample without errors (RMS)"
    title = f"Direction against magnitude, {s.perturbed_steps} DDIM steps, {of}"
    figures.lines(run / "perturbation.png", lines, *labels, title)
    for n, rows in numbers["velocity_error"].items():
        marks = {k: f"{k + 1}" for k in range(int(n))}
        lines = [
            figures.Line(name, list(marks), row["relative"]["mean"], row["relative"]["spread"]) for name, row in rows.items()
        ]
        labels = "window, from noise to data", "relative velocity error to the base model's chord"
        title = f"{n} windows, trained and untrained, {of}"
        figures.lines(run / f"windows-{n}.png", lines, *labels, title, x_ticks=marks)
