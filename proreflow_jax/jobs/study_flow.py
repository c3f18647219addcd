"""What evaluate --study adds to the table: how the flows of a run bend, and what an error of direction or of magnitude costs.

The paper's Fig. 1a and 1b, straightness per window, and velocity errors against the teacher at uniform times and exactly at
window starts. Every number is a mean over examples, then mean and standard deviation over seeds of the noise.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.evaluation import figures, trajectory
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.schedule import RectifiedFlow, Schedule
from proreflow_jax.jobs.run_page import keep_page
from proreflow_jax.jobs.study_facts import NUMBERS
from proreflow_jax.models.network import Params
from proreflow_jax.reflow.pairs import make_predict, text_context
from proreflow_jax.run.dataset import open_source, read_captions, read_rows
from proreflow_jax.run.experiment import Experiment, Weights, load_weights
from proreflow_jax.run.stages import EVALUATION_KEY, find_stage, run_key
from proreflow_jax.runtime import mesh, stopping
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.runtime.processes import check_alone
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
TIME = "time t (1: noise, 0: data)"
UNIFORM = 8  # times in each window that stand for uniform t
MAP = 32  # times of the map of velocities, at most


class StudyInputs(NamedTuple):
    """What every network starts from: the same noise and the run's own prompts, on the host."""

    noise: list[np.ndarray]  # one for each seed, (b, h, w, c)
    ids: np.ndarray  # (b, s)
    captions: list[str]
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
    """Measures, writes study.json, the pictures and the run's page with them into the run's folder, and returns the numbers."""
    config, s = experiment.config, experiment.config.evaluate.study
    base = load_weights(experiment, None)
    students = {n: load_weights(experiment, find_stage(experiment.stages, n)) for n in config.stages}
    inputs = _inputs(experiment)
    walks = {0: _walks(experiment, base, inputs)} | {n: _walks(experiment, each, inputs) for n, each in students.items()}
    numbers = {
        "settings": {
            **s,
            "sizes": list(s.sizes),
            "spread": "standard deviation over seeds",
            "dtype": config.model.sampling_dtype,
            **({"step": "Euler"} if isinstance(experiment.networks.schedule, RectifiedFlow) else {}),
        },
        "straightness": _straightness(experiment.networks.schedule, walks, inputs.nodes, config.stages),
        "velocity_error": {str(n): _errors(experiment, n, base, student, walks[0], inputs) for n, student in students.items()},
        "discrepancy": _discrepancy(walks[0], inputs.nodes),
        "perturbation": _perturbation(experiment, base, inputs),
    }
    atomic.write_json(experiment.run / NUMBERS, numbers)
    _draw(experiment, numbers)
    keep_page(experiment.run, config)
    return numbers


def _inputs(experiment: Experiment) -> StudyInputs:
    config, s = experiment.config, experiment.config.evaluate.study
    source = open_source(config, experiment.base)
    numbers = np.arange(s.examples)
    ids, captions = read_rows(config, experiment.base.tokenizer, source, numbers)["ids"], read_captions(config, source, numbers)
    keys = jax.random.split(run_key(config, EVALUATION_KEY, 1), s.seeds)
    noise = [np.asarray(jax.random.normal(key, (s.examples, *experiment.base.latent_shape))) for key in keys]
    return StudyInputs(noise, ids, captions, windows.sampling_nodes(s.steps, max(config.stages)))


def _in_batches(experiment: Experiment, call: Callable[..., Any], rows: Mapping[str, np.ndarray], axis: int) -> Any:
    """`call(batch, number)` on batches spread over the mesh; its arrays, which hold examples along `axis`, joined on the host.

    rows: arrays with the examples in front. A batch has --config.evaluate.batch examples or fewer; the last is filled up.
    """
    count, ways = len(rows["ids"]), mesh.ways(experiment.mesh)
    size = -(-min(experiment.config.evaluate.batch, count) // ways) * ways
    parts = []
    for number, begin in enumerate(range(0, count, size)):
        index = np.arange(begin, begin + size) % count
        batch = mesh.put_batch(experiment.mesh, {name: values[index] for name, values in rows.items()}, size)
        own = np.arange(min(size, count - begin))
        stopping.alive()
        parts.append(jax.tree.map(lambda x, own=own: np.take(jax.device_get(x), own, axis), call(batch, number)))
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis), *parts)


