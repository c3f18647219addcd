"""Two processes of one job: what one does for both, what both know alike, and whose rows are whose."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from proreflow_jax import STOPPED
from proreflow_jax.runtime import processes, stopping

JOB = """
import sys
from proreflow_jax.runtime import mesh, processes
mesh.initialize_distributed()
import jax, numpy as np
from pathlib import Path
from proreflow_jax import RunFailed, UserError
from proreflow_jax.runtime.processes import job_lock

folder, k = Path(sys.argv[1]), jax.process_index()
saw = []
processes.first(lambda: (folder / "written").write_text("by one"))
saw.append((folder / "written").read_text() == "by one")
saw.append(processes.first_says(lambda: k == 0))
saw.append(int(processes.broadcast(np.array(7 + k))) == 7)
saw.append(processes.first_reads(lambda: {"of": "ä" * (k + 3)}) == {"of": "äää"})

def raised(work, kind):
    try:
        processes.first(work)
    except kind as error:
        return str(error)

def refuse():
    raise UserError("no such flag")

def fail():
    raise OSError("disk full")

def bug():
    raise ValueError("shapes differ")

elsewhere = "process 0 could not go on and says why"
saw.append(raised(refuse, UserError) == ("no such flag" if k == 0 else elsewhere))
saw.append(raised(fail, OSError if k == 0 else RunFailed) == ("disk full" if k == 0 else elsewhere))
saw.append(raised(bug, ValueError if k == 0 else RunFailed) == ("shapes differ" if k == 0 else elsewhere))

from etils import epath
from proreflow_jax.runtime.damage import everywhere

def read(failing, error):
    def work():
        if k == failing:
            raise error
        return "values"
    try:
        return everywhere(work, epath.Path(folder), "the checkpoint")
    except RunFailed as failed:
        return str(failed)

saw.append("the checkpoint could not be read" in read(1, OSError(5, "Input/output error")))
saw.append(read(1, KeyError("seal"))[0] is None and read(2, None) == ("values", ""))

crossed = [jax.devices()[i] for i in (0, 2, 1, 3)]  # a mesh need not lie process by process
for shape, devices in (((4, 1, 1), None), ((1, 4, 1), None), ((2, 1, 2), None), ((1, 2, 2), None), ((2, 2, 1), crossed)):
    machine = mesh.make_mesh(*shape, devices=devices)
    whole = np.arange(24).reshape(8, 3)
    own = mesh.own_rows(machine, 8)
    placed = mesh.put_batch(machine, {"x": whole[own]}, 8)["x"]
    saw.append(np.array_equal(processes.host_arrays(placed), whole))
    saw.append(len(own) == 4)

with job_lock(folder / "run"):
    saw.append((folder / "run" / ".lock").exists())
np.save(folder / f"{k}.npy", np.array(saw))
"""


def run_pod(count: int, devices: int, words: list[str], timeout: int = 120) -> list[int]:
    """Exit codes of `count` processes of one job on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    jobs = [subprocess.Popen(words, env=os.environ | job | {"JAX_PROCESS_ID": str(k)}) for k in range(count)]
    try:
        return [job.wait(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def test_two_processes_do_once_what_is_done_once_and_hold_their_own_rows(tmp_path: Path) -> None:
    assert run_pod(2, 2, [sys.executable, "-c", JOB, str(tmp_path)]) == [0, 0]
    for k in range(2):
        assert np.load(tmp_path / f"{k}.npy").all(), k


STOPS = """
import os, signal, sys, time
from proreflow_jax.runtime import mesh, processes, stopping
mesh.initialize_distributed()
import jax
import numpy as np

for step in range(400):
    stopping.stop_if_asked()
    if step == 3 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    processes.broadcast(np.array(step))
    time.sleep(0.05)
"""


def test_sigterm_to_one_process_stops_all_with_the_code_of_a_stopped_run(tmp_path: Path) -> None:
    assert run_pod(2, 1, [sys.executable, "-c", STOPS]) == [STOPPED, STOPPED]


def test_one_process_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "multihost_utils", None)
    monkeypatch.setattr(stopping, "multihost_utils", None)
    assert processes.leads() and processes.first(lambda: 3) == 3 and processes.first_reads(lambda: {"a": [1]}) == {"a": [1]}
    stopping.stop_if_asked()
    assert processes.first_says(lambda: True) and processes.broadcast(np.array(4)) == 4
    np.testing.assert_array_equal(processes.host_arrays({"x": jax.numpy.arange(3)})["x"], np.arange(3))
    with pytest.raises(KeyError):
        processes.first(lambda: {}["x"])


def test_what_the_first_does_may_ask_again(monkeypatch):
    """The others do not ask within its work: whatever is sent there would be taken for something else."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda value: sent.append(value.tolist()) or value)

    def work() -> str:
        assert processes.first_says(lambda: True) and processes.first(lambda: 7) == 7
        return processes.first_reads(lambda: {"inner": 1})["inner"]

    assert processes.first(work) == 1 and sent == [processes.FINE]
    with pytest.raises(ZeroDivisionError):
        processes.first(lambda: 1 / 0)
    assert sent == [processes.FINE, processes.BROKEN]
    assert processes.first_says(lambda: False) is False and len(sent) == 4  # and it is heard again
