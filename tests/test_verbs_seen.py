"""A run is seen from its first line on: what will be done, pictures at every checkpoint, progress.json. No number changes."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from verb import TINY, run, tiny_flags

from proreflow_jax.reflow import loop
from proreflow_jax.run.outlook import Outlook
from proreflow_jax.run.pictures import HALVES
from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.usefixtures("quick")
PICTURES = {"samples__prompts": "('a three', 'five')", "samples__teacher_steps": 4}
NAMES = [f"step-{step:08d}.png" for step in (0, 2, 4, 6)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


def lines(stage: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in (loop.WHOLE, loop.INPUT, loop.DEVICE)} for row in rows]


def shown(run_folder: Path) -> tuple:
    """What a run's page shows but its times: pictures, words of the lineage, ends of the curves."""
    page = (run_folder / "report.html").read_text()
    pictures = re.findall(r"data:image/png;base64,[^']+", page)
    legend = re.findall(r"</i>([^<]+ <b>[^<]+)</b></li>", page)
    return pictures, re.findall(r"<li class='box.*?</li>", page), legend, re.findall(r"<b>([^<]*)</b> <time", page)


@pytest.fixture(scope="module")
def drawn(finished: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run like `chain`, with pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.at").write_text(str(finished / "prompts.txt"))
    ended = run("distill", *tiny_flags(folder, model, **PICTURES))
    assert ended.code == 0, ended.err
    (folder / "said.txt").write_text(ended.err)
    return folder / "runs" / "tiny"


def test_the_first_line_says_all_and_comes_before_the_first_compile(model, tmp_path, monkeypatch):
    events = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            events.append(record.getMessage())

    log = logging.getLogger("proreflow_jax")
    heard = Heard()
    log.addHandler(heard)
    compiled = lambda event, duration, **_: events.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.clear_caches()
    monkeypatch.setattr("proreflow_jax.jobs.pairs.make_stage_pairs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        ended = run("distill", *tiny_flags(tmp_path, model))
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
        log.removeHandler(heard)
    line = f"{tmp_path}/runs/tiny: 2 stages of 4, 2 windows, each 32 pairs and 6 steps, 2 exports"
    assert ended.code == 130 and ended.err.splitlines()[0] == line
    assert events[0] == line and any("backend_compile" in event for event in events[1:])


def test_the_totals_are_those_of_the_config(model, tmp_path):
    from verb import tiny_config

    config = tiny_config(tmp_path, model)
    outlook = Outlook(config)
    outlook.begin()
    totals = [(part.phase, part.stage, part.total, part.done) for part in outlook.parts]
    pairs, steps = TINY["pairs.examples"], TINY["train.steps"]
    each = [(phase, n, total, 0) for n in (4, 2) for phase, total in (("pairs", pairs), ("train", steps))]
    assert totals == [*each, ("export", 4, 1, 0), ("export", 2, 1, 0)]
    online = Outlook(tiny_config(tmp_path, model, pairs__mode="online"), ["train"], [2])
    online.begin()
    assert [(part.phase, part.stage, part.total) for part in online.parts] == [("train", 2, steps)]


def test_a_finished_run_says_so_and_keeps_its_progress(drawn):
    record = read_json(drawn / "progress.json")
    assert record["phase"] == "done" and record["seconds_left"] == 0 and record["unit"] == "exports"
    assert [(part["phase"], part["stage"], part["done"]) for part in record["parts"]] == [
        ("pairs", 4, 32), ("train", 4, 6), ("pairs", 2, 32), ("train", 2, 6), ("export", 4, 1), ("export", 2, 1)
    ]  # fmt: skip
    assert all(part["done"] == part["total"] for part in record["parts"]) and record["rates"]["train"] > 0
    said = (drawn.parent.parent / "said.txt").read_text().splitlines()
    announced = said.index("compiling the train step: less than a minute; seconds where it was compiled before")
    assert announced > 0 and any("left in all (pairs" in line for line in said[announced:])


def test_every_checkpoint_has_its_picture_student_beside_base_model(drawn):
    (teacher,) = (drawn / "samples").glob("teacher-*.png")
    record = read_json(drawn / "samples" / "samples.json")
    assert record["prompts"] == ["a three", "five"] and record["teacher"] == teacher.name
    left = np.asarray(Image.open(teacher))
    tile, count, gap = record["tile"], record["count"], record["gap"]
    assert left.shape == (2 * tile, count * tile, 3)
    for stage in ("stage-4", "stage-2"):
        pictures = [np.asarray(Image.open(drawn / stage / "samples" / name)) for name in NAMES]
        assert sorted(hashes(drawn / stage / "samples")) == NAMES
        for picture in pictures:
            assert picture.shape == (2 * tile, 2 * count * tile + gap, 3)
            np.testing.assert_array_equal(picture[:, : count * tile], left)
        about = json.loads(Image.open(drawn / stage / "samples" / NAMES[-1]).info[HALVES])  # the card of an export says it
        assert about["prompts"] == record["prompts"] and about["step"] == 6 and f"stage-{about['windows']}" == stage
        assert about["right"]["taken"] == about["windows"] and about["left"]["steps"] == 4
        assert (pictures[0] != pictures[-1]).any()
    steps = {int(path.name) for path in (drawn / "stage-4" / "checkpoints").iterdir() if path.name.isdecimal()}
    assert steps <= {0, 2, 4, 6}


def test_the_page_of_the_run_has_all_its_pictures(drawn):
    pictures, boxes, legend, (headline,) = shown(drawn)
    assert len(pictures) == 2 * (1 + len(NAMES)) and len(boxes) == 3 and len(legend) == (1 + 4 + 4) + (1 + 2 + 2)
    assert headline == "finished" and "<li>a three</li><li>five</li>" in (drawn / "report.html").read_text()


def test_pictures_change_no_number_of_the_training(chain, drawn):
    without = chain / "runs" / "tiny"
    for stage in ("stage-4", "stage-2"):
        assert read_json(drawn / stage / "DONE.json") == read_json(without / stage / "DONE.json")
        assert lines(drawn / stage) == lines(without / stage)


def test_a_resumed_run_draws_what_one_that_never_stopped_draws(drawn, model, tmp_path):
    """Back to step 4 of stage 2, as a kill would leave it: its last picture drawn and its checkpoint not."""
    again = tmp_path / "runs" / "tiny"
    shutil.copytree(drawn, again)
    shutil.copy(drawn.parent.parent / "prompts.at", tmp_path)
    stage = again / "stage-2"
    shutil.rmtree(stage / "checkpoints" / "6")
    (stage / "DONE.json").unlink()
    (stage / "samples" / NAMES[2]).unlink()
    (stage / "samples" / NAMES[3]).write_bytes(b"cut off")
    shutil.rmtree(again / "samples")
    ended = run("distill", *tiny_flags(tmp_path, model, **PICTURES))
    assert ended.code == 0, ended.err
    already = "stage 4's pairs, stage 4's training, stage 2's pairs, stage 2's 4 of 6 steps, stage 4's export, stage 2's export"
    assert ended.err.splitlines()[0].endswith(f"; done already: {already}")
    for folder in ("stage-4/samples", "stage-2/samples", "samples"):
        assert hashes(again / folder) == hashes(drawn / folder), folder
    assert lines(stage) == lines(drawn / "stage-2")
    assert shown(again) == shown(drawn)


def test_a_stage_under_way_is_drawn_from_its_newest_checkpoint(drawn, model, tmp_path):
    again = tmp_path / "runs" / "tiny"
    shutil.copytree(drawn, again)
    (again / "stage-2" / "DONE.json").unlink()
    shutil.rmtree(again / "stage-2" / "checkpoints" / "6")
    (tmp_path / "prompts.at").write_text((drawn.parent.parent / "prompts.at").read_text())
    words = [*tiny_flags(tmp_path, model), "--stage=2", "--count=2", "--prompt=a three"]
    ended = run("sample", *words, f"--out={tmp_path / 'a.png'}")
    assert ended.code == 0 and "stage 2 is not finished: its student after 4 of 6 steps draws" in ended.err, ended.err
    assert (tmp_path / "a.png").is_file() and not (again / "stage-2" / "DONE.json").exists()
    shutil.rmtree(again / "stage-2" / "checkpoints")
    ended = run("sample", *words, f"--out={tmp_path / 'b.png'}")
    assert ended.code == 2 and "holds no student yet" in ended.err and "train --stage=2" in ended.err
    assert not (tmp_path / "b.png").exists() and not (again / "stage-2" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"samples__prompts": "('a', 3)"}, "--config.samples.prompts"),
        ({"samples__count": 0}, "--config.samples.count"),
        ({"samples__teacher_steps": 2000}, "--config.samples.teacher_steps"),
        ({"samples__guidance": -1.0}, "--config.samples.guidance"),
    ],
)
def test_pictures_that_cannot_be_are_refused_before_anything(model, tmp_path, fields, named):
    ended = run("distill", *tiny_flags(tmp_path, model, **fields))
    assert ended.code == 2 and named in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists() and os.listdir(tmp_path) == ["prompts.txt"]
