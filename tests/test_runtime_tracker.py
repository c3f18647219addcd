"""wandb beside a run: one id that the folder keeps, numbers and pictures; missing, refusing or hanging it costs one line."""

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from proreflow_jax.runtime import tracker
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.tracker import NOWHERE, open_tracker
from proreflow_jax.storage.atomic import read_json

KEY = "0123456789abcdef0123456789abcdef01234567"
PICTURE = np.zeros((2, 4, 3), np.uint8)


class Wandb(ModuleType):
    """Stands for the library: writes down what is asked of it; `fails` says at which call it raises."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.begun, self.logged, self.ended = fails, [], [], 0
        self.Settings = SimpleNamespace
        self.Image = lambda array: ("image", array.shape)

    def _step(self, what: str) -> None:
        if what == self.fails:
            raise RuntimeError(f"{what} failed for the key {KEY}")

    def init(self, **options: object) -> "Wandb":
        self._step("init")
        self.begun.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, values: dict) -> None:
        self._step("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._step("finish")
        self.ended += 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    return sys.modules["wandb"]


def used(run: Path) -> None:
    """A run of two lines and a picture."""
    live = open_tracker(run, "reflow", "", {"seed": 0})
    with Metrics(run / "stage-4", 0, tensorboard=False, offset=100, tracker=live) as metrics:
        metrics.write(1, {"loss": 2.0})
        metrics.picture(2, PICTURE)
        metrics.write(2, {"loss": 1.0})
    live.close()


def test_numbers_pictures_and_config_go_to_one_run_that_is_resumed(tmp_path, library):
    used(tmp_path / "mine")
    used(tmp_path / "mine")
    first, second = library.begun
    assert first["id"] == second["id"] == read_json(tmp_path / "mine" / "wandb.json")["id"]
    assert (first["project"], first["name"], first["resume"], first["config"]) == ("reflow", "mine", "allow", {"seed": 0})
    once = [{"loss": 2.0, "step": 101}, {"samples": ("image", (2, 4, 3)), "step": 102}, {"loss": 1.0, "step": 102}]
    assert library.logged == once * 2 and library.ended == 2


def test_a_run_that_does_not_ask_for_it_never_imports_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert open_tracker(tmp_path, "", "", {}) is NOWHERE and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["import", "init", "log", "finish"])
def test_whatever_fails_is_one_line_without_a_key_and_the_run_goes_on(tmp_path, monkeypatch, caplog, fails):
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "import" else Wandb(fails))
    used(tmp_path)
    assert (tmp_path / "stage-4" / "metrics.jsonl").read_text().count("\n") == 2
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "wandb is not used" in record.getMessage() and "--config.wandb.project=" in record.getMessage()
    assert KEY not in caplog.text and "\n" not in record.getMessage()


def test_one_that_hangs_is_left_behind(tmp_path, library, monkeypatch, caplog):
    monkeypatch.setattr(tracker, "SECONDS", 0.05)
    never = threading.Event()
    monkeypatch.setattr(library, "init", lambda **options: never.wait())
    used(tmp_path)
    never.set()
    assert "wandb is not used (TimeoutError)" in caplog.text


def test_a_damaged_id_is_made_anew(tmp_path, library):
    (tmp_path / "wandb.json").write_text('{"id": "../x"}')
    used(tmp_path)
    assert tracker.ID.fullmatch(library.begun[0]["id"])
