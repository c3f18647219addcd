"""The numbers of a run: every student beside the base model, from the same noise and prompts, as table, JSON and picture.

For now the digits only: prompts, real images and the judge are theirs.
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

from proreflow_jax import cli
from proreflow_jax import study as studies
from proreflow_jax.data import digits
from proreflow_jax.evaluation import classifier, frechet, report
from proreflow_jax.experiment import EVALUATION_KEY, Experiment, Weights, load_weights, open_experiment, run_key
from proreflow_jax.flow import solvers, windows
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.stages import find_stage
from proreflow_jax.reflow.teacher import Flow, make_predict, make_step, text_context
from proreflow_jax.runtime import files, mesh

log = logging.getLogger(__name__)
COLUMNS = {
    "method": "method",
    "steps": "steps",
    "distance": "distance to teacher",
    "against": "against the teacher",
    "frechet": "Frechet distance",
    "recognised": "recognised",
    "seconds": "s / image",
}


class Row(NamedTuple):
    """One method at one number of steps."""

    method: str
    weights: Weights
    steps: int


class Judge(NamedTuple):
    """The digits' judges, and the moments of the real digits in their features."""

    judges: classifier.Judges
    real: tuple[np.ndarray, np.ndarray]


def evaluate(config: ConfigDict, study: bool) -> None:
    """Prints the table; writes table.md, table.json, samples.png and report.html into the run's folder.

    With `study` also study.json and its pictures.
    """
    experiment = open_experiment(config)
    if config.data.kind != "digits":
        raise ValueError(f"--config.data.kind={config.data.kind}: the table is made for digits so far")
    examples, batch = config.evaluate.examples, config.evaluate.batch
    ways = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    if batch < 1 or examples < 1 or examples % batch or batch % ways:
        raise ValueError(
            f"--config.evaluate.batch={batch} must divide --config.evaluate.examples={examples} "
            f"and be a multiple of {ways} devices"
        )
    if study:
        studies.check(config)
    rows = _rows(experiment)
    began = time.monotonic()
    results, images = measure(experiment, rows)
    notes = _notes(config)
    text = report.table(results, COLUMNS)
    run = experiment.run
    files.write_json(run / "table.json", {"notes": notes, "rows": results})
    (run / "table.md").write_text(text + "\n\n" + "\n".join(notes) + "\n", encoding="utf-8")
    heads = [str(i % 10) for i in range(config.evaluate.columns)]
    labels = [f"{row.method}, {row.steps} steps" for row in rows]
    report.picture(run / "samples.png", list(zip(labels, images, strict=True)), heads)
    report.page(run / "report.html", f"{config.name}: {tuple(config.stages)} windows", notes, results, COLUMNS, "samples.png")
    print(text)
    for note in notes:
        print(note)
    print(f"picture: {run / 'samples.png'}   page: {run / 'report.html'}   ({time.monotonic() - began:.0f} s)")
    if study:
        studies.run(experiment)
        pictures = "discrepancy.png, perturbation.png, windows-N.png"
        print(f"study: {run / studies.NUMBERS}, {pictures}   ({time.monotonic() - began:.0f} s)")


def _notes(config: ConfigDict) -> list[str]:
    n = config.evaluate.examples
    return [
        f"distance: RMS of the latents' difference to the teacher's own {config.evaluate.teacher_steps[0]}-step result from "
        f"the same noise and prompt, n = {n}; 'against the teacher': relative to the teacher at equal steps.",
        f"Frechet distance to the 1,797 real digits in the features of {classifier.FEATURES}, n = {n}. "
        f"recognised: share of images that {classifier.READER} (trained on the real digits) takes for the prompt's digit.",
        f"guidance 1, one seed ({config.seed}); s / image: latents and decoding on this machine, compilation excluded.",
    ]


def _rows(experiment: Experiment) -> list[Row]:
    base, e = load_weights(experiment, None), experiment.config.evaluate
    rows = [Row("teacher", base, steps) for steps in e.teacher_steps]
    students = {count: load_weights(experiment, find_stage(experiment.stages, count)) for count, _ in e.student_steps}
    rows += [Row(f"{count}-window student", students[count], steps) for count, steps in e.student_steps]
    for row in rows:
        sampler.check_sampling(row.steps, row.weights.flow)
    return rows


