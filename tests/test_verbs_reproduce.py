"""The grid of methods: compute is what it says, a cell is the verbs' algorithm, a stopped grid goes on, tables are true."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from test_configs import config as read_config
from verb import ROOT, run

from configs.reproduce import get_config as reproduce_config
from proreflow_jax import distill, reproduce
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reproduction import claims, curves, digits, report
from proreflow_jax.reproduction.cell import budget, make_programs, stage_pairs, train_student
from proreflow_jax.reproduction.cells import make_cells
from proreflow_jax.reproduction.digits import DIGITS
from proreflow_jax.run import check_config
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.experiment import load_weights
from proreflow_jax.run.open import open_experiment, reopen
from proreflow_jax.run.stages import find_stage
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import lock

pytestmark = pytest.mark.usefixtures("quick")
SMALL = {
    "root": "",
    "model.path": "",
    "data.path": "",
    "data.resolution": 8,
    "train.batch": 8,
    "optimizer.warmup_steps": 2,
    "pairs.batch": 8,
    "evaluate.examples": 16,
    "evaluate.batch": 16,
    "evaluate.columns": 4,
    "evaluate.teacher_steps": (8,),
    "evaluate.study.examples": 4,
    "evaluate.study.steps": 8,
    "reproduce.budgets": (800,),
    "reproduce.baseline": "four",
    "reproduce.seeds": (0, 1),
    "reproduce.references": ("two",),
    "reproduce.figures": (),
    "reproduce.effects": (("a stage more", "two", "four"), ("alpha 3", "two-again", "two")),
}
PAPER = {"pairs.start": "data", "loss.window_start_prob": 0.0, "export.stages": ()}


def method(*stages, **fields):
    return PAPER | {"stages": stages, "pairs.steps": 8 // stages[0]} | {k.replace("__", "."): v for k, v in fields.items()}


TWO = (("a", "four", method(4)), ("b", "two", method(4, 2)), ("b", "two-again", method(4, 2, loss__alpha=3.0)))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As a worker has it; eight fake devices on two cores mostly wait for each other."""
    monkeypatch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "digits"


@pytest.fixture
def small(tmp_path, model, data):
    """A function fields -> config of a grid of tiny methods in tmp_path/runs."""
    places = {"root": str(tmp_path / "runs"), "model.path": str(model), "data.path": str(data)}

    def make(methods=TWO, **fields):
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        return changed(read_config("reproduce"), SMALL | places | fields | {"reproduce.methods": methods})

    return make


def counted(experiment):
    """The experiment with a UNet that only counts the images it is asked about, and the counter."""
    seen = []

    def apply(params, z, *rest):
        jax.debug.callback(lambda n: seen.append(int(n)), z.shape[0])
        return z

    networks = experiment.networks
    return experiment._replace(networks=networks._replace(denoiser=networks.denoiser._replace(apply=apply))), seen


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pairs__start": "noise"},
        {"pairs__solver": "heun"},
        {"pairs__guidance": 2.0},
        {"pairs__start": "noise", "pairs__solver": "heun", "pairs__guidance": 2.0},
    ],
)
def test_a_teachers_forwards_are_those_that_the_network_is_asked(small, fields):
    base = open_experiment(small())
    experiment, seen = counted(reopen(base, changed(base.config, method(4, **fields))))
    stage, programs = experiment.stages[0], make_programs(experiment)
    cost = budget(experiment, stage, 800)
    stage_pairs(experiment, stage, base.denoiser.params(), cost.records, programs, digits.rows(experiment, stage))
    jax.effects_barrier()
    assert sum(seen) == cost.forwards - cost.updates * 3 * experiment.config.train.batch


