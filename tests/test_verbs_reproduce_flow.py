"""The grid of methods on an MMDiT, a rectified flow: every method opens and costs the same; a toy's grid gives a table."""

import json
from functools import partial
from pathlib import Path

import jax
import pytest
import tiny_flow
from test_configs import check
from test_configs import config as read_config
from test_verbs_reproduce import SMALL

from configs.reproduce import get_config as reproduce_config
from proreflow_jax import reproduce
from proreflow_jax.reproduction.cell import budget
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.open import open_experiment, reopen
from proreflow_jax.runtime import mesh

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker has it."""
    monkeypatch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy's folder."""
    return tiny_flow.write_model(tmp_path_factory.mktemp("flow") / "model")


def small(folder: Path, model: Path, **fields: object):
    """The grid of toys in folder/runs."""
    places = {"root": str(folder / "runs"), "model.path": str(model), "data.path": str(folder / "data")}
    values = {name: value for name, value in SMALL.items() if not name.startswith("reproduce.")}
    return changed(reproduce_config("flow"), values | places | {key.replace("__", "."): value for key, value in fields.items()})


def test_the_digits_mmdit_can_be_distilled_on_two_cores():
    c = read_config("digits_flow")
    check(c, 2)
    assert c.stages == (8, 4, 2) and c.student.prediction == "velocity" and c.evaluate.protocol == "digits"


def test_every_method_of_a_flow_can_be_opened_and_costs_the_same(tmp_path, model):
    config = small(tmp_path, model, train__batch=32, pairs__batch=128)
    experiment = open_experiment(config)
    names = [name for _, name, _ in config.reproduce.methods]
    assert {"reflow-1", "PeRFlow-4-velocity", "direct-2", "ProReflow-II", "chain"} <= set(names)
    (forwards,) = config.reproduce.budgets
    for _, name, fields in config.reproduce.methods:
        opened = reopen(experiment, changed(config, fields))
        assert {stage.student.prediction for stage in opened.stages} == {"velocity"}
        spent = sum(budget(opened, stage, forwards).forwards for stage in opened.stages)
        assert forwards - 3 * 96 < spent <= forwards, name
        alone = reproduce_config(f"flow-{name}")
        assert alone.stages == opened.config.stages and alone.model.path == "runs/digits_flow_model"


@pytest.mark.slow  # cells are trained
def test_a_toy_s_grid_gives_a_table(tmp_path, model):
    rows = [row for row in reproduce_config("flow").reproduce.methods if row[1] in ("reflow-1", "PeRFlow-4-velocity", "chain")]
    fields = dict(methods=tuple(rows), budgets=(4000,), seeds=(0, 1), effects=(), figures=(), references=("chain",))
    config = small(tmp_path, model, **{f"reproduce__{name}": value for name, value in fields.items()})
    reproduce.reproduce(config, 1)
    cells = json.loads((tmp_path / "runs" / "reproduce-flow" / "table.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == {"teacher", "reflow-1", "PeRFlow-4-velocity", "chain"} and len(cells) == 8
    assert all(cell["steps"]["2"]["distance"] > 0 for cell in cells)
