"""R11: an hour of training with a save every 10 s: memory, descriptors and threads stay, nothing half-written is left."""

import signal
import statistics
import time
from pathlib import Path

import pytest
import tiny
from reliability import PATIENCE, command, drafts, finish, number, report, running, usage

from proreflow_jax import STOPPED

pytestmark = pytest.mark.reliability
SECONDS, BETWEEN = number("LOAD_SECONDS", 3600), number("LOAD_SAVE_SECONDS", 10)
NEVER = 2**31 - 1
GROWTH = 0.05


def rate(folder: Path) -> float:
    """Steps a second of the tiny training, saves aside."""
    fields = {"name": "rate", "train__steps": NEVER, "checkpoint__every": 200}
    finish(folder, "make_pairs", "--stage=4", **fields)
    folder_of = lambda: [path for path in (folder / "runs/rate/stage-4/checkpoints").glob("*") if path.name.isdigit()]
    with running(**command(folder, "train", "--stage=4", **fields)) as process:
        deadline, first = time.monotonic() + PATIENCE, None
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            done = max([int(path.name) for path in folder_of()], default=0)
            if done and first is None:
                first, began = done, time.monotonic()
            if first is not None and time.monotonic() - began > 20:
                return (done - first) / (time.monotonic() - began)
            time.sleep(0.05)
    raise TimeoutError


def test_an_hour_of_saves_costs_no_memory_and_no_descriptors(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    every = max(1, round(rate(tmp_path) * BETWEEN))
    fields = {"name": "long", "train__steps": NEVER, "checkpoint__every": every, "train__log_every": max(1, every // 10)}
    finish(tmp_path, "make_pairs", "--stage=4", **fields)
    samples, steps = [], set()
    checkpoints = tmp_path / "runs" / "long" / "stage-4" / "checkpoints"
    with running(**command(tmp_path, "train", "--stage=4", **fields)) as process:
        while not any(path.name.isdigit() for path in checkpoints.glob("*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            assert process.poll() is None, process.stderr.read()
            steps |= {int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()}
            samples.append(usage(process.pid) | {"saves": max(steps) // every})
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == STOPPED, errors
    tenth = len(samples) // 10
    early, late = samples[tenth : 3 * tenth], samples[-2 * tenth :]
    middle = {name: [statistics.median(s[name] for s in part) for part in (early, late)] for name in samples[0]}
    series = [statistics.median(s["memory"] for s in samples[k * tenth : (k + 1) * tenth]) for k in range(10)]
    growth = middle["memory"][1] / middle["memory"][0] - 1
    left = drafts(tmp_path / "runs" / "long")
    report(
        "R11",
        seconds=SECONDS,
        saves=len(steps),
        last_step=max(steps),
        growth=f"{growth:.2%}",
        medians=middle,
        memory_kib=series,
        left=left,
    )
    assert left == [] and len(steps) > SECONDS / BETWEEN / 3
    assert growth < GROWTH, middle
    assert middle["descriptors"][1] <= middle["descriptors"][0] and middle["threads"][1] <= middle["threads"][0], middle
