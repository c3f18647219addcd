"""The loop: numbers in order, checkpoints when due, a clean stop at a signal, and nothing bad ever saved."""

import json
import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax import STOPPED
from proreflow_jax.reflow import loop
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import Metrics


class Recorder(Metrics, Checkpoints):
    """Stands for both, by its type only, and writes down what is asked of it, in order."""

    def __init__(self, every=3):
        self.every, self.events = every, []

    def write(self, step, values):
        self.events.append(("metrics", step, values["loss"]))

    def publish(self):
        self.events.append(("publish",))

    def due(self, step):
        return step % self.every == 0

    def save(self, step, state, meta):
        self.events.append(("save", step, int(state), meta))

    def check(self):
        self.events.append(("check",))

    def wait(self):
        self.events.append(("wait",))

    def of(self, kind):
        return [event[1:] for event in self.events if event[0] == kind]


def count(state, batch):
    """A step that adds the batch; its loss is the number of steps done."""
    return state + 1, {"loss": jnp.float32(state + 1)}


def run(recorder, step=count, start=0, total=7, log_every=1):
    batches = ((i, np.float32(i)) for i in range(start, 100))
    options = {"metrics": recorder, "checkpoints": recorder, "log_every": log_every}
    return loop.run_loop(step, jnp.asarray(start), batches, total=total, meta=lambda done: {"position": done}, **options)


def test_every_number_is_written_once_in_order_with_its_own_step():
    recorder = Recorder()
    assert int(run(recorder)) == 7
    assert recorder.of("metrics") == [(n, float(n)) for n in range(1, 8)]


def test_checkpoints_hold_the_state_of_their_step_and_the_last_is_saved():
    recorder = Recorder()
    run(recorder)
    assert recorder.of("save") == [(n, n, {"position": n}) for n in (3, 6, 7)]
    assert recorder.events[-1] == ("wait",)
    assert len(recorder.of("check")) == 7


def test_a_checkpoints_numbers_are_written_before_it_is_saved():
    recorder = Recorder()
    run(recorder)
    kinds = [event[:2] for event in recorder.events if event[0] in ("metrics", "publish", "save")]
    for step in (3, 6, 7):
        saved = kinds.index(("save", step))
        assert kinds[saved - 1] == ("publish",) and kinds.index(("metrics", step)) < saved - 1


def test_a_resumed_run_goes_on_where_it_was():
    recorder = Recorder()
    assert int(run(recorder, start=4)) == 7
    assert recorder.of("metrics") == [(5, 5.0), (6, 6.0), (7, 7.0)]
    assert [row[0] for row in recorder.of("save")] == [6, 7]


def test_lines_come_every_so_often_and_at_the_end():
    recorder = Recorder()
    run(recorder, log_every=3)
    assert [row[0] for row in recorder.of("metrics")] == [3, 6, 7]


class Late:
    """A number that the device is slow to give."""

    def __array__(self, *_: object) -> np.ndarray:
        time.sleep(0.03)
        return np.float32(1)


def test_every_line_says_how_long_the_host_waited_for_what():
    class Lines(Recorder):
        def write(self, step, values):
            self.events.append(("waits", values[loop.WHOLE], values[loop.INPUT], values[loop.DEVICE]))

    def batches():
        for i in range(8):
            time.sleep(0.02 if i < 4 else 0)
            yield i, i

    recorder = Lines(every=4)
    options = {"metrics": recorder, "checkpoints": recorder, "log_every": 4, "meta": lambda done: {}}
    loop.run_loop(lambda state, batch: (state, {"loss": Late()}), 0, batches(), total=8, **options)
    first, second = recorder.of("waits")
    assert first[1] >= 0.02 and first[2] >= 0.03 and sum(first[1:]) <= first[0]
    assert second[1] < 0.02 and second[2] >= 0.03  # each line has its own steps alone


def test_a_step_is_sent_before_the_numbers_of_the_one_before_are_read():
    recorder = Recorder(every=100)

    def watched(state, batch):
        recorder.events.append(("sent", int(batch) + 1))
        return count(state, batch)

    run(recorder, watched, total=3)
    assert [event[:2] for event in recorder.events if event[0] in ("sent", "metrics")] == [
        ("sent", 1), ("sent", 2), ("metrics", 1), ("sent", 3), ("metrics", 2), ("metrics", 3)
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [1, 3, 4, 7])
def test_a_number_that_is_none_stops_the_run_names_step_and_window_and_saves_nothing_after(bad):
    recorder = Recorder()

    def breaks(state, batch):
        done = int(state) + 1
        sums = jnp.array([1.0, 0.0, jnp.nan if done >= bad else 2.0])
        return state + 1, {"loss": jnp.sum(sums), "window": {"loss": sums, "count": jnp.array([1.0, 0.0, 1.0])}}

    with pytest.raises(FloatingPointError, match=f"step {bad} in window 2: .*nan") as caught:
        run(recorder, breaks, log_every=100)
    assert "\n" not in str(caught.value)
    assert all(row[0] < bad for row in recorder.of("save"))


