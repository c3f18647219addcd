"""FID and CLIP score of a run by a named protocol: every student beside the base model, over seeds, on the mesh, resumable.

The noise of image i depends on (seed, i) alone, so neither the batch nor the devices change the picture. What was judged is
kept below <run>/scores under a hash of all it depends on; the same command goes on where a killed one was. Moments of the real
images lie in <root>/reference, for all runs.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, UInt8

from proreflow_jax import MissingFile
from proreflow_jax.data import coco
from proreflow_jax.evaluation import clip_score, fid, protocols, report
from proreflow_jax.evaluation.judges import CLIP, FID, Judge, make_judge
from proreflow_jax.evaluation.moments import Moments
from proreflow_jax.evaluation.protocols import Conditions
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs.run_page import keep_page
from proreflow_jax.jobs.score_plan import INCEPTION, Plan, _check_count, _local, make_plan
from proreflow_jax.models.network import Params
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import Networks, text_context
from proreflow_jax.run.compiler_options import compiler_options
from proreflow_jax.run.experiment import Experiment, Weights, check_taught, load_weights
from proreflow_jax.run.stages import EVALUATION_KEY, find_stage, seed_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.storage import atomic, lock, paths
from proreflow_jax.storage.atomic import json_digest

log = logging.getLogger(__name__)
SAVE_EVERY = 20  # batches that a kill costs at most
COLUMNS = {
    "method": "method",
    "steps": "steps",
    "fid": "FID",
    "fid_spread": "+-",
    "clip": "CLIP score",
    "clip_spread": "+-",
    "seeds": "seeds",
}
BETTER = {"fid": "less", "clip": "more"}


class ScoreRow(NamedTuple):
    """One method at one number of steps; 0 windows: the base model."""

    method: str
    windows: int
    flow: Parameterization
    steps: int


class DrawInputs(NamedTuple):
    """What every row draws: prompts and their ids, a digest of the frozen networks, and these on every device."""

    prompts: list[str]
    ids: np.ndarray  # (n, s)
    conditioning: str  # digest of text encoders, VAE, configs and prompts
    text: Mapping[str, Params]
    vae: Params
    empty: np.ndarray  # (1, s), of the negative prompt


def score_coco(experiment: Experiment) -> list[dict[str, Any]]:
    """Measures every row and returns them; writes scores.json and scores.md into the run's folder, anew after each row."""
    e, plan = experiment.config.evaluate, make_plan(experiment.config)
    mesh.check_split(e.batch, fid.BATCH, experiment.mesh)
    rows = _rows(experiment)
    split = coco.open_split(e.captions, e.images, plan.protocol.year)
    _check_count(plan, e.examples, split)
    clip = _local(e.clip, clip_score.FLAG) if e.clip else None
    judge = make_judge(_local(e.inception, INCEPTION), clip, plan.protocol, experiment.mesh, e.batch)
    reference = _reference(experiment, plan, split, judge)
    inputs = _draw_inputs(experiment, coco.CHOICES[plan.protocol.choice](split, plan.count))
    shared = {"judge": judge, "reference": reference, "inputs": inputs}
    results, loaded, weights = [], None, None
    with lock.lock_folder(experiment.run / "scores"):
        for row in rows:
            if row.windows != loaded:  # rows of one student stand together
                stage = find_stage(experiment.stages, row.windows) if row.windows else None
                loaded, weights = row.windows, load_weights(experiment, stage)
            results.append(_scores(experiment, plan, row, **shared, weights=weights))
            log.info("%s: %s", row.method, results[-1]["statement"])
            _write(experiment, plan, judge, reference, results)
    return results


def _rows(experiment: Experiment) -> list[ScoreRow]:
    """Teacher, then students, each of which can be sampled and is finished; raises one line otherwise."""
    e = experiment.config.evaluate
    rows = [ScoreRow("teacher", 0, experiment.flow, steps) for steps in e.teacher_steps]
    for count, steps in e.student_steps:
        stage = find_stage(experiment.stages, count)
        if not stage.done.is_file():
            raise MissingFile(f"{stage.done} is missing: run distill, or leave it out of evaluate.student_steps")
        check_taught(experiment, stage)
        rows.append(ScoreRow(f"{count}-window student", count, stage.student, steps))
    for row in rows:
        sampler.check_sampling(row.steps, row.flow)
    return rows