def _predict(experiment: Experiment, params: Params, text: Any, ids: jax.Array) -> solvers.Predict:
    n, dtype = experiment.networks, experiment.config.model.sampling_dtype
    predict = make_predict(n.denoiser, n.schedule, params, dtype)
    return solvers.guided(predict, text_context(n.condition, text, ids), None, 1)


def _walks(experiment: Experiment, weights: Weights, inputs: StudyInputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """(states, velocities) at every node, for each seed."""
    log.info("study: the path of the %s", _name(weights.flow.windows))
    schedule = experiment.networks.schedule

    @jax.jit
    def walk(params: Any, text: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        predict = _predict(experiment, params, text, batch["ids"])
        return trajectory.trajectory(weights.flow, schedule, predict, batch["noise"], inputs.nodes)

    call = lambda batch, number: walk(weights.params, experiment.base.text, batch)
    walks = [_in_batches(experiment, call, {"noise": z, "ids": inputs.ids}, axis=1) for z in inputs.noise]
    for states, _ in walks:
        check_finite_rows(np.isfinite(states[-1]).all(axis=(1, 2, 3)), inputs.captions)
    return walks


def _name(count: int) -> str:
    return f"{count}-window student" if count else "base model"


def _spread(values: Any) -> dict[str, Any]:
    """Numbers of each seed, the seeds in front -> their mean and standard deviation."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean(axis=0).tolist(), "spread": values.std(axis=0, ddof=1).tolist()}


def _straightness(schedule: Schedule, walks: dict[int, list], nodes: np.ndarray, counts: tuple[int, ...]) -> dict[str, Any]:
    """Relative straightness: of a student in its own windows, of the base model in those of every stage and in one."""

    def relative(walk: tuple[np.ndarray, np.ndarray], n: int) -> np.ndarray:
        states, velocities = (jnp.asarray(one) for one in walk)
        return np.mean(trajectory.straightness(schedule, states, velocities, nodes, n)[1], axis=0)

    rows = [(0, n) for n in (*counts, 1)] + [(n, n) for n in counts]
    return {f"{_name(who)}, {n} windows": _spread([relative(walk, n) for walk in walks[who]]) for who, n in dict.fromkeys(rows)}


def _errors(
    experiment: Experiment, n: int, base: Weights, student: Weights, walks: list, inputs: StudyInputs
) -> dict[str, dict[str, Any]]:
    """Relative error and cosine to the base model's chords, of the student and of the untrained one (the base read as it)."""
    flow = find_stage(experiment.stages, n).student
    log.info("study: velocity errors in %d windows", n)
    schedule, step = experiment.networks.schedule, (len(inputs.nodes) - 1) // n
    errors: dict[str, dict[str, Any]] = {}
    for where, times in (("uniform", trajectory.window_times(n, UNIFORM)), ("starts", windows.bounds(n)[:-1, None])):

        @jax.jit
        def error(params: Any, text: Any, batch: Any, times: np.ndarray = times) -> tuple[jax.Array, jax.Array]:
            velocity = solvers.make_velocity(flow, schedule, _predict(experiment, params, text, batch["ids"]))
            return trajectory.velocity_error(velocity, schedule, flow.path, jnp.moveaxis(batch["states"], 1, 0), times)

        for who, weights in (("untrained", base), ("trained", student)):
            call = lambda batch, number, error=error, weights=weights: error(weights.params, experiment.base.text, batch)
            rows = [{"states": np.moveaxis(states[::step], 0, 1), "ids": inputs.ids} for states, _ in walks]
            both = [_in_batches(experiment, call, batch, axis=0) for batch in rows]
            relative, cosine = ([np.mean(one[i], axis=(0, 2)) for one in both] for i in (0, 1))
            errors[f"{who}, {where}"] = {"relative": _spread(relative), "cosine": _spread(cosine)}
    return errors


def _discrepancy(walks: list, nodes: np.ndarray) -> dict[str, Any]:
    """Fig. 1a: velocities of the base model at pairs of times on its own path."""
    every = -(-(len(nodes) - 1) // MAP)
    maps = [jax.device_get(trajectory.discrepancy(jnp.asarray(velocities[::every]))) for _, velocities in walks]
    distance, cosine = ([np.mean(one[i], axis=0) for one in maps] for i in (0, 1))
    return {"times": nodes[:-1][::every].tolist(), "distance": _spread(distance), "cosine": _spread(cosine)}


def _perturbation(experiment: Experiment, base: Weights, inputs: StudyInputs) -> dict[str, Any]:
    """Fig. 1b: distance of the base model's samples to those without errors; the protocol is `trajectory.perturbed_samples`."""
    s, schedule = experiment.config.evaluate.study, experiment.networks.schedule
    nodes = windows.sampling_nodes(s.perturbed_steps, 1).astype(np.float32)
    sizes = np.asarray((0.0, *s.sizes), np.float32)

    @jax.jit
    def draw(params: Any, text: Any, batch: Any, key: jax.Array, kind: trajectory.Kind) -> jax.Array:
        step = solvers.make_step(base.flow, schedule, _predict(experiment, params, text, batch["ids"]))
        samples = trajectory.perturbed_samples(step, batch["noise"], nodes, key, kind, sizes)
        return trajectory.distances(samples, samples[0])

    study: dict[str, Any] = {"sizes": sizes.tolist()}
    for name, kind in trajectory.KINDS.items():
        log.info("study: perturbed steps, %s", name)
        apart = []
        for seed, z in enumerate(inputs.noise):
            key = jax.random.key(seed)
            call = lambda batch, number, key=key, kind=kind: draw(
                base.params, experiment.base.text, batch, jax.random.fold_in(key, number), kind
            )
            apart.append(_in_batches(experiment, call, {"noise": z, "ids": inputs.ids}, axis=1))
        rms, median = np.sqrt(np.mean(np.square(apart), axis=2)), np.median(apart, axis=2)
        study[name] = {"rms": _spread(rms), "median": _spread(median)}
    return study


def _draw(experiment: Experiment, numbers: dict[str, Any]) -> None:
    """The pictures: discrepancy.png, perturbation.png, and windows-N.png for each stage."""
    s, run = experiment.config.evaluate.study, experiment.run
    of = f"{s.examples} prompts, {s.seeds} seeds"
    maps = numbers["discrepancy"]
    panels = [
        figures.Panel("L2 distance (RMS)", np.asarray(maps["distance"]["mean"])),
        figures.Panel("cosine similarity", np.asarray(maps["cosine"]["mean"]), "diverging", (-1, 1)),
    ]
    title = f"Velocities of the base model at pairs of times, {of}"
    figures.heat_maps(run / "discrepancy.png", panels, maps["times"], TIME, title)
    study = numbers["perturbation"]
    lines = [
        figures.Line(name.replace("_", ", "), study["sizes"], study[name]["rms"]["mean"], study[name]["rms"]["spread"])
        for name in trajectory.KINDS
    ]
    labels = "relative error r of each step's velocity", "distance to the sample without errors (RMS)"
    title = f"Direction against magnitude, {s.perturbed_steps} {numbers['settings'].get('step', 'DDIM')} steps, {of}"
    figures.lines(run / "perturbation.png", lines, *labels, title)
    for n, rows in numbers["velocity_error"].items():
        marks = {k: f"{k + 1}" for k in range(int(n))}
        lines = [
            figures.Line(name, list(marks), row["relative"]["mean"], row["relative"]["spread"]) for name, row in rows.items()
        ]
        labels = "window, from noise to data", "relative velocity error to the base model's chord"
        title = f"{n} windows, trained and untrained, {of}"
        figures.lines(run / f"windows-{n}.png", lines, *labels, title, x_ticks=marks)