def test_sigterm_saves_the_step_and_ends_with_the_code_of_a_stopped_run(tmp_path):
    """With real checkpoints; the next run reads what is there."""

    def told(state, batch):
        if batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": state["x"] + 1}, {"loss": jnp.float32(1)}

    recorder, before = Recorder(), signal.getsignal(signal.SIGTERM)
    state, batches = {"x": jnp.zeros(())}, ((i, i) for i in range(100))
    meta = lambda done: {"seed": 0, "position": done, "lineage": {}}
    with Checkpoints(tmp_path / "c", every=50) as checkpoints, pytest.raises(SystemExit) as left:
        loop.run_loop(told, state, batches, total=90, metrics=recorder, checkpoints=checkpoints, log_every=1, meta=meta)
    assert left.value.code == STOPPED == os.EX_TEMPFAIL
    assert signal.getsignal(signal.SIGTERM) is before
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.latest() == 5
        assert float(checkpoints.restore(None, {"x": jnp.zeros(())}).state["x"]) == 5
    assert [row[0] for row in recorder.of("metrics")] == [1, 2, 3, 4, 5]


def test_sigterm_in_the_last_step_ends_the_run_as_done():
    recorder = Recorder()

    def told(state, batch):
        if batch == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(state, batch)

    assert int(run(recorder, told)) == 7
    assert [row[0] for row in recorder.of("save")] == [3, 6, 7]


def test_the_signal_is_given_back_when_a_step_fails():
    def fails(state, batch):
        raise RuntimeError("no device")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="no device"):
        run(Recorder(), fails)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_runs_without_the_signal():
    recorder = Recorder()
    worker = threading.Thread(target=run, args=(recorder,))
    worker.start()
    worker.join(60)
    assert len(recorder.of("metrics")) == 7


def test_host_metrics_are_means_of_the_windows_that_had_examples():
    sums = {"loss": jnp.array([6.0, 0.0, 5.0]), "cosine": jnp.array([1.0, 0.0, 0.5]), "count": jnp.array([3.0, 0.0, 2.0])}
    assert loop.host_metrics({"loss": jnp.float32(2.5), "window": sums}) == {
        "loss": 2.5,
        "window/0/loss": 2.0,
        "window/2/loss": 2.5,
        "window/0/cosine": pytest.approx(1 / 3),
        "window/2/cosine": 0.25,
    }
    assert loop.host_metrics({"loss": jnp.float32(1)}) == {"loss": 1.0}


def windowed(state, batch):
    """A step whose numbers tell steps apart, and whose examples fall into other windows each time."""
    done = int(state) + 1
    counts = jnp.array([done % 2, 2.0 * (done % 3)])
    return state + 1, {"loss": jnp.float32(1 / done), "window": {"loss": counts * done, "count": counts}}


class Lines(Recorder):
    """Writes down whole lines, but for their times, and what goes with a save."""

    def write(self, step, values):
        times = (loop.WHOLE, loop.INPUT, loop.DEVICE)
        self.events.append(("line", step, {name: value for name, value in values.items() if name not in times}))


def test_a_line_holds_means_over_its_steps_and_of_windows_over_their_examples():
    lines = Lines(every=100)
    run(lines, windowed, total=6, log_every=3)
    (_, first), (_, second) = lines.of("line")
    assert first["loss"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3) and second["loss"] == pytest.approx(
        (1 / 4 + 1 / 5 + 1 / 6) / 3
    )
    assert first["window/0/loss"] == 2.0 and first["window/1/loss"] == pytest.approx((2 * 1 + 4 * 2) / 6)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_run_that_goes_on_between_two_lines_writes_the_lines_of_one_that_never_stopped(stop):
    whole = Lines(every=1)
    run(whole, windowed, total=9, log_every=4)
    meta = json.loads(json.dumps(next(meta for step, _, meta in whole.of("save") if step == stop)))  # as a checkpoint keeps it
    assert (loop.SUMS in meta) == (stop % 4 != 0)
    again = Lines(every=1)
    batches = ((i, np.float32(i)) for i in range(stop, 100))
    options = {"metrics": again, "checkpoints": again, "log_every": 4, "sums": meta.get(loop.SUMS)}
    loop.run_loop(windowed, jnp.asarray(stop), batches, total=9, meta=lambda done: {}, **options)
    assert again.of("line") == [line for line in whole.of("line") if line[0] > stop]


def test_onlookers_are_told_of_every_step_and_see_the_state_before_its_planned_save():
    recorder = Recorder(every=3)
    note = lambda kind: lambda done, *rest: recorder.events.append((kind, done, *map(int, rest)))
    onlookers = loop.Onlookers(lambda done: {}, lambda done, values: note("stepped")(done), note("pictured"), note("saved"))
    batches = ((i, np.float32(i)) for i in range(100))
    options = {"metrics": recorder, "checkpoints": recorder, "log_every": 1, "onlookers": onlookers}
    loop.run_loop(count, jnp.asarray(0), batches, total=7, meta=lambda done: {}, **options)
    assert recorder.of("stepped") == [(n,) for n in range(1, 8)]
    told = [event[:2] for event in recorder.events if event[0] in ("pictured", "save", "saved")]
    assert told == [(kind, n) for n in (3, 6, 7) for kind in ("pictured", "save", "saved")]
    assert recorder.of("pictured") == [(n, n) for n in (3, 6, 7)]