@pytest.mark.parametrize("fields", [{}, {"pairs__start": "noise"}, {"pairs__teacher": "base"}])
def test_every_method_spends_what_it_is_given_to_the_last_update(small, fields):
    experiment = open_experiment(small())
    experiment = reopen(experiment, changed(experiment.config, method(4, 2, **fields)))
    spent = [budget(experiment, stage, 800) for stage in experiment.stages]
    assert [cost.windows for cost in spent] == [4, 2]
    for cost in spent:
        assert 400 - 3 * 8 < cost.forwards <= 400 and cost.records % 8 == 0 and cost.examples == 8 * cost.updates
        assert cost.forwards - cost.updates * 24 <= 400 / 3


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(2,), (4, 2)])
def test_a_cell_is_the_verbs_algorithm(small, stages):
    """The same pairs, batches, times and updates: its student is that of distill with these examples and steps."""
    fields = method(*stages, pairs__start="noise", pairs__substeps=2, loss__window_start_prob=0.25)
    experiment = open_experiment(small())
    experiment = reopen(experiment, changed(experiment.config, fields | {"name": "both"}))
    params, spent = train_student(experiment, make_programs(experiment), digits.rows, 800, {})
    cost = spent[0]
    assert [one[1:] for one in spent] == [cost[1:]] * len(stages)  # one config says the same of both stages
    counts = {"pairs.examples": cost.records, "pairs.shard_size": cost.records, "train.steps": cost.updates}
    experiment = reopen(experiment, changed(experiment.config, counts))
    distill(experiment.config)
    theirs = load_weights(experiment, find_stage(experiment.stages, 2))
    for name, value in theirs.params.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_one_program_serves_all_alphas_seeds_and_numbers_of_steps(small):
    base = open_experiment(small())
    programs = make_programs(base)
    for fields in ({"seed": 0}, {"seed": 1}, {"loss.alpha": 7.0}, {"loss.window_start_prob": 0.5}):
        for forwards in (800, 600):
            train_student(reopen(base, changed(base.config, method(4) | fields)), programs, digits.rows, forwards, {})
    assert programs.update._cache_size() == 1 and programs.pairs._cache_size() == 1


@pytest.mark.slow
def test_in_fewer_steps_than_windows_an_untrained_student_is_ddim(small):
    experiment = open_experiment(small())
    instruments = digits.make_instruments(experiment)
    start = digits.make_inputs(experiment, 0, instruments)
    base = experiment.denoiser.params()
    student, _ = digits.measure_student(experiment, base, Parameterization("ddim_eps", 4), instruments, start)
    teacher, images = digits.measure_student(experiment, base, experiment.flow, instruments, start)
    assert set(teacher["steps"]) == {"1", "2", "4", "8"} == {str(steps) for steps in images}
    for steps in ("1", "2", "4"):
        assert student["steps"][steps]["distance"] == pytest.approx(teacher["steps"][steps]["distance"], rel=1e-4)
    assert student["steps"]["8"]["distance"] != pytest.approx(teacher["steps"]["8"]["distance"], rel=1e-3)
    assert len(student["bend"]) == 4 and len(teacher["bend"]) == 1


def results(config):
    return json.loads((Path(config.root) / config.name / "table.json").read_text())


def numbers(config):
    return {(c["method"], c["seed"]): (c["steps"], c["bend"], c["forwards"]) for c in results(config)["cells"]}


@pytest.mark.slow
def test_a_grid_that_was_stopped_goes_on_and_its_table_is_the_same(small, capsys):
    config = small()
    reproduce.reproduce(config, 1)
    said, whole = capsys.readouterr().out, numbers(config)
    folder = Path(config.root) / config.name
    assert len(whole) == 8 and "Unfinished" not in said
    assert {path.name for path in folder.glob("*.*")} >= {"table.md", "table.json", "samples-1.png", "samples-4.png"}
    assert all(800 - 2 * 24 < spent <= 800 for (name, _), (_, _, spent) in whole.items() if name != "teacher")

    kept = sorted((folder / "cells").glob("*.json"))
    for path in kept[::2]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept[1::2]}
    reproduce.reproduce(config, 1)
    assert numbers(config) == whole
    assert {path: path.stat().st_mtime_ns for path in kept[1::2]} == before


