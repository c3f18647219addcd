"""Metrics: a resumed run's file equals that of a run never killed, and a number that is none stops the run by name."""

import json
import math
from pathlib import Path

import pytest

from proreflow_jax.runtime import curves, metrics
from proreflow_jax.runtime.metrics import Metrics, check_finite


def run(folder: Path, first: int, last: int, **options: object) -> None:
    with Metrics(folder, start_step=first, tensorboard=False, **options) as log:
        for step in range(first + 1, last + 1):
            log.write(step, {"loss": 1 / step, "window/3/loss": float(step)})


def test_one_object_per_step(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0, "window/3/loss": 1.0},
        {"step": 2, "loss": 0.5, "window/3/loss": 2.0},
    ]


def test_a_resumed_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0, 10)
    run(tmp_path / "killed", 0, 7)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the kill
    run(tmp_path / "killed", 4, 10)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_dropped_even_at_the_last_step(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2\xff')
    metrics.keep_until(tmp_path / "metrics.jsonl", 3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_lines_survive_a_failing_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Metrics(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"loss": 2.0})
        raise RuntimeError("stop")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_every_line_is_json_even_if_a_number_is_none(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": "nan", "norm": "inf"}


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, tensorboard=True) as log:
        log.write(1, {"loss": 2.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purged = []
    real = curves._summary_writer()
    writer = lambda folder, purge_step: purged.append(purge_step) or real(folder)
    monkeypatch.setattr(curves, "_summary_writer", lambda: writer)
    with Metrics(tmp_path, 4):
        pass
    assert purged == [5]


def test_finite_numbers_pass() -> None:
    check_finite(1, {"loss": 0.0, "window/3/loss": -1e30})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_names_step_and_window(value: float) -> None:
    numbers = {"loss": value, "window/3/loss": value, "window/0/loss": 1.0, "window/7/cosine": value}
    with pytest.raises(FloatingPointError) as error:
        check_finite(41, numbers)
    text = str(error.value)
    assert text.startswith("step 41 in window 3, 7: ")
    assert "window/3/loss=" in text and "window/0" not in text and "\n" not in text
