"""The lab: its data are what their closed form says, its students are the project's own, its table says what it cost."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verb import ROOT, run

from configs.reproduce import get_config as reproduce_config
from proreflow_jax import reproduce
from proreflow_jax.data import mixture
from proreflow_jax.evaluation import figures, frechet, sliced
from proreflow_jax.evaluation.page import costs, sections, serve
from proreflow_jax.evaluation.page.document import document
from proreflow_jax.evaluation.page.facts import Change
from proreflow_jax.models import mlp
from proreflow_jax.reproduction import cells, curves, grid_facts, grid_page, lab, report
from proreflow_jax.reproduction.cell import make_programs, stage_pairs, train_student
from proreflow_jax.reproduction.cells import make_cells
from proreflow_jax.reproduction.grid_facts import Grid
from proreflow_jax.run import check_config
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.open import reopen
from proreflow_jax.storage import atomic, lock

pytestmark = pytest.mark.usefixtures("quick")
TINY = {
    "lab.classes": 3,
    "lab.components": 2,
    "lab.dimensions": 4,
    "lab.width": 16,
    "lab.blocks": 1,
    "lab.time_features": 8,
    "lab.steps": 20,
    "lab.batch": 32,
    "lab.optimizer.warmup_steps": 2,
    "optimizer.warmup_steps": 2,
    "pairs.batch": 8,
    "train.batch": 8,
    "evaluate.examples": 64,
    "evaluate.teacher_steps": (8, 4, 2),
    "reproduce.seeds": (0, 1),
    "reproduce.steps": (2, 4),
    "reproduce.chunk": 4,
    "reproduce.baseline": "four",
    "reproduce.references": (),
    "reproduce.effects": (("more alpha", "again", "four"), ("against the teacher", "four", "teacher")),
    "reproduce.figures": (("curves.png", ("four", "again")),),
}
FOUR = {"stages": (4,), "pairs.start": "data", "pairs.steps": 2, "reproduce.budgets": (800, 1600)}
ROWS = (("a", "four", FOUR), ("b", "again", FOUR | {"loss.alpha": 3.0, "reproduce.budgets": (1600,)}))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {"root": str(tmp_path_factory.mktemp("lab")), "compilation_cache": ""}


@pytest.fixture
def tiny(places):
    """A function fields -> config of a lab in which everything takes no time; runs share one folder."""
    return lambda **fields: changed(
        reproduce_config("lab"),
        TINY | places | {"reproduce.methods": ROWS} | {k.replace("__", "."): v for k, v in fields.items()},
    )


def test_the_mixtures_moments_are_those_of_its_draws():
    data = mixture.make_mixture(10, 6, 16, 11)
    x = mixture.draw(data, np.random.default_rng(0), np.arange(60_000) % 10)
    mean, covariance = mixture.moments(data)
    assert np.trace(covariance) == pytest.approx(16)  # the schedule's noise levels are made for unit variance
    np.testing.assert_allclose(x.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.04)
    assert frechet.frechet_distance(frechet.moments(x), (mean, covariance)) < 0.002
    one = mixture.draw(data, np.random.default_rng(0), np.full(20_000, 3))
    np.testing.assert_allclose(one.mean(0), data.weights[3] @ data.means[3], atol=0.05)  # a class is its own components


def test_a_shift_is_its_own_sliced_distance():
    x = np.random.default_rng(0).normal(size=(500, 8))
    shift = np.full(8, 0.5)
    moved = sliced.sliced_distance(sliced.project(x), sliced.project(x + shift))
    assert sliced.sliced_distance(sliced.project(x), sliced.project(x[::-1])) == 0
    assert moved == pytest.approx(np.linalg.norm(shift) / 8**0.5, rel=0.25)  # mean over directions of (u . shift)^2


def test_the_network_takes_what_a_unet_takes():
    net = mlp.make_mlp(dict(in_channels=4, cross_attention_dim=3, width=16, blocks=2, features=8, sample_size=1))
    params, z = jax.jit(net.init)(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 1, 1, 4))
    states = mlp.make_one_hot(3).apply({}, jnp.arange(5)[:, None] % 3).last
    apply = jax.jit(net.apply)
    out = apply(params, z, jnp.full(5, 500.0), states)
    assert out.shape == z.shape and {name: value.shape for name, value in params.items()} == {
        name: shape.shape for name, shape in net.shapes.items()
    }
    assert not np.allclose(out, apply(params, z, jnp.full(5, 100.0), states), atol=1e-4)
    assert not np.allclose(out, apply(params, z, jnp.full(5, 500.0), jnp.roll(states, 1, 2)), atol=1e-4)


@pytest.mark.slow
def test_updates_of_one_call_are_those_of_single_calls(tiny):
    """Also where the last call is not full, and every row of the data is one of the stage's own draws."""
    students = []
    for chunk in (1, 4):
        experiment = lab.open_lab(tiny(reproduce__chunk=chunk))
        experiment = reopen(experiment, changed(experiment.config, FOUR | {"stages": (4, 2)}))
        params, spent = train_student(experiment, make_programs(experiment), lab.rows, 1600, {})
        assert spent[0].updates % 4 and [cost.examples for cost in spent] == [8 * cost.updates for cost in spent]
        assert 1600 - 2 * 24 < sum(cost.forwards for cost in spent) <= 1600
        students.append(params)
    for name, value in students[0].items():
        np.testing.assert_allclose(students[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_pairs_start_from_the_mixtures_examples(tiny):
    experiment = lab.open_lab(tiny())
    experiment = reopen(experiment, changed(experiment.config, FOUR))
    stage = experiment.stages[0]
    read = lab.rows(experiment, stage)
    batch = read(np.arange(8))
    assert batch["mean"].shape == (8, 1, 1, 4) and not batch["std"].any() and batch["ids"].shape == (8, 1)
    assert (read(np.arange(8))["mean"] == batch["mean"]).all() and (read(np.arange(8, 16))["mean"] != batch["mean"]).any()
    records = stage_pairs(experiment, stage, experiment.denoiser.params(), 16, make_programs(experiment), read)
    clean = records["first"][:8] == 3  # the last window ends at data
    ends = records["states"][:8, 1]
    assert np.abs(ends[clean] - batch["mean"][clean]).mean() < np.abs(ends[clean] - np.roll(batch["mean"], 1, 0)[clean]).mean()


@pytest.fixture
def pages(monkeypatch):
    """What each page of a grid was made from, in order."""
    runs, read = [], grid_page.read_grid
    monkeypatch.setattr(grid_page, "read_grid", lambda *place: runs.append(read(*place)) or runs[-1])
    return runs


def check_page_is_the_cells(page, results, text):
    """Bars, costs, the last row of each table and the marks."""
    assert page.count("<svg") == 8 and page.count("data:image/png") == 0 and "<h2>Curves</h2>" in page
    one = lambda method, budget: [c for c in results if (c["method"], c["budget"]) == (method, budget)]
    for measure, steps in (("distance", 2), ("sliced", 4)):
        for method, budget in (("teacher", 0), ("four", 800), ("again", 1600)):
            said = report.spread([cell["steps"][str(steps)][measure] for cell in one(method, budget)])
            assert f">{said}</td>" in page, (method, budget, measure)
    marks = re.findall(r"<td class=best>(.*?)</td>", page)
    assert len(marks) == 4 * 2 * 2 and marks == [words for words in re.findall(r"\*\*(.*?)\*\*", text) if "±" in words]
    assert f"{sum(cell['forwards'] for cell in results):,} on one example" in page
    assert "<td>four</td><td>800</td>" in page and "(a) The teacher&#x27;s Frechet, real falls" in page


def check_pages_grew(runs, folder):
    """From the first minute on, a page a cell."""
    done = [run.progress["done"] for run in runs]
    assert done == [0, 0, *range(8), 8, 8] and {run.progress["total"] for run in runs} == {8}
    assert [run.boxes[0].kind for run in runs[:2]] == ["begun", "done"] and runs[0].boxes[0].digest == ""
    assert runs[2].progress["under_way"] == ["teacher-0"] and runs[5].progress["under_way"] == ["four-800-1"]
    assert not runs[-1].progress["under_way"] and not list(folder.rglob(cells.HOLDER))
    assert [sections.headline(run) for run in (runs[0], runs[-1])] == [
        "grid: 0 of 8 cells; the time left is not known yet", "finished"
    ]  # fmt: skip
    assert (
        not runs[3].tables and len(runs[5].tables) == 4 + 2 and re.search("; about .* left in all", sections.headline(runs[6]))
    )
    assert runs[-1].config_name == "reproduce:lab" and Change("lab.steps", "6000", "20") in runs[-1].changes


def test_a_run_says_what_every_row_cost_and_goes_on_where_it_was_stopped(tiny, capsys, pages, caplog, monkeypatch):
    config = tiny(name="whole")
    reproduce.reproduce(config, 1)
    text, folder = capsys.readouterr().out, Path(config.root) / "whole"
    page = (folder / "report.html").read_text()
    check_pages_grew(pages, folder)
    check_page_is_the_cells(page, json.loads((folder / "table.json").read_text())["cells"], text)
    assert serve.page(folder) == page
    table = json.loads((folder / "table.json").read_text())
    assert {path.name for path in folder.glob("*.*")} >= {"table.md", "table.json", "curves.png"}
    assert not list(folder.glob("samples*")) and "Unfinished" not in text
    keys = {(cell["method"], cell["budget"], cell["seed"]) for cell in table["cells"]}
    assert keys == {("teacher", 0, 0), ("teacher", 0, 1)} | {
        (name, budget, seed)
        for name, budgets in (("four", (800, 1600)), ("again", (1600,)))
        for budget in budgets
        for seed in (0, 1)
    }
    for cell in table["cells"]:
        stages = cell["stages"]
        assert cell["examples"] == 8 * cell["updates"] == 8 * sum(stage["updates"] for stage in stages)
        assert set(cell["steps"]["2"]) == {"distance", "frechet_teacher", "frechet", "sliced"}
        assert not stages or cell["budget"] - 24 * len(stages) < cell["forwards"] <= cell["budget"]
    teacher = next(cell for cell in table["cells"] if cell["method"] == "teacher")
    assert teacher["steps"]["8"]["distance"] == 0 and set(teacher["steps"]) == {"2", "4", "8"}
    assert {claim["budget"] for claim in table["claims"]} == {800, 1600}
    assert [head in text for head in ("## The gate", "## What each row costs", "pair records", "examples")] == [True] * 4

    base, files = list(folder.glob("base-*.safetensors")), sorted((folder / "cells").glob("*.json"))
    files[-1].unlink()
    before = {path: path.stat().st_mtime_ns for path in (*base, *files[:-1])}
    monkeypatch.setattr(grid_page, "read_grid", lambda *place: 1 / 0)
    reproduce.reproduce(config, 1)
    assert "was not written (ZeroDivisionError" in caplog.text
    again = json.loads((folder / "table.json").read_text())
    assert [cell["steps"] for cell in again["cells"]] == [cell["steps"] for cell in table["cells"]]
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(base) == 1


def result(experiment, cell, number):
    """A cell's file with numbers of its own."""
    stages = [{"windows": 4, "records": 8, "updates": 4, "examples": 32, "forwards": cell.forwards}] if cell.forwards else []
    scores = {measure: number for measure in lab.LAB.measures}
    steps = {str(s): scores for s in {*experiment.config.reproduce.steps, *experiment.config.evaluate.teacher_steps}}
    about = {"method": cell.method, "group": cell.group, "seed": cell.seed, "budget": cell.forwards, "stages": stages}
    about |= {"forwards": cell.forwards, "updates": 4, "examples": 32, "alpha": 1.0, "balance": "fixed", "steps": steps}
    return about | {"seconds": {"cpu": 1.0, "training": cell.forwards / 100, "measuring": 3.0}}


def test_a_killed_grid_shows_the_cells_that_are_whole_and_what_others_do(tiny, tmp_path):
    experiment = lab.open_lab(tiny(lab__steps=2, root=str(tmp_path)))
    grid = make_cells(experiment)
    cells_folder = experiment.run / "cells"
    numbers = dict(zip([cell.name for cell in grid[:6]], (0.5, 0.5, 2.5, 9.0, 1.25, 1.75), strict=True))
    for cell in grid[:6]:
        cells_folder.mkdir(exist_ok=True)
        atomic.write_json(cell.path(".json"), result(experiment, cell, numbers[cell.name]))
    grid[3].path(".json").write_text('{"method": ')  # four-800-1: cut
    bad = result(experiment, grid[5], 1.75) | {"method": "<script>alert(1)</script>"}
    atomic.write_json(grid[5].path(".json"), bad)  # four-1600-1
    for cell, fields in ((grid[3], {}), (grid[6], {"started": "0"}), (grid[7], {"machine": "m", "host": "<b>far"})):
        place = cells_folder / ".locks" / cell.name
        place.mkdir(parents=True)
        atomic.write_json(place / cells.HOLDER, lock.holder_record() | fields)  # grid[6]: of a process that is dead
    run = grid_facts.read_grid(experiment.run, check_config.flat(experiment.config), Grid(experiment, lab.LAB, grid))
    page = document(run)
    assert [(part["title"], part["done"], part["total"]) for part in run.progress["parts"]] == [
        ("base model", 2, 2), ("800 forwards", 1, 2), ("1,600 forwards", 2, 4)
    ]  # fmt: skip
    assert run.progress["under_way"] == ["four-800-1", f"{grid[7].name} on <b>far"]
    assert sections.headline(run) == "grid: 5 of 8 cells; about 24 s left in all"  # (8 + 2 * 16 s, 3 * 3 s), by two
    table = run.tables[0]
    assert table.title == "Distance to the teacher, 2 steps" and table.heads == ["method", "800", "1,600"]
    assert table.cells[:2] == [["teacher", "0.500 ± 0.000", "0.500 ± 0.000"], ["four", "2.5", "1.25"]]
    assert table.best == [(1, 1), (1, 2)]
    assert dict(costs.costs(run).facts)["forwards of the network"].startswith("4,000 on one example")
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;far" in page and page.count("<script") == 1 and "<b>far" not in page


def test_curves_have_no_level_that_is_rounding_of_zero():
    """The base model at its most steps against itself, which would take the logarithmic axis down to 1e-14."""
    row = lambda name, budget, n: {"method": name, "seed": 0, "budget": budget, "steps": {"4": {"d": 2.0}, "8": {"d": n}}}
    levels = lambda n: curves.curve_charts({10: {"teacher": [row("teacher", 0, n)]}}, [], {"d": "d"}, "teacher")[0][0].levels
    assert levels(3.2e-14) == levels(0.0) == {"teacher, 4": 2.0} and levels(0.01) == {"teacher, 4": 2.0, "teacher, 8": 0.01}


def test_curves_leave_out_steps_that_are_not_measured(tmp_path):
    row = lambda name, budget: {
        "method": name,
        "seed": 0,
        "budget": budget,
        "steps": {"1": {"distance": 1.0}, "4": {"distance": 2.0}},
    }
    budgets = {b: {"teacher": [row("teacher", 0)], "a": [row("a", b)]} for b in (10, 100)}
    ((chart,),) = curves.curve_charts(budgets, ["a"], {"distance": "distance"}, "teacher")
    assert chart.title == "distance, 4 steps" and chart.levels == {"teacher, 4": 2.0}
    for group in budgets.values():
        for (one,) in group.values():
            del one["steps"]["4"]
    curves.draw_curves(tmp_path / "c.png", budgets, ["a"], {"distance": "distance"}, "teacher")
    assert not list(tmp_path.iterdir())


SEEDS = (5, 5 + 2**32, 2**63, 2**64 - 1)


def test_both_words_of_the_base_model_s_seed_count(tiny):
    assert len({lab.open_lab(tiny(lab__seed=seed, lab__steps=2)).denoiser.digest() for seed in SEEDS}) == len(SEEDS)


def test_both_words_of_a_cell_s_seed_count(tiny):
    experiment = lab.open_lab(tiny(lab__steps=2))
    noise = lab.Instruments(lambda params, noise, *rest, **options: noise, lab.make_instruments(experiment).real)
    cells = {seed: reopen(experiment, changed(experiment.config, {"seed": seed})) for seed in SEEDS}
    assert len({lab.make_inputs(cell, seed, noise).noise.tobytes() for seed, cell in cells.items()}) == len(SEEDS)


def test_another_lab_is_another_base_model_and_other_cells(tiny):
    keys = lambda **fields: [cell.key for cell in make_cells(lab.open_lab(tiny(**fields)))]
    assert not set(keys()) & set(keys(lab__mixture_seed=12))


def test_single_steps_of_students_want_window_starts(tiny, caplog):
    config = lambda **fields: changed(tiny(), {"stages": (4, 2), "pairs.teacher": "previous", "pairs.substeps": 1} | fields)
    line = check_config.few_starts(config(**{"loss.window_start_prob": 0.25}))
    assert line.startswith("--config.pairs.substeps=1") and "--config.loss.window_start_prob=0.25" in line
    for fields in ({"loss.window_start_prob": 1.0}, {"pairs.substeps": 4}, {"pairs.teacher": "base"}, {"stages": (4,)}):
        assert check_config.few_starts(config(**{"loss.window_start_prob": 0.0} | fields)) == ""
    rows = [("a", "bad", FOUR | {"stages": (4, 2), "pairs.substeps": 1, "loss.window_start_prob": 0.0})]
    make_cells(lab.open_lab(tiny(reproduce__methods=tuple(rows))))
    assert len([record for record in caplog.records if record.message.startswith("bad: --config.pairs.substeps=1")]) == 1


def test_curves_have_one_style_a_series_and_the_teachers_levels(tmp_path):
    line = lambda name, k: figures.Line(name, [1e5, 1e6], [k, k / 2], [0.1, 0.1])
    charts = [
        [figures.Chart("one", [line("a", 1.0), line("b", 2.0)], {"teacher": 0.5})],
        [figures.Chart("two", [line("b", 3.0)], {})],
    ]
    figure = figures.curves(tmp_path / "c.png", charts, "forwards")
    first, second = figure.axes
    assert (tmp_path / "c.png").stat().st_size > 1000 and first.get_xscale() == first.get_yscale() == "log"
    assert first.containers[1].lines[0].get_color() == second.containers[0].lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    many = figures.curves(tmp_path / "m.png", [[figures.Chart("one", [line(f"s{i}", i + 1.0) for i in range(12)], {})]], "x")
    looks = {tuple(c.lines[0].properties()[k] for k in ("color", "marker", "linestyle")) for c in many.axes[0].containers}
    assert len(looks) == 12
    with pytest.raises(ValueError, match="finite"):
        figures.curves(tmp_path / "c.png", [[figures.Chart("one", [line("a", np.nan)], {})]], "forwards")


def test_other_verbs_refuse_the_lab_in_one_line():
    ended = run("distill", f"--config={ROOT / 'configs' / 'reproduce.py'}:lab")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1