@pytest.mark.slow
def test_a_cell_that_another_process_holds_is_left_to_it(small, capsys):
    config = small(methods=TWO[:2], reproduce__effects=(("a stage more", "two", "four"),))
    with lock.lock_folder(Path(config.root) / config.name / "cells" / ".locks" / "four-800-1"):
        reproduce.reproduce(config, 1)
    assert "Unfinished: 5 of 6 cells" in (said := capsys.readouterr().out)
    named = said.rstrip().rpartition(": ")[2].split(", ")
    assert {"table.md", "table.json", "samples-2.png"} <= set(named)
    assert all((Path(config.root) / config.name / name).is_file() for name in named)
    assert ("four", 1) not in numbers(config)
    page = (Path(config.root) / config.name / "report.html").read_text()
    assert "<b>grid: 5 of 6 cells; about" in page and "Samples in 2 steps" in page and page.count("src='data:image/") == 4


def test_other_numbers_are_other_cells(small):
    keys = lambda **fields: [cell.key for cell in make_cells(open_experiment(small(**fields)))]
    plain = keys()
    assert len(set(plain)) == len(plain) == 8
    assert keys(reproduce__seeds=(0, 1), evaluate__student_steps=(), train__log_every=3) == plain
    for other in ({"loss__huber": 0.1}, {"reproduce__budgets": (4000,)}, {"optimizer__learning_rate": 1e-4}):
        ours = keys(**other)
        assert [a == b for a, b in zip(ours, plain, strict=True)] == [cell < 2 for cell in range(8)]  # teachers stay
    assert not set(keys(evaluate__examples=32)) & set(plain)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reproduce__budgets": (800, 100)}, "--config.reproduce.budgets: 100 leaves"),
        ({"reproduce__seeds": (3,)}, "--config.reproduce.seeds=(3,) must be at least two"),
        ({"reproduce__seeds": (0, 0.5)}, "--config.reproduce.seeds=(0, 0.5) must be different whole numbers from 0 to 18446"),
        ({"reproduce__references": ("three",)}, "--config.reproduce.references: 'three' is none of its methods"),
        ({"reproduce__effects": (("what", "two", "three"),)}, "--config.reproduce.effects: 'three' is none of its methods"),
        ({"reproduce__baseline": "three"}, "--config.reproduce.baseline: 'three' is none of its methods"),
        ({"reproduce__figures": (("a.png", ("three",)),)}, "--config.reproduce.figures: 'three' is none of its methods"),
        ({"reproduce__chunk": 0}, "--config.reproduce.chunk=0 must be in [1, 2147483647]"),
        ({"reproduce__steps": (3,)}, "3 windows, must divide 1000"),
        ({"evaluate__batch": 12}, "--config.evaluate.batch=12 must divide"),
        (
            {
                "methods": (("a", "../up", method(4)),),
                "reproduce__references": (),
                "reproduce__effects": (),
                "reproduce__baseline": "teacher",
            },
            "name '../up' is not made of",
        ),
    ],
)
def test_a_grid_that_cannot_be_carried_out_is_refused_before_anything_is_written(small, fields, words):
    config = small(**fields)
    with pytest.raises(ValueError) as error:
        reproduce.reproduce(config, 1)
    assert words in str(error.value) and not Path(config.root).exists()


def test_a_form_that_does_not_exist_is_refused_in_one_line():
    ended = run("reproduce", f"--config={ROOT / 'configs' / 'reproduce.py'}:fast")
    assert (
        ended.code == 2
        and "'fast' after configs/reproduce.py: must be full, quick, curves, lab, flow, or one of reflow-1" in ended.err
    )
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("config", ["digits.py", "reproduce.py:PeRFlow-4-velocity"])
def test_a_config_without_a_grid_is_refused(config):
    ended = run("reproduce", f"--config={ROOT / 'configs' / config}")
    assert ended.code == 2 and ended.err.startswith("reproduce: the config has no block `reproduce`")


