"""The page of real runs: finished, under way, killed, damaged; and that no job depends on its page."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proreflow_jax.evaluation.page import costs
from proreflow_jax.evaluation.page.document import document
from proreflow_jax.evaluation.page.facts import Change, Stage
from proreflow_jax.jobs import run_facts, run_page
from proreflow_jax.run import nearest_config
from proreflow_jax.run.check_config import changed, flat
from proreflow_jax.run.read_config import read_config, read_record
from proreflow_jax.storage import atomic


@pytest.fixture
def copy(chain: Path, tmp_path: Path) -> Path:
    """A finished run, without its large files."""
    return Path(
        shutil.copytree(chain / "runs" / "tiny", tmp_path / "tiny", ignore=lambda *_: ["pairs", "export", "tensorboard"])
    )


def page_of(folder: Path) -> str:
    """The page, and that reading changes no file."""
    before = run_facts.file_sizes(folder)
    page = document(run_facts.read_run(folder, {}))
    assert run_facts.file_sizes(folder) == before
    return page


def test_a_finished_run_has_a_page_with_its_lineage_curves_and_costs(chain):
    folder = chain / "runs" / "tiny"
    run = run_facts.read_run(folder, {})
    page = document(run)
    assert "<b>finished</b>" in page and "1 − cosine" in page and page.count("<svg") == 4 and "<h2>Table" not in page
    digests = [atomic.read_json(folder / f"stage-{n}" / "DONE.json") for n in (4, 2)]
    for digest in (digests[0]["parent"], digests[0]["digest"], digests[1]["digest"]):
        assert page.count(f"<code>{digest[:12]}</code>") == 1
    assert [stage.steps for stage in run.stages] == [6, 6] and run.exports == [4, 2] and "is not the box before" not in page
    assert sum(run.disk.values()) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert {"pairs", "checkpoints", "export"} <= set(run.disk)
    assert run.config_name == "digits" and Change("train.steps", "500", "6") in run.changes
    assert len((folder / "report.html").read_text()) == pytest.approx(len(page), rel=0.2)  # distill has written one


def test_a_run_without_done_is_under_way(copy):
    """As a kill leaves it: its last line cut, no progress."""
    for name in ("stage-2/DONE.json", "progress.json"):
        (copy / name).unlink()
    lines = copy / "stage-2" / "metrics.jsonl"
    lines.write_text(lines.read_text()[:-40])
    run = run_facts.read_run(copy, {})
    page = document(run)
    assert "begun; nothing is counted yet" in page and "4 of 6 steps" in page
    assert [(bool(stage.done), stage.steps, len(stage.lines)) for stage in run.stages] == [(True, 6, 3), (False, 4, 2)]
    shutil.rmtree(copy / "stage-2")
    assert "not begun" in page_of(copy)


def test_a_stage_without_a_config_or_a_run_of_nothing_has_a_page(copy, tmp_path):
    (copy / "config.json").unlink()  # as of `train` alone
    assert "Stage 2" in page_of(copy)
    run = run_facts.read_run(tmp_path / "nothing", flat(read_config("sd15")))
    assert [stage.begun for stage in run.stages] == [False] * 3 and "not begun" in document(run)
    assert "<h1>nothing</h1>" in page_of(tmp_path / "nothing")


def test_files_of_rubbish_leave_the_rest_of_the_page(copy):
    (copy / "samples").mkdir()
    (copy / "stage-4" / "samples").mkdir()
    (copy / "stage-4" / "samples" / "step-00000002.png").write_bytes(b"\x89PNG cut")
    Image.new("RGB", (8, 8)).save(copy / "stage-4" / "samples" / "step-00000004.png")
    for name in (
        "progress.json",
        "table.json",
        "samples/samples.json",
        "scores.json",
        "stage-4/DONE.json",
        "stage-4/plan.json",
    ):
        (copy / name).write_text('{"half": ')
    (copy / "stage-4" / "metrics.jsonl").write_text('[]\nnull\n{"step": "x"}\n{"step": 2, "loss": {}}\n\xff\n')
    page = page_of(copy)
    assert page.count("<svg") == 2 and page.count("data:image/png") == 1
    (copy / "progress.json").write_text("{}")
    assert page_of(copy)


def test_pictures_are_few_the_first_and_the_newest_among_them(copy):
    folder = copy / "stage-4" / "samples"
    folder.mkdir()
    record = {"prompts": ["<script>a prompt</script>"], "count": 1, "tile": 8, "gap": 4, "left": {"steps": 4, "guidance": 1.0}}
    (copy / "samples").mkdir()
    atomic.write_json(copy / "samples" / "samples.json", record)
    for step in range(0, 400, 10):
        picture = np.full((8, 20, 3), 255, np.uint8)
        picture[:, 12:] = step // 2
        Image.fromarray(picture).save(folder / f"step-{step:08d}.png")
    run = run_facts.read_run(copy, {})
    steps = [drawing.step for drawing in run.stages[0].drawings]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 390 and len(steps) == run_facts.SHOWN
    page = document(run)
    assert len(set(re.findall(r"data:image/png;base64,[^']+", page))) == run_facts.SHOWN + 1  # and the base model's half
    assert "<script>a prompt" not in page and "&lt;script&gt;a prompt" in page


def test_of_a_long_run_as_many_lines_are_read_as_of_a_short_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "seconds": 2.0}) for step in range(10, 1_000_001, 10)]
    path.write_text("\n".join([*rows, '{"step": 1000010, "sec']))
    lines = run_facts.read_lines(path)
    assert len(lines) <= run_facts.MOST_LINES + 1 and (lines[0]["step"], lines[-1]["step"]) == (10, 1_000_000)
    stage = Stage(2, True, {}, "", 1_000_000, 1_000_000, lines)
    assert costs.training_seconds(stage) == 2 * 1_000_000


@pytest.mark.parametrize(("count", "most"), [(0, 6), (1, 6), (6, 6), (7, 6), (100, 6), (3, 2), (1000, 5)])
def test_chosen_steps_are_spread_over_all(count, most):
    steps = list(range(count))
    chosen = run_facts.chosen(steps, most)
    assert (
        chosen == sorted(set(chosen))
        and len(chosen) == min(count, most)
        and chosen[:1] == steps[:1]
        and chosen[-1:] == steps[-1:]
    )


def test_the_tables_of_evaluate_are_on_the_page(copy):
    shown = {"heads": ["method", "FD"], "better": ["", "less"], "cells": [["a", "2"], ["b", "1"]], "compared": [0, 1]}
    atomic.write_json(copy / "table.json", {"rows": [], "notes": ["<b>note"], "sentences": ["(a) passed"], "shown": shown})
    atomic.write_json(copy / "scores.json", {"rows": []})  # of an older version
    Image.new("RGB", (40, 20), "red").save(copy / "samples.png")
    page = page_of(copy)
    assert (
        "<td class=best>1</td>" in page
        and "&lt;b&gt;note" in page
        and "(a) passed" in page
        and page.count("<img class=sheet") == 1
    )


def test_a_page_that_cannot_be_written_is_one_warning_and_nothing_else(copy, monkeypatch, caplog):
    config = read_record(copy / "config.json")
    run_page.keep_page(copy, config)
    page = (copy / "report.html").read_text()
    assert page.startswith("<!doctype html>") and not caplog.records

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic, "write_text", full)
    with caplog.at_level(logging.WARNING):
        run_page.keep_page(copy, config)
    (record,) = caplog.records
    assert "report.html was not written" in record.getMessage() and "\n" not in record.getMessage()
    assert (copy / "report.html").read_text() == page


@pytest.mark.parametrize("name", nearest_config.defaults())
def test_a_config_is_nearest_to_itself(name):
    config = read_config(name)
    assert nearest_config.compare(json.loads(json.dumps(flat(config)))) == (name, [])
    other = changed(config, {"train.batch": config.train.batch + 1, "name": "mine", "root": "/elsewhere"})
    assert nearest_config.compare(flat(other)) == (
        name, [Change("train.batch", str(config.train.batch), str(config.train.batch + 1))]
    )  # fmt: skip
