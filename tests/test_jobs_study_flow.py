"""evaluate --study: what is measured on a finished run, and what is refused before anything is."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from verb import PROMPTS, quickly, run, tiny_config, tiny_flags

from configs import digits
from proreflow_jax.evaluation import trajectory
from proreflow_jax.evaluation.page.document import document
from proreflow_jax.jobs import run_facts, study_facts, study_flow
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_experiment
from proreflow_jax.storage.atomic import read_json, write_json


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
def finished(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """(run folder, numbers) of a study of a tiny run, 4 then 2 windows."""
    folder = tmp_path_factory.mktemp("study")
    with quickly(programs):
        model = tiny.write_model(folder / "model")
        ended = run("distill", *tiny_flags(folder, model, export__stages="()"))
        assert ended.code == 0, ended.err
        c = tiny_config(folder, model, export__stages=())
        with c.unlocked():
            c.evaluate.study = small().evaluate.study
        numbers = study_flow.study_flow(open_experiment(c))
    return folder / "runs" / "tiny", numbers


@pytest.mark.slow
def test_its_numbers_are_kept_and_hold_together(finished):
    folder, numbers = finished
    assert read_json(folder / study_flow.NUMBERS) == numbers and "<h2>Study" in (folder / "report.html").read_text()
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


def numbers_of(means: np.ndarray) -> dict[str, list]:
    return {"mean": means.tolist(), "spread": (means / 10).tolist()}


def record() -> dict:
    """A study.json of two stages, each number another one."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: numbers_of(rng.uniform(0.1, 0.9, shape).round(4))
    whos = [f"{who}, {where}" for who in ("untrained", "trained") for where in ("uniform", "starts")]
    errors = {str(n): {who: {"relative": draw(n), "cosine": draw(n)} for who in whos} for n in (4, 2)}
    straight = {f"base model, {n} windows": draw(n) for n in (4, 2, 1)}
    straight |= {f"{n}-window student, {n} windows": draw(n) for n in (4, 2)}
    sizes = [0.0, 0.1, 0.5]
    kinds = {name: {key: draw(len(sizes)) for key in ("rms", "median")} for name in trajectory.KINDS}
    settings = {"examples": 64, "seeds": 3, "steps": 8, "perturbed_steps": 4, "sizes": sizes[1:], "dtype": "float32"}
    return {
        "settings": settings | {"spread": "standard deviation over seeds"},
        "straightness": straight,
        "velocity_error": errors,
        "discrepancy": {"times": [1.0, 0.5], "distance": draw(2, 2), "cosine": draw(2, 2)},
        "perturbation": {"sizes": sizes, **kinds},
    }


def test_the_page_of_a_run_has_the_numbers_of_its_study(tmp_path):
    study = record()
    write_json(tmp_path / study_flow.NUMBERS, study)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "discrepancy.png")
    run = run_facts.read_run(tmp_path, {})
    page = document(run)
    cell = lambda numbers, *at: study_facts.said(np.asarray(numbers["mean"])[at], np.asarray(numbers["spread"])[at])
    cells = [cell(row, k) for row in study["straightness"].values() for k in range(len(row["mean"]))]
    for n, rows in study["velocity_error"].items():
        cells += [cell(row[key], k) for row in rows.values() for key in ("relative", "cosine") for k in range(int(n))]
    cells += [
        cell(study["perturbation"][kind][key], k) for kind in trajectory.KINDS for key in ("rms", "median") for k in (1, 2)
    ]
    cells += [cell(study["discrepancy"][key], 0, 1) for key in ("distance", "cosine")]
    assert len(cells) == 13 + 48 + 20 + 2 and all(f"<td>{text}</td>" in page for text in cells)
    points = {(panel.title, series.name): list(series.points) for panel in run.study.panels for series in panel.series}
    bend = study["straightness"]["4-window student, 4 windows"]["mean"]
    assert points["relative bend of the path, 4 windows", "4-window student"] == list(
        zip((1 / 8, 3 / 8, 5 / 8, 7 / 8), bend, strict=True)
    )
    error = study["velocity_error"]["2"]["trained, starts"]["relative"]["mean"]
    assert points["velocity error, 2 windows", "trained, starts"] == [(0.25, error[0]), (0.75, error[1])]
    rms = study["perturbation"]["magnitude_up"]["rms"]["mean"]
    assert points["direction against magnitude", "magnitude, up"] == list(zip((0.0, 0.1, 0.5), rms, strict=True))
    assert page.count("<svg") == 5 and page.count("<img class=sheet") == 1 and "class=best" not in page
    assert "64 prompts of the run; mean ± standard deviation over seeds (3 seeds of the noise)" in page


@pytest.mark.parametrize("part", ["settings", "straightness", "velocity_error", "discrepancy", "perturbation"])
def test_a_study_of_another_version_is_left_off_the_page(part, tmp_path):
    write_json(tmp_path / study_flow.NUMBERS, record() | {part: {"other": 1}})
    run = run_facts.read_run(tmp_path, {})
    assert run.study is None and "<h2>Study" not in document(run)


@pytest.mark.parametrize(
    ("mean", "spread", "words"),
    [(0.06806, 0.00095, "0.0681 ± 0.0009"), (0.1252, 0.0003, "0.1252 ± 0.0003"), (0.0, 0.0, "0"), (0.0, 0.01, "0.00 ± 0.01"),
     (12345.0, 20.0, "12345 ± 20"), (1e-9, 1e-12, "0.000000 ± 0.000000")],
)  # fmt: skip
def test_a_mean_has_three_digits_and_shows_its_spread(mean, spread, words):
    assert study_facts.said(mean, spread) == words