def test_the_labs_rows_are_configs_of_the_verbs_too():
    c = reproduce_config("chain")
    assert c.name == "chain" and c.stages == (8, 4, 2) and c.data.kind == "digits" and "reproduce" not in c
    fields = ("loss.window_start_prob", "pairs.substeps", "pairs.start", "loss.balance")
    assert [check_config.field_value(c, field) for field in fields] == [1.0, 1, "noise", "auto"]
    for name, field in zip(("all-starts", "one-step", "noise", "auto"), fields, strict=True):
        without, alone = reproduce_config(f"chain-without-{name}"), reproduce_config(f"ProReflow-II-{name}")
        paper = reproduce_config("ProReflow-II")
        for each in fields:
            values = [check_config.field_value(one, each) for one in (without, alone, c, paper)]
            assert values[:2] == (values[2:][::-1] if each == field else values[2:]), (name, each)


def test_a_method_is_a_config_of_the_verbs():
    fields = dict((name, fields) for _, name, fields in read_config("reproduce").reproduce.methods)["direct-2-pairs"]
    c = reproduce_config("direct-2-pairs")
    assert c.name == "direct-2-pairs" and c.stages == (2,) and "reproduce" not in c
    for field, value in fields.items():
        assert field.startswith("reproduce.") or check_config.field_value(c, field) == value


def cell(name, seed, value):
    scores = {"distance": value, "frechet": 2 * value, "frechet_teacher": value / 2, "kernel": value, "recognised": 0.9}
    stage = {"windows": 2, "records": 8, "updates": 4, "examples": 32, "forwards": 100}
    totals = {"budget": 100, "forwards": 100, "updates": 4, "examples": 32, "seconds": {"cpu": 1.0}}
    return {"method": name, "group": "g", "seed": seed, "stages": [stage], "bend": [0.1], "steps": {"2": scores}} | totals