def _reference(experiment: Experiment, plan: Plan, split: coco.Split, judge: Judge) -> Moments:
    """Of the real images, computed once for all runs below the same root."""
    e, folder = experiment.config.evaluate, paths.parse_path(experiment.config.root) / "reference"
    numbers = range(len(split.images))
    log.info("reference: %d images of %s", len(numbers), e.images)
    alike = fid.images_hash(map(split.read, numbers))
    about = fid.facts(plan.protocol, {FID: judge.digests[FID]}, alike, len(numbers))

    def rows_from(position: int) -> Iterator[fid.Rows]:
        for start in range(position, len(numbers), e.batch):
            pictures = [
                coco.decode_coco_image(split.read(i), f"image {split.images[i]}") for i in numbers[start : start + e.batch]
            ]
            yield judge.rows(np.stack([fid.prepare_images(picture, plan.protocol) for picture in pictures]))

    with lock.lock_folder(folder):
        return fid.measure_features(folder, about, {FID: judge.widths[FID]}, rows_from, judge.features, SAVE_EVERY)[FID]


def _draw_inputs(experiment: Experiment, prompts: list[str]) -> DrawInputs:
    base, place = experiment.base, mesh.replicated(experiment.mesh)
    ids, empty = base.tokenizer.encode(prompts), base.tokenizer.encode([""])
    text, vae = jax.device_put(base.text, place), jax.device_put(base.params["vae"], place)
    configs = {name: network.config for name, network in base.networks.items()}
    sizes = {name: list(value) for name, value in experiment.config.conditioning.items()}
    about = {"prompts": prompts, "ids": ids.tolist(), "empty": empty.tolist(), "configs": configs, "sizes": sizes}
    about |= {"scheduler": base.scheduler, "frozen": fold(digest({"text": text, "vae": vae}))}
    return DrawInputs(prompts, ids, json_digest(about), text, vae, empty)


def draw_images(
    params: Params,
    text: Mapping[str, Params],
    vae: Params,
    empty: Array,
    rows: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    networks: Networks,
    latent: tuple[int, int, int],
    flow: Parameterization,
    steps: int,
    guidance: float,
    dtype: str,
) -> tuple[UInt8[Array, "b height width 3"], Bool[Array, " b"]]:
    """Images of numbered prompts, uint8, and whether their latents are finite; noise i is drawn by (key, i).

    Args:
      params: of the UNet; text, vae: of the networks beside it.
      empty: ids (1, s) of the negative prompt.
      rows: "number" (b,) of each image, and "ids" (b, s) of its prompt.
      key: of the noise's seed.
      networks, latent, flow, steps, guidance, dtype: as of `sampler.sample_latents`.
    """
    key = jax.random.fold_in(key, EVALUATION_KEY)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), latent))(rows["number"])
    context, negative = (text_context(networks.condition, text, ids) for ids in (rows["ids"], empty))
    options = dict(
        denoiser=networks.denoiser, schedule=networks.schedule, flow=flow, steps=steps, guidance=guidance, dtype=dtype
    )
    latents = sampler.sample_latents(params, noise, context, negative, **options)
    images = sampler.decode(networks.vae, vae, latents, networks.scaling, dtype)
    return images, jnp.isfinite(latents).all(axis=(1, 2, 3))


def jit_draw(experiment: Experiment, flow: Parameterization, steps: int, guidance: float) -> Callable:
    """`draw_images` of a model, jitted with the shardings of the mesh."""
    options = dict(flow=flow, steps=steps, guidance=guidance, dtype=experiment.config.model.sampling_dtype)
    draw = partial(draw_images, networks=experiment.networks, latent=experiment.base.latent_shape, **options)
    compiler = compiler_options(experiment.networks.denoiser, experiment.mesh, experiment.config)
    return jax.jit(draw, out_shardings=mesh.batch_sharding(experiment.mesh), compiler_options=compiler)


