"""Faults from outside: kill -9 while a save is being written, and a disk that is full."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from proreflow_jax.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 20
SIZE = 1 << 18

WORKER = """
import resource, signal, sys
import jax, jax.numpy as jnp
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.processes import job_lock

folder, steps, limit, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

@jax.jit
def advance(state):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), state["w"].shape)
    return {"step": state["step"] + 1, "w": jnp.sin(state["w"]) + noise}

state = {"step": jnp.int32(0), "w": jnp.zeros(size)}
with job_lock(folder), Checkpoints(folder + "/checkpoints", keep=2, every=1) as checkpoints:
    if checkpoints.latest() is not None:
        state = checkpoints.restore(None, state).state
    print("start", int(state["step"]), flush=True)
    for step in range(int(state["step"]) + 1, steps + 1):
        state = advance(state)
        checkpoints.check()
        if checkpoints.due(step):
            checkpoints.save(step, state, {"step": step})
            print("saving", step, flush=True)
    checkpoints.finish(steps)
print("done", flush=True)
"""


def worker(folder: Path, steps: int = STEPS, limit: int = 0, size: int = SIZE) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WORKER, str(folder), str(steps), str(limit), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def final(folder: Path, step: int) -> np.ndarray:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=here),
        "w": jax.ShapeDtypeStruct((SIZE,), np.float32, sharding=here),
    }
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return np.asarray(checkpoints.restore(step, target).state["w"])


def kill_while_saving(folder: Path, saves: int, delay: float) -> bool:
    """Run, kill -9 shortly after the `saves`-th save began; True if the kill left a half-written checkpoint."""
    with worker(folder) as process:
        for line in process.stdout:
            saves -= line.startswith("saving")
            if not saves:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, process.stderr
    return any("tmp" in path.name or not (path / "commit_success.txt").exists() for path in steps_of(folder))


def steps_of(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints").iterdir() if path.is_dir()]


def test_killed_during_saves_the_result_is_bit_equal(tmp_path: Path) -> None:
    with worker(tmp_path / "whole") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err

    halves = [kill_while_saving(tmp_path / "killed", 3 + n, 0.002 * n) for n in range(3)]
    assert sum(halves) >= 2, f"{halves}: the kills missed the saves, so this proves nothing"

    with worker(tmp_path / "killed") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert int(out.split()[1]) > 0, "the last run began from nothing"
    np.testing.assert_array_equal(final(tmp_path / "killed", STEPS), final(tmp_path / "whole", STEPS))
    assert sorted(path.name for path in steps_of(tmp_path / "killed")) == [str(STEPS - 1), str(STEPS)]


def test_a_full_disk_is_loud_and_the_step_before_survives(tmp_path: Path) -> None:
    with worker(tmp_path, steps=2) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    with worker(tmp_path, steps=4, limit=SIZE // 2) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    last = err.strip().splitlines()[-1]
    assert "RunFailed: checkpoint of step 3 was not written to" in last and str(tmp_path) in last

    before = final(tmp_path, 2)
    with worker(tmp_path, steps=4) as process:  # space was freed: the same command works
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("start 2") and out.endswith("done\n")
    assert not np.array_equal(before, final(tmp_path, 4))


def test_a_failed_save_is_seen_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": jax.numpy.ones(1000)}
    with pytest.raises(RuntimeError, match=r"step 2 was not written to .*2: .*no room"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()

            background = checkpoints._manager._checkpointer.wait_until_finished

            def full() -> None:
                background()
                if threading.current_thread() is not threading.main_thread():
                    raise OSError("no room")

            monkeypatch.setattr(checkpoints._manager._checkpointer, "wait_until_finished", full)
            checkpoints.save(2, state, {})
            for _ in range(200):
                checkpoints.check()
                time.sleep(0.05)
            raise AssertionError("ten seconds without a word")
