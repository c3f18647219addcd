"""The digits' table: every student of a run beside the base model, from the same noise and prompts, as table, JSON and picture.

Prompts, real images and the judge are the digits' own.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import digits, kinds
from proreflow_jax.evaluation import classifier, kernel, report
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs.digits_judge import make_digits_judge, scores
from proreflow_jax.jobs.run_page import keep_page
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import make_predict, text_context
from proreflow_jax.run.experiment import Experiment, Weights, load_weights
from proreflow_jax.run.outlook import compiling
from proreflow_jax.run.stages import EVALUATION_KEY, find_stage, run_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.processes import first, host_arrays
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
Draw = Callable[..., tuple[jax.Array, jax.Array]]
COLUMNS = {
    "method": "method",
    "steps": "steps",
    "distance": "distance to teacher",
    "against": "against the teacher",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "recognised": "recognised",
    "seconds": "s / image",
}
BETTER = {"distance": "less", "frechet": "less", "kernel": "less", "recognised": "more", "seconds": "less"}


class TableRow(NamedTuple):
    """One method at one number of steps."""

    method: str
    weights: Weights
    steps: int


def check_digits(experiment: Experiment) -> None:
    """Raises ValueError, one line, for a table that cannot be made."""
    config = experiment.config
    if not kinds.is_digits(config.data):
        raise UserError(
            f"--config.data.kind={config.data.kind}: --config.evaluate.protocol=digits is for data.kind=digits alone, "
            "take coco2017-5k or coco2014-30k"
        )
    examples, batch = config.evaluate.examples, config.evaluate.batch
    ways = mesh.ways(experiment.mesh)
    if examples < kernel.LEAST:
        raise UserError(f"--config.evaluate.examples={examples} must be at least {kernel.LEAST}: fewer give no spread")
    if batch < 1 or examples % batch or batch % ways:
        raise UserError(
            f"--config.evaluate.batch={batch} must divide --config.evaluate.examples={examples} "
            f"and be a multiple of {ways} devices"
        )


def score_digits(experiment: Experiment) -> list[str]:
    """Writes table.md, table.json, samples.png and report.html into the run's folder; returns the lines to show."""
    config, folder = experiment.config, experiment.run
    rows = _rows(experiment)
    began = time.monotonic()
    results, images = measure_rows(experiment, rows)
    text, notes = report.text_table(results, COLUMNS), _notes(config)
    first(lambda: _keep(experiment, rows, results, images, text, notes))
    written = f"picture: {folder / 'samples.png'}   page: {folder / 'report.html'}   ({time.monotonic() - began:.0f} s)"
    return [text, *notes, written]


def _keep(
    experiment: Experiment,
    rows: list[TableRow],
    results: list[dict[str, Any]],
    images: list[np.ndarray],
    text: str,
    notes: list[str],
) -> None:
    """The table as JSON, Markdown, picture and page."""
    config, folder = experiment.config, experiment.run
    folder.mkdir(parents=True, exist_ok=True)  # a table of the base model alone has no run yet
    students = [i for i, row in enumerate(rows) if row.weights.flow.windows]
    shown = report.shown_table(results, COLUMNS, BETTER, students)
    atomic.write_json(folder / "table.json", {"notes": notes, "rows": results, "shown": shown})
    atomic.write_text(folder / "table.md", text + "\n\n" + "\n".join(notes) + "\n")
    heads = [str(i % 10) for i in range(config.evaluate.columns)]
    labels = [f"{row.method}, {row.steps} steps" for row in rows]
    report.picture(folder / "samples.png", list(zip(labels, images, strict=True)), heads)
    keep_page(folder, config)


def _notes(config: ConfigDict) -> list[str]:
    n, dtype = config.evaluate.examples, config.model.sampling_dtype
    return [
        f"distance: RMS of the latents' difference to the teacher's own {config.evaluate.teacher_steps[0]}-step result from "
        f"the same noise and prompt, n = {n}; 'against the teacher': relative to the teacher at equal steps.",
        f"Frechet distance to the {classifier.REAL}, in the features of {classifier.FEATURES}, n = {n}; kernel distance to {n} "
        "of them, the same digits as the prompts', x 1000, +- its standard error.",
        f"recognised: share of images that {classifier.READER} (trained on the real digits) takes for the prompt's digit.",
        f"guidance 1, one seed ({config.seed}), {dtype}; s / image: latents and decoding on this machine, without compiling.",
    ]


def _rows(experiment: Experiment) -> list[TableRow]:
    base, e = load_weights(experiment, None), experiment.config.evaluate
    rows = [TableRow("teacher", base, steps) for steps in e.teacher_steps]
    students = {count: load_weights(experiment, find_stage(experiment.stages, count)) for count, _ in e.student_steps}
    rows += [TableRow(f"{count}-window student", students[count], steps) for count, steps in e.student_steps]
    for row in rows:
        sampler.check_sampling(row.steps, row.weights.flow)
    return rows