def _scores(
    experiment: Experiment, plan: Plan, row: ScoreRow, *, weights: Weights, judge: Judge, reference: Moments, inputs: DrawInputs
) -> dict[str, Any]:
    """A row of scores.json."""
    dtype, options = experiment.config.model.sampling_dtype, dict(flow=weights.flow, steps=row.steps, guidance=plan.guidance)
    draw = partial(jit_draw(experiment, **options), weights.params)
    model = {
        "model": fold(digest(weights.params)),
        "told": inputs.conditioning,
        **options,
        "flow": list(weights.flow),
        "dtype": dtype,
        **sampler.decoding_facts(experiment.networks.vae, dtype),
    }
    fids, clips, errors = {}, {}, {}
    for seed in plan.seeds:
        log.info("%s, %d steps, seed %d", row.method, row.steps, seed)
        about = fid.facts(plan.protocol, judge.digests, model | {"seed": seed}, plan.count)
        batches = partial(_generated, experiment, plan, judge, inputs, draw=draw, seed=seed)
        moments = fid.measure_features(experiment.run / "scores", about, judge.widths, batches, judge.features, SAVE_EVERY)
        fids[seed] = fid.distance(moments[FID], reference)
        if judge.clip:
            clips[seed], errors[seed] = float(moments[CLIP].mean[0]), clip_score.standard_error(moments[CLIP])
    under = Conditions(row.steps, plan.seeds, plan.count, reference.count, plan.guidance, judge.clip, dtype)
    text = protocols.statement(plan.protocol, fids, clips, under)
    numbers = {"method": row.method, "windows": row.windows, "steps": row.steps, "digest": weights.digest, "statement": text}
    return numbers | {"fid": fids, "clip": clips, "clip_standard_error": errors}


def _generated(
    experiment: Experiment, plan: Plan, judge: Judge, inputs: DrawInputs, position: int, *, draw: Callable, seed: int
) -> Iterator[fid.Rows]:
    """Batches for the judge from image `position` on; the last is drawn whole and cut."""
    batch, last = experiment.config.evaluate.batch, plan.count - 1

    def start(first: int) -> Array:
        numbers = np.arange(first, first + batch, dtype=np.uint32)
        rows = {"number": numbers, "ids": inputs.ids[np.minimum(numbers, last)]}
        rows = mesh.put_batch(experiment.mesh, rows, batch)
        return draw(inputs.text, inputs.vae, inputs.empty, rows, seed_key(seed))

    firsts = range(position, plan.count, batch)
    for first, (images, finite) in zip(firsts, fid.ahead(start, firsts), strict=True):
        prompts = inputs.prompts[first : first + batch]
        check_finite_rows(finite[: len(prompts)], prompts)
        yield judge.rows(np.stack([fid.prepare_images(image, plan.protocol) for image in images[: len(prompts)]]), prompts)


def _write(experiment: Experiment, plan: Plan, judge: Judge, reference: Moments, results: list[dict[str, Any]]) -> None:
    """scores.json with every number, scores.md with the table and the statements, and the run's page."""
    header = plan._asdict() | {"protocol": plan.protocol._asdict(), "real": reference.count, "clip": judge.clip}
    cells = [_cells(row) for row in results]
    shown = report.shown_table(cells, COLUMNS, BETTER, [i for i, row in enumerate(results) if row["windows"]])
    header |= {"networks": judge.digests, "notes": [row["statement"] for row in results], "shown": shown}
    atomic.write_json(experiment.run / "scores.json", header | {"rows": results})
    lines = [f"- {row['method']}: {row['statement']}" for row in results]
    atomic.write_text(experiment.run / "scores.md", "\n".join([report.text_table(cells, COLUMNS), "", *lines]) + "\n")
    keep_page(experiment.run, experiment.config)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"method": row["method"], "steps": row["steps"], "seeds": ", ".join(map(str, row["fid"]))}
    for name in ("fid", "clip"):
        if row[name]:
            mean, spread = protocols.mean_and_spread(row[name])
            cells |= {name: f"{mean:.2f}", f"{name}_spread": "unknown" if spread is None else f"{spread:.2f}"}
    return cells
