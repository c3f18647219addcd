"""evaluate --study: what is measured on a finished run, and what is refused before anything is."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from verb import PROMPTS, keep_networks, kept_programs, run, tiny_config, tiny_flags

from configs import digits
from proreflow_jax.evaluation import trajectory
from proreflow_jax.jobs import study_flow
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_experiment
from proreflow_jax.storage.atomic import read_json


def small(**fields):
    c = digits.get_config()
    c.stages = (4, 2)
    c.evaluate.study.update(dict(examples=4, seeds=2, steps=8, perturbed_steps=4, sizes=(0.1, 0.5)) | fields)
    return c


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"steps": 6}, "study.steps=6 must be a multiple of 4"),
        ({"seeds": 1}, "study.seeds=1 must be at least 2"),
        ({"examples": 0}, "examples=0"),
        ({"sizes": ()}, "study.sizes=()"),
        ({"sizes": (0.1, 2.5)}, "study.sizes=(0.1, 2.5)"),
        ({"perturbed_steps": 2000}, "2000"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(fields, needle):
    study_flow.check_study(small())
    with pytest.raises(ValueError) as caught:
        study_flow.check_study(small(**fields))
    assert needle in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A tiny model with prompts of its own, which are no digits' captions."""
    folder = tmp_path_factory.mktemp("opened")
    c = tiny_config(folder, tiny.write_model(folder / "model"))
    with c.unlocked():
        c.evaluate.study.update(dict(examples=11, seeds=2))
        c.evaluate.batch = 8
    return open_experiment(c)


def test_a_study_draws_the_runs_own_prompts(opened):
    inputs = study_flow._inputs(opened)
    own = {tuple(ids) for ids in opened.base.tokenizer.encode(PROMPTS).tolist()}
    assert inputs.ids.shape[0] == 11 and {tuple(ids) for ids in inputs.ids.tolist()} == own


def test_batches_over_the_mesh_join_to_the_whole(opened):
    rows = {"ids": np.arange(22).reshape(11, 2), "x": np.arange(33.0).reshape(11, 3)}
    seen = []

    def call(batch, number):
        seen.append((number, batch["x"].shape, batch["x"].sharding.is_fully_replicated))
        return batch["x"] * 2, np.stack([batch["ids"]] * 3)

    twice = study_flow._in_batches(opened, lambda batch, number: call(batch, number)[0], rows, axis=0)
    stacked = study_flow._in_batches(opened, lambda batch, number: call(batch, number)[1], rows, axis=1)
    np.testing.assert_array_equal(twice, rows["x"] * 2)
    np.testing.assert_array_equal(stacked, np.stack([rows["ids"]] * 3))
    assert seen == [(0, (8, 3), False), (1, (8, 3), False)] * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """(run folder, numbers) of a study of a tiny run, 4 then 2 windows."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch, kept_programs(tmp_path_factory.mktemp("programs")):
        keep_networks(patch)
        model = tiny.write_model(folder / "model")
        ended = run("distill", *tiny_flags(folder, model, export__stages="()"))
        assert ended.code == 0, ended.err
        c = small()
        c.name, c.root, c.model.path = "tiny", str(folder / "runs"), str(model)
        for name, value in (("steps", 6), ("batch", 16)):
            c.train[name] = value
        c.optimizer.warmup_steps, c.export.stages, c.pairs.start = 2, (), "noise"
        c.pairs.examples, c.pairs.shard_size, c.pairs.batch = 32, 16, 16
        numbers = study_flow.study_flow(open_experiment(c.lock()))
    return folder / "runs" / "tiny", numbers


@pytest.mark.slow
def test_its_numbers_are_kept_and_hold_together(finished):
    folder, numbers = finished
    assert read_json(folder / study_flow.NUMBERS) == numbers
    straight = numbers["straightness"]
    assert set(straight) == {f"base model, {n} windows" for n in (4, 2, 1)} | {
        f"{n}-window student, {n} windows" for n in (4, 2)
    }
    assert all(np.min(row["mean"]) >= 0 for row in straight.values())
    for n, rows in numbers["velocity_error"].items():
        assert set(rows) == {f"{who}, {where}" for who in ("untrained", "trained") for where in ("uniform", "starts")}
        assert all(len(row["relative"]["mean"]) == int(n) for row in rows.values())
    apart = np.asarray(numbers["discrepancy"]["distance"]["mean"])
    np.testing.assert_allclose(apart, apart.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(apart), 0, atol=1e-6)
    for name in trajectory.KINDS:
        rms = numbers["perturbation"][name]["rms"]["mean"]
        assert rms[0] == 0 < rms[1] < rms[2]


@pytest.mark.slow
def test_its_pictures_are_drawn(finished):
    for name in ("discrepancy", "perturbation", "windows-4", "windows-2"):
        picture = np.asarray(Image.open(finished[0] / f"{name}.png"))
        assert picture.shape[1] == 900 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