def measure(experiment: Experiment, rows: list[Row]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Samples every row from the same noise and prompts: (results, the first images of each row)."""
    e = experiment.config.evaluate
    labels = np.arange(e.examples) % 10
    texts = [digits.caption(label, i // 10) for i, label in enumerate(labels)]
    noise = jax.random.normal(run_key(experiment.config, EVALUATION_KEY, 0), (e.examples, *experiment.base.latent_shape))
    ids = experiment.base.tokenizer.encode(texts)
    judge = _judge(experiment.config.data.resolution)
    draw = {flow: _drawer(experiment, flow) for flow in {row.weights.flow for row in rows}}
    results, pictures, reference, teacher = [], [], None, {}
    for row in rows:
        latents, images, seconds = _sample(draw[row.weights.flow], row, noise, ids, e.batch)
        reference = latents if reference is None else reference
        distance = float(np.sqrt(np.mean((latents - reference) ** 2)))
        if row.weights.flow.windows == 0:
            teacher[row.steps] = distance
        change = distance / teacher[row.steps] - 1 if teacher.get(row.steps) and row.weights.flow.windows else None
        pixels = digits.to_pixels8(images)
        fid = frechet.frechet_distance(frechet.moments(classifier.features(judge.judges, pixels)), judge.real)
        results.append(
            {
                "method": row.method,
                "steps": row.steps,
                "distance": distance,
                "against": "" if change is None else f"{100 * change:+.0f} %",
                "frechet": fid,
                "recognised": f"{100 * float(np.mean(classifier.read(judge.judges, pixels) == labels)):.1f} %",
                "seconds": seconds,
            }
        )
        pictures.append(images[: e.columns])
        log.info("%s, %d steps: distance %.4f, Frechet distance %.2f", row.method, row.steps, distance, fid)
    return results, pictures


def _judge(size: int) -> Judge:
    images, labels = digits.load(size)
    pixels = digits.to_pixels8(images)
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    moved = np.concatenate([digits.to_pixels8(_moved(images, *offset)) for offset in offsets])
    judges = classifier.fit(pixels, labels, moved, np.tile(labels, len(offsets)))
    return Judge(judges, frechet.moments(classifier.features(judges, pixels)))


def _moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images moved by up to one pixel; what comes in is black."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = images.shape[1:3]
    return padded[:, 1 - down : 1 - down + h, 1 - right : 1 - right + w]


def _drawer(experiment: Experiment, flow: Flow) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, noise, ids, steps) -> (latents, images). One step is compiled per flow and serves every number of steps."""
    n = experiment.networks
    whole, split = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    text, vae = jax.device_put(experiment.base.text, whole), jax.device_put(experiment.base.params["vae"], whole)
    context = jax.jit(partial(text_context, n.condition))
    decode = jax.jit(lambda params, latents: sampler.decode(n.vae, params, latents, n.scaling))

    @jax.jit
    def move(params: Any, z: jax.Array, t: jax.Array, u: jax.Array, states: jax.Array) -> jax.Array:
        predict = solvers.guided(make_predict(n.unet, params), states, None, 1.0)
        each = lambda time: jnp.full(z.shape[0], time)
        return make_step(flow, n.schedule, predict)(z, each(t), each(u), None)[0]

    def draw(params: Any, noise: jax.Array, ids: np.ndarray, steps: int) -> tuple[jax.Array, jax.Array]:
        nodes = windows.sampling_nodes(steps, max(flow.windows, 1)).astype(np.float32)
        z, states = jax.device_put(noise, split), context(text, jax.device_put(ids, split))
        for t, u in zip(nodes[:-1], nodes[1:], strict=True):
            z = move(params, z, t, u, states)
        return z, decode(vae, z)

    return draw


def _sample(draw: Callable, row: Row, noise: jax.Array, ids: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Latents, images, and seconds an image after a first call that compiles."""
    params = row.weights.params
    jax.block_until_ready(draw(params, noise[:batch], ids[:batch], max(row.weights.flow.windows, 1)))
    began = time.monotonic()
    parts = [
        jax.device_get(draw(params, noise[i : i + batch], ids[i : i + batch], row.steps)) for i in range(0, len(noise), batch)
    ]
    seconds = (time.monotonic() - began) / len(noise)
    latents, images = (np.concatenate(column) for column in zip(*parts, strict=True))
    return latents, images, seconds


if __name__ == "__main__":
    options = {"study": (False, "also measure how the flows bend and what perturbed steps cost (about 5 minutes on 2 cores)")}
    cli.start(evaluate, __doc__, "configs/digits.py", options)