def measure_rows(experiment: Experiment, rows: list[TableRow]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Samples every row from the same noise and prompts: (results, the first images of each row)."""
    e = experiment.config.evaluate
    labels, ids = prompts(experiment, e.examples)
    noise = jax.random.normal(run_key(experiment.config, EVALUATION_KEY, 0), (e.examples, *experiment.base.latent_shape))
    judge, draw = make_digits_judge(experiment.config.data.resolution), make_draw(experiment)
    results, pictures, reference, teacher = [], [], None, {}
    compiling("a sampler for each student", experiment.networks.denoiser)
    progress = Progress("evaluate", e.examples * sum(row.steps for row in rows), "forward")
    for row in rows:
        told = lambda pictures, steps=row.steps: progress.advance(steps * pictures)
        latents, images, seconds = _timed(draw, row, noise, ids, e.batch, told)
        reference = latents if reference is None else reference
        numbers = scores(judge, latents, images, reference, labels)
        if row.weights.flow.windows == 0:
            teacher[row.steps] = numbers["distance"]
        change = numbers["distance"] / teacher[row.steps] - 1 if teacher.get(row.steps) and row.weights.flow.windows else None
        said = {
            "against": "" if change is None else f"{100 * change:+.0f} %",
            "kernel": f"{numbers['kernel']:.1f} +- {numbers['kernel_error']:.1f}",
            "recognised": f"{100 * numbers['recognised']:.1f} %",
            "seconds": seconds,
        }
        about = {"digest": row.weights.digest, "statement": _statement(experiment.config, row, numbers, change)}
        results.append({"method": row.method, "steps": row.steps} | numbers | said | about)
        pictures.append(images[: e.columns])
        log.info(
            "%s, %d steps: distance %.4f, Frechet distance %.2f", row.method, row.steps, numbers["distance"], numbers["frechet"]
        )
    progress.close()
    return results, pictures


def _statement(config: ConfigDict, row: TableRow, numbers: dict[str, float], change: float | None) -> str:
    """A row's numbers with all that they depend on, in a sentence."""
    e = config.evaluate
    against = "" if change is None else f" ({100 * change:+.0f} % against the teacher in as many steps)"
    return (
        f"{row.method}, {row.steps} steps: RMS distance of the latents to the teacher's own {e.teacher_steps[0]}-step result "
        f"{numbers['distance']:.4f}{against}; Frechet distance to the {classifier.REAL} {numbers['frechet']:.2f}, kernel "
        f"distance {numbers['kernel']:.1f} +- {numbers['kernel_error']:.1f} (features of {classifier.FEATURES}); "
        f"{100 * numbers['recognised']:.1f} % recognised by {classifier.READER}; "
        f"{e.examples} pictures, guidance 1, seed {config.seed}, {config.model.sampling_dtype}"
    )


def prompts(experiment: Experiment, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(digits (n,), ids (n, s)) of ten captions in turn, in ten wordings."""
    labels = np.arange(count) % 10
    return labels, experiment.base.tokenizer.encode([digits.caption(label, i // 10) for i, label in enumerate(labels)])


def make_draw(experiment: Experiment) -> Draw:
    """(params, flow, noise, ids, steps) -> (latents, images) of one batch.

    One step is compiled for each flow and serves every number of steps.
    """
    n, dtype = experiment.networks, experiment.config.model.sampling_dtype
    whole, split = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    text, vae = jax.device_put(experiment.base.text, whole), jax.device_put(experiment.base.params["vae"], whole)
    context = jax.jit(partial(text_context, n.condition))
    decode = jax.jit(lambda params, latents: sampler.decode(n.vae, params, latents, n.scaling, dtype))

    @partial(jax.jit, static_argnames="flow")
    def move(params: Any, z: jax.Array, t: jax.Array, u: jax.Array, states: jax.Array, flow: Parameterization) -> jax.Array:
        predict = solvers.guided(make_predict(n.denoiser, n.schedule, params, dtype), states, None, 1.0)
        each = lambda time: jnp.full(z.shape[0], time)
        return solvers.make_step(flow, n.schedule, predict)(z, each(t), each(u), None)[0]

    def draw(params: Any, flow: Parameterization, noise: jax.Array, ids: np.ndarray, steps: int) -> tuple[jax.Array, jax.Array]:
        nodes = windows.sampling_nodes(steps, max(flow.windows, 1)).astype(np.float32)
        z, states = jax.device_put(noise, split), context(text, jax.device_put(ids, split))
        for t, u in zip(nodes[:-1], nodes[1:], strict=True):
            z = move(params, z, t, u, states, flow)
        return z, decode(vae, z)

    return draw


def sample_rows(
    draw: Draw,
    params: Any,
    flow: Parameterization,
    noise: jax.Array,
    ids: np.ndarray,
    *,
    steps: int,
    batch: int,
    told: Callable[[int], None] = lambda pictures: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(latents, images) of every row of `noise` and `ids`, `batch` at once, on the host. told: called with a batch's count."""
    parts = []
    for i in range(0, len(noise), batch):
        part = slice(i, i + batch)
        parts.append(host_arrays(draw(params, flow, noise[part], ids[part], steps)))
        told(len(parts[-1][0]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _timed(
    draw: Draw, row: TableRow, noise: jax.Array, ids: np.ndarray, batch: int, told: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Latents, images, and seconds an image after a first call that compiles."""
    params, flow = row.weights.params, row.weights.flow
    jax.block_until_ready(draw(params, flow, noise[:batch], ids[:batch], max(flow.windows, 1)))
    began = time.monotonic()
    latents, images = sample_rows(draw, params, flow, noise, ids, steps=row.steps, batch=batch, told=told)
    return latents, images, (time.monotonic() - began) / len(noise)