def test_beyond_the_spread_is_strict():
    assert claims.beyond([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert not claims.beyond([1.0, 1.1, 2.3], [2.0, 2.1, 2.2])  # one seed disagrees
    assert not claims.beyond([1.0, 1.5, 2.0], [1.1, 1.6, 2.1])  # paired, all agree, but the spreads overlap
    assert not claims.beyond([1.0], [2.0])
    assert claims.beyond([1.0, 1.2], [1.5, 1.7]) and not claims.beyond([1.0, 1.2], [1.4, 1.6])  # 3 x .141 = .424


def gate(**fields):
    return claims.Gate(
        **{"measure": "frechet", "teacher": {2: 8.0, 64: 1.0}, "falls": True, "baseline": {100: "better"}} | fields
    )


def test_claims_are_paired_by_seed_and_undecided_where_the_gate_is_closed():
    ours = [cell("a", seed, 1.0 + seed / 10) for seed in (0, 1, 9)]
    theirs = [cell("b", seed, 2.0 + seed / 10) for seed in (0, 1)]
    cells, pairs = {100: {"a": ours, "b": theirs}}, [("less", "a", "b"), ("nothing yet", "c", "b")]
    (claim,) = claims.make_claims(cells, pairs, ["distance"], gate())
    assert claim["change"] == pytest.approx(1.05 / 2.05 - 1) and claim["verdict"] == "better" and claim["steps"] == 2
    (claim,) = claims.make_claims(cells, [("more", "b", "a")], ["distance"], gate())
    assert claim["verdict"] == "worse"
    for shut in ({"baseline": {100: "undecided"}}, {"baseline": {}}, {"falls": False}, {"teacher": {2: 3.0, 64: 1.0}}):
        (claim,) = claims.make_claims(cells, [("less", "a", "b")], ["distance"], gate(**shut))
        assert claim["verdict"] == "undecided" and claim["beyond"]
    assert claims.make_claims({100: {"a": ours[2:], "b": theirs}}, pairs, ["distance"], gate()) == []  # no common seed
    text = report._changes("Choices", claims.make_claims(cells, pairs, ["distance"], gate()), 100, DIGITS)
    assert "**-49 %**" in text and "a / b" in text and "nothing yet" not in text


def test_the_gate_asks_whether_the_teacher_gets_nearer_and_the_baseline_beats_it():
    def row(name, numbers, budget):
        steps = {str(s): {"frechet": n, "distance": n} for s, n in numbers.items()}
        return [{"method": name, "seed": seed, "budget": budget, "steps": steps} for seed in (0, 1)]

    teacher = row("teacher", {1: 9.0, 2: 8.0, 4: 4.0, 64: 1.0}, 0)
    good, bad = row("base", {4: 3.0}, 10), row("base", {4: 5.0}, 10)
    made = claims.make_gate(
        {5: {"teacher": teacher, "base": bad}, 10: {"teacher": teacher, "base": good}}, "teacher", "base", "frechet"
    )
    assert made.falls and made.factor == 8.0 and made.baseline == {5: "worse", 10: "better"}
    assert made.is_open(10) and not made.is_open(5) and not made.is_open(20)
    rises = row("teacher", {2: 8.0, 4: 4.0, 8: 4.5, 64: 1.0}, 0)
    assert not claims.make_gate({10: {"teacher": rises, "base": good}}, "teacher", "base", "frechet").is_open(10)


def test_a_spread_is_that_of_a_sample_and_shows_as_many_digits_as_the_mean():
    assert report.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert report.spread([0.0123, 0.0125]) == "0.0124 ± 0.0001"
    assert report.spread([123.4]) == "123"
    assert report.spread([3.2e-14, -1e-14]) == report.spread([0.0, 0.0]) == report.spread([2e-14]) == "0"  # rounding


def test_figures_over_alpha_need_the_sweep_and_the_automatic_one(tmp_path):
    rows = [("ProReflow", "ProReflow-II", 1.0, "fixed"), ("alpha", "ProReflow-II-alpha-3", 3.0, "fixed")]
    rows += [("alpha", "ProReflow-II-auto", 1.0, "auto"), ("beyond", "direct-2", 1.0, "auto")]
    cells = {name: [cell(name, s, 1.0 + s) | {"group": g, "alpha": a, "balance": b} for s in (0, 1)] for g, name, a, b in rows}
    curves.draw_alphas(tmp_path, {name: group for name, group in cells.items() if "auto" not in name}, DIGITS.measures)
    assert not list(tmp_path.iterdir())
    curves.draw_alphas(tmp_path, cells, DIGITS.measures)
    assert {path.name for path in tmp_path.iterdir()} == {"distance-alpha.png", "frechet-alpha.png"}


def test_rows_are_means_over_seeds_and_say_what_they_cost():
    cells = {100: {"one": [cell("one", 0, 1.0), cell("one", 1, 3.0)]}}
    (row,) = report.rows_of(cells, DIGITS)
    assert row["distance"]["2"] == {"mean": 2.0, "spread": pytest.approx(2**0.5)} and row["seeds"] == [0, 1]
    assert (row["budget"], row["forwards"], row["updates"], row["examples"]) == (100, 100, 4, 32)
    text = report.costs(cells)
    assert [word.strip() for word in text.splitlines()[-1].split("|")[1:9]] == ["one", "100", "2", "8", "4", "32", "100", "1"]


def test_every_method_of_the_config_can_be_opened_and_costs_the_same():
    c = read_config("reproduce")
    experiment = open_experiment(changed(c, {"model.path": str(ROOT / "proreflow_jax" / "assets" / "digits")}))
    for _, name, fields in c.reproduce.methods:
        opened = reopen(experiment, changed(c, fields))
        (forwards,) = c.reproduce.budgets
        spent = sum(budget(opened, stage, forwards).forwards for stage in opened.stages)
        assert forwards - 4 * 96 < spent <= forwards, name
        if opened.config.export.stages:
            check_config.check_export(opened.config)
