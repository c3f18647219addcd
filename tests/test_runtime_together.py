"""An error on one process of a job ends all of them, with that process's line in every log."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from verb import CONFIG, ROOT

PROGRAM = """
import sys
from proreflow_jax import UserError
from proreflow_jax.run import cli
failing, kind = int(sys.argv.pop(1)), sys.argv.pop(1)

def job(config):
    import jax, numpy as np
    from proreflow_jax.runtime import processes
    processes.broadcast(np.array(1))
    if jax.process_index() == failing:
        raise {"refusal": UserError("shard 3 is damaged"), "bug": KeyError("shard 3 is damaged")}[kind]
    processes.broadcast(np.array(2))  # waits for the other
    print("went on")

cli.start(job, "A job.", "CONFIG", pod=True)
"""


@pytest.mark.parametrize(("failing", "kind", "code"), [(0, "refusal", 2), (1, "refusal", 2), (1, "bug", 1)])
def test_one_process_that_cannot_go_on_ends_all(tmp_path: Path, failing: int, kind: str, code: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    words = [sys.executable, "-c", PROGRAM.replace("CONFIG", str(CONFIG)), str(failing), kind]
    logs = [(tmp_path / f"{k}.log").open("w+") for k in range(2)]
    jobs = [
        subprocess.Popen(words, cwd=ROOT, env=os.environ | job | {"JAX_PROCESS_ID": str(k)}, stdout=logs[k], stderr=logs[k])
        for k in range(2)
    ]
    try:
        assert [job.wait(timeout=90) for job in jobs] == [code, code], [(tmp_path / f"{k}.log").read_text() for k in range(2)]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    mine, other = ((tmp_path / f"{k}.log").read_text() for k in (failing, 1 - failing))
    assert "shard 3 is damaged" in mine and ("Traceback" in mine) == (kind == "bug")
    assert f"process {failing}: shard 3 is damaged" in other and "went on" not in other
