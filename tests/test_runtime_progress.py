"""Progress: a bar on a terminal, plain lines elsewhere, and a clock that starts after the first item, which compiles."""

import io
import logging
import sys

import pytest

from proreflow_jax.runtime import progress
from proreflow_jax.runtime.progress import Progress, duration


class Clock:
    """Stands for the time module: `now` is what a test says."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def no_terminal(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_the_clock_starts_after_the_first_item(clock, no_terminal):
    with Progress("stage 8, training", 500, "step", 100) as steps:
        clock.now = 65.0  # compiles
        steps.advance()
        assert steps.opening == 65.0 and steps.seconds_each() is None
        assert no_terminal.messages[0] == "stage 8, training: the first step was done after 0:01:05, compilation included"
        for _ in range(10):
            clock.now += 2.0
            steps.advance(note="loss 0.5")
        assert steps.seconds_each() == 2.0
        assert steps.line("loss 0.5") == "stage 8, training: 111 of 500 steps, loss 0.5, 0.5 steps/s, 0:12:58 left"


def test_items_of_a_batch_count_together(clock, no_terminal):
    with Progress("pairs", 96, "pair") as pairs:
        for at in (30.0, 34.0, 38.0):
            clock.now = at
            pairs.advance(32)
        assert pairs.seconds_each() == 8.0 / 64 and pairs.opening == 30.0


def test_without_a_terminal_a_plain_line_comes_now_and_then_and_at_the_end(clock, no_terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("drawing", 10, "step", more=lambda: "; 0:01:00 left in all") as steps:
        for _ in range(10):
            clock.now += 8.0
            steps.advance()
    assert sys.stderr.getvalue() == ""
    assert [text.split(",")[0] for text in no_terminal.messages] == [
        "drawing: the first step was done after 0:00:08",
        "drawing: 4 of 10 steps",
        "drawing: 8 of 10 steps",
        "drawing: 10 of 10 steps",
    ]
    assert no_terminal.messages[-1].endswith("steps/s; 0:01:00 left in all")


def test_on_a_terminal_a_bar_starts_at_the_resumed_item_and_writes_no_lines(no_terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("stage 8, training", 10, "step", 4, bar=True) as steps:
        steps.advance()
        steps.advance(5, "loss 0.5")
    text = sys.stderr.getvalue()
    assert "4/10" in text and "10/10" in text and "loss 0.5" in text and no_terminal.messages == []


def test_times_are_hours_minutes_seconds():
    assert [duration(s) for s in (0, 65.9, 3600 * 30, float("inf"))] == ["0:00:00", "0:01:05", "30:00:00", "unknown time"]
