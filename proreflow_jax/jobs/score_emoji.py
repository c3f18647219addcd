"""The emoji's table: teacher and students beside the real pictures, over seeds, seen and held-out pairs apart; and the gate.

Kernel distances to the real pictures and to the teacher's own many-step pictures; the shares of pictures that show what their
prompts say. What was drawn is kept below <run>/scores: the same command goes on where a killed one was.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import emoji, emoji_pairs
from proreflow_jax.evaluation import fid, kernel
from proreflow_jax.evaluation.picture_features import make_picture_features
from proreflow_jax.flow.windows import GRID
from proreflow_jax.jobs import emoji_table
from proreflow_jax.jobs.emoji_pictures import SHOWN, Arrays, PictureRow, make_picture_draw, measure_pictures
from proreflow_jax.jobs.emoji_reference import (
    IMAGES,
    Real,
    Side,
    baselines,
    compare_pictures,
    make_side,
    prompt_texts,
    read_real,
    shorten_side,
)
from proreflow_jax.jobs.emoji_showcase import write_showcase
from proreflow_jax.jobs.score_plan import Plan, check_plan, make_plan
from proreflow_jax.reflow import sampler
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.experiment import Experiment, Weights, check_taught, load_weights
from proreflow_jax.run.open import open_model
from proreflow_jax.run.stages import find_stage
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.digest import digest
from proreflow_jax.runtime.processes import check_alone
from proreflow_jax.storage import lock, paths

log = logging.getLogger(__name__)
Drawn = dict[tuple[str, int], Arrays]  # by side and seed
Measure = Callable[[PictureRow, Weights, Side, int], Arrays]


def check_emoji(config: ConfigDict) -> None:
    """Raises ValueError or FileNotFoundError, one line, for a table that cannot be made; reads no model."""
    e, plan = config.evaluate, make_plan(config)
    if "gate" not in e:
        raise UserError(f"--config.evaluate.protocol={e.protocol} needs fields that only --config=emoji has")
    check_plan(config, plan, kernel.LEAST)
    check_alone(f"evaluate with --config.evaluate.protocol={e.protocol}")
    if not 1 <= e.columns <= SHOWN:
        raise UserError(f"--config.evaluate.columns={e.columns} must be in [1, {SHOWN}]")
    if len(e.gate.showcase) > SHOWN:
        raise UserError(f"--config.evaluate.gate.showcase has {len(e.gate.showcase)} prompts, at most {SHOWN} are drawn")
    shown = tuple(e.gate.showcase_steps)
    if e.gate.showcase and not (len(shown) == 2 and all(1 <= steps <= GRID for steps in shown)):
        raise UserError(f"--config.evaluate.gate.showcase_steps={shown} must be two numbers in [1, {GRID}]: many and few")
    if e.gate.shipped_steps and not config.model.get("student"):
        shown = tuple(e.gate.shipped_steps)
        raise UserError(f"--config.evaluate.gate.shipped_steps={shown} must be () without a --config.model.student")
    if not e.teacher_steps:
        raise UserError("--config.evaluate.teacher_steps is empty: students are held against the teacher's most steps")
    if e.gate.guidance and e.gate.guidance_examples < kernel.LEAST:
        raise UserError(f"--config.evaluate.gate.guidance_examples={e.gate.guidance_examples} must be at least {kernel.LEAST}")
    emoji.load_emoji(paths.parse_local(e.images, IMAGES), config.data.resolution, IMAGES)


def score_emoji(experiment: Experiment) -> list[str]:
    """Writes table.md, table.json, two pictures and report.html into the run's folder; returns the lines to show."""
    e, plan = experiment.config.evaluate, make_plan(experiment.config)
    mesh.check_split(e.batch, fid.BATCH, experiment.mesh)
    shipped = _shipped(experiment)
    rows, sweep = _rows(experiment, plan, shipped), _sweep(experiment)
    load = partial(_weights, experiment, shipped)
    judge = make_picture_features(plan.protocol.size, experiment.mesh, e.batch)
    real = read_real(experiment, judge)
    chosen = emoji_pairs.choose_pairs(real.dataset.pictures, plan.count)
    drawn = list(chosen) if e.gate.held_out else [emoji_pairs.SEEN]
    sides = [make_side(experiment, real, name, chosen[name], judge) for name in drawn]
    measured = partial(measure_pictures, experiment, draw=make_picture_draw(experiment), judge=judge)
    measure = lambda row, weights, side, seed: measured(row, weights, side.prompts, seed)
    results = baselines(real, sides)
    with lock.lock_folder(experiment.run / "scores"):
        results += _measured(load, plan.seeds, rows, real, sides, measure=measure)
        if sweep:
            few = [shorten_side(experiment, real, side, e.gate.guidance_examples) for side in sides]
            results += _measured(load, plan.seeds[:1], sweep, real, few, measure=measure, alone=True)
        draw = lambda row, prompts: measured(row, load(row), prompts, plan.seeds[0])["pictures"]
        showcase = write_showcase(experiment, rows, draw)
    texts = {side.name: prompt_texts(experiment, real, side.pairs.rows[:SHOWN]) for side in sides}
    lines = emoji_table.write_table(experiment, plan, results, texts)
    return [*lines, f"the gain at a glance: {showcase}"] if showcase else lines


