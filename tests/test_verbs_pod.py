"""The verbs as several processes of one job, by launch/local_pod.sh: bit for bit the run that one process makes.

Of one process with as many devices: another number of devices adds up gradients in other groups.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from verb import ROOT, environment, tiny_flags

from proreflow_jax.storage.atomic import read_json

DIGITS = {"data__kind": "digits", "data__caption_key": "caption", "evaluate__study__examples": 4}


def run_pod(verb: str, flags: list[str], processes: int, devices: int, folder: Path) -> subprocess.CompletedProcess:
    """A verb as a job of so many processes; of one, without the script."""
    words = [sys.executable, "-m", f"proreflow_jax.{verb}", *flags]
    kept = environment(folder / f"programs-{processes}", devices)
    if processes > 1:
        kept["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", kept["XLA_FLAGS"])  # the script's to say
        pod = ["launch/local_pod.sh", "-n", str(processes), "-d", str(devices), "--logs", str(folder / "logs"), "--"]
        words = [*pod, *words]
    return subprocess.run(words, cwd=ROOT, env=os.environ | kept, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_a_pod_makes_the_run_of_one_process(tmp_path: Path, model: Path, processes: int, devices: int) -> None:
    runs = {}
    for name, count, each in (("one", 1, 8), ("pod", processes, devices)):
        flags = tiny_flags(tmp_path, model, name=name, data__path=tmp_path / "digits", **{k: v for k, v in DIGITS.items()})
        for verb in ("distill", "evaluate"):
            ended = run_pod(verb, flags, count, each, tmp_path)
            assert ended.returncode == 0, ended.stderr
        runs[name] = tmp_path / "runs" / name
    for stage in ("stage-4", "stage-2"):
        one, pod = (run / stage for run in runs.values())
        shards = sorted(path.name for path in (one / "pairs").glob("*.array_record"))
        assert shards and all((one / "pairs" / name).read_bytes() == (pod / "pairs" / name).read_bytes() for name in shards)
        losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, pod)]
        assert len(losses[0]) == 3 and losses[0] == losses[1], stage
        assert read_json(one / "DONE.json") == read_json(pod / "DONE.json")
    for one, other in zip(*(read_json(run / "table.json")["rows"] for run in runs.values()), strict=True):
        assert other["distance"] == pytest.approx(one["distance"], rel=1e-5, abs=1e-6)
        assert other["frechet"] == pytest.approx(one["frechet"], rel=1e-5)


def test_what_runs_in_one_process_is_refused_in_a_pod(tmp_path: Path) -> None:
    ended = run_pod("merge", ["--delta=none", "--out=none"], 2, 1, tmp_path)
    assert ended.returncode == 2
    logs = [(tmp_path / "logs" / f"process-{k}.log").read_text() for k in range(2)]
    assert all("merge runs in one process and this job has 2: run it on one host" in log for log in logs)
