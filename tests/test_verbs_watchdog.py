"""Every verb of several processes ends when it stands still: --config.watchdog is armed, and each batch begins it anew."""

import ast
import faulthandler
import shutil
from pathlib import Path

import pytest
from made_images import LAYOUTS, encode, originals
from verb import ROOT, run, tiny_flags

from proreflow_jax.jobs import score_digits

pytestmark = pytest.mark.usefixtures("quick")
SECONDS = 4321
ON_A_RUN = {"distill": (), "make_pairs": ("--stage=4",), "train": ("--stage=4",)}
ALONE = ("cache", "evaluate")


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every start of the timer."""
    seconds = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit, **options: seconds.append(limit))
    return seconds


def test_every_verb_of_several_processes_is_tried_here():
    calls = {path.stem: ast.unparse(ast.parse(path.read_text())) for path in (ROOT / "proreflow_jax").glob("*.py")}
    assert {verb for verb, text in calls.items() if "pod=True" in text} == {*ON_A_RUN, *ALONE}


@pytest.mark.parametrize("verb", ON_A_RUN)
def test_a_verb_on_a_run_arms_it(chain, model, tmp_path, armed, verb):
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    ended = run(verb, *tiny_flags(copy, model, watchdog=SECONDS), *ON_A_RUN[verb])
    assert ended.code == 0, ended.err
    assert set(armed) == {SECONDS}


def test_cache_arms_it(model, tmp_path, armed):
    (tmp_path / "images").mkdir()
    rows = originals({3: encode(3)[:90]})
    images = {f"data__{name}": value for name, value in LAYOUTS["jsonl"](tmp_path / "images", rows).items()}
    fields = {"data__max_bad": 0.2, "cache__shard_size": 8, "cache__batch": 8, "watchdog": SECONDS}
    ended = run("cache", *tiny_flags(tmp_path, model, **images, **fields), f"--out={tmp_path / 'cache'}")
    assert ended.code == 0, ended.err
    assert set(armed) == {SECONDS} and len(armed) > 1


def test_evaluate_arms_it(model, tmp_path, armed, monkeypatch):
    monkeypatch.setattr(score_digits, "make_digits_judge", lambda size: None)
    names = ("distance", "frechet", "kernel", "kernel_error", "recognised")
    monkeypatch.setattr(score_digits, "scores", lambda *arrays: dict.fromkeys(names, 1.0))
    rows = {"evaluate__teacher_steps": "(2,)", "evaluate__student_steps": "()", "evaluate__batch": 8}
    ended = run("evaluate", *tiny_flags(tmp_path, model, data__kind="digits", watchdog=SECONDS, **rows))
    assert ended.code == 0, ended.err
    assert set(armed) == {SECONDS} and len(armed) > 2  # of the block, and of each of two batches