def _shipped(experiment: Experiment) -> Weights | None:
    """The student that comes with the base model, where the base model lies; None if the table has no row of it, or if it is of
    another base model: shapes, text encoder and VAE are what a student has from its own. Raises as `open_model`.
    """
    config = experiment.config
    if not config.evaluate.gate.shipped_steps:
        return None
    model, _, weights = open_model(changed(config, {"model.path": config.model.student}), jax.devices()[0])
    base, shapes = experiment.denoiser.params(), partial(jax.tree.map, jnp.shape)
    kept, own = (digest({"text": each.text, "vae": each.params["vae"]}) for each in (experiment.base, model))
    if not weights.flow.windows or kept != own or shapes(weights.params) != shapes(base):
        log.info("the student in %s is of another base model: its rows are left out", config.model.student)
        return None
    return weights._replace(params=jax.device_put(weights.params, jax.tree.map(lambda x: x.sharding, base)))


def _rows(experiment: Experiment, plan: Plan, shipped: Weights | None) -> list[PictureRow]:
    """The teacher, most steps first, then the students that are finished, and the one that comes with the base model."""
    e, flow = experiment.config.evaluate, experiment.flow
    rows = [PictureRow("teacher", 0, flow, steps, plan.guidance) for steps in sorted(e.teacher_steps, reverse=True)]
    for count, steps in e.student_steps:
        stage = find_stage(experiment.stages, count)
        if stage.done.is_file():
            check_taught(experiment, stage)
            rows.append(PictureRow(f"{count}-window student", count, stage.student, steps, float(e.gate.student_guidance)))
        else:
            log.info("the run has no %d-window student yet: its row is left out", count)
    if shipped:
        flow, scale = shipped.flow, float(e.gate.student_guidance)
        rows += [PictureRow("shipped student", flow.windows, flow, steps, scale, True) for steps in e.gate.shipped_steps]
    for row in rows:
        sampler.check_sampling(row.steps, row.flow)
    return rows


def _sweep(experiment: Experiment) -> list[PictureRow]:
    """The teacher at several guidance scales."""
    gate = experiment.config.evaluate.gate
    rows = [
        PictureRow("teacher, guidance", 0, experiment.flow, steps, float(scale))
        for steps in gate.guidance_steps
        for scale in gate.guidance
    ]
    for row in rows:
        sampler.check_sampling(row.steps, row.flow)
    return rows


def _weights(experiment: Experiment, shipped: Weights | None, row: PictureRow) -> Weights:
    """Of the base model, or of the row's student."""
    if row.shipped:
        return shipped
    return load_weights(experiment, find_stage(experiment.stages, row.windows) if row.windows else None)


def _measured(
    load: Callable[[PictureRow], Weights],
    seeds: Sequence[int],
    rows: Sequence[PictureRow],
    real: Real,
    sides: Sequence[Side],
    *,
    measure: Measure,
    alone: bool = False,
) -> list[dict[str, Any]]:
    """Rows of the table. Unless `alone`, the first row, the teacher's most steps, is what the others are held against too."""
    results, loaded, weights = [], None, None
    reference: Drawn = {}
    for row in rows:
        if weights is None or (row.windows, row.shipped) != loaded:  # rows of one student stand together
            loaded, weights = (row.windows, row.shipped), load(row)
        arrays = {(side.name, seed): measure(row, weights, side, seed) for side in sides for seed in seeds}
        reference = {} if alone else reference or arrays
        numbers = {side.name: _by_name(_numbers(real, side, arrays, reference)) for side in sides}
        pictures = {side.name: arrays[side.name, seeds[0]]["pictures"] for side in sides}
        seconds = min(float(part["seconds"]) for part in arrays.values())
        results.append({"row": row, "method": row.method, "sides": numbers, "pictures": pictures, "seconds": seconds})
        results[-1] |= {"count": len(sides[0].pairs.rows), "seeds": tuple(seeds), "digest": weights.digest}
        log.info("%s, %d steps: %s", row.method, row.steps, emoji_table.kernel_words(numbers))
    return results


def _numbers(real: Real, side: Side, arrays: Drawn, reference: Drawn) -> dict[int, dict[str, float]]:
    """{seed: numbers} of a side, with those beside the reference's pictures of that seed, if any."""
    by_seed = {}
    for seed, batch in ((seed, batch) for (name, seed), batch in arrays.items() if name == side.name):
        teacher = reference.get((side.name, seed))
        by_seed[seed] = compare_pictures(real, side, batch["features"], teacher and teacher["features"])
        if teacher:
            by_seed[seed]["latents"] = float(np.sqrt(np.mean((batch["latents"] - teacher["latents"]) ** 2)))
    return by_seed


def _by_name(by_seed: dict[int, dict[str, float]]) -> dict[str, dict[int, float]]:
    """{seed: {name: number}} -> {name: {seed: number}}."""
    names = next(iter(by_seed.values()))
    return {name: {seed: numbers[name] for seed, numbers in by_seed.items()} for name in names}
