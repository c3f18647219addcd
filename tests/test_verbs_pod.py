"""The verbs as several processes of one job, by launch/local_pod.sh: the same run as one process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from verb import ROOT, environment, tiny_flags

DIGITS = {"data__kind": "digits", "data__caption_key": "caption", "evaluate__study__examples": 4}


def run_pod(verb: str, flags: list[str], processes: int, devices: int, folder: Path) -> subprocess.CompletedProcess:
    """A verb as a job of so many processes; of one, without the script."""
    words = [sys.executable, "-m", f"proreflow_jax.{verb}", *flags]
    kept = environment(folder / f"programs-{processes}", devices)
    if processes > 1:
        kept["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
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
        losses = [json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in runs.values()]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), stage
    tables = [json.loads((run / "table.json").read_text())["rows"] for run in runs.values()]
    for one, other in zip(*tables, strict=True):
        assert other["distance"] == pytest.approx(one["distance"], rel=1e-3, abs=1e-6)
        assert other["frechet"] == pytest.approx(one["frechet"], rel=1e-3)


def test_what_runs_in_one_process_is_refused_in_a_pod(tmp_path: Path) -> None:
    ended = run_pod("merge", ["--delta=none", "--out=none"], 2, 1, tmp_path)
    assert ended.returncode == 2
    logs = [(tmp_path / "logs" / f"process-{k}.log").read_text() for k in range(2)]
    assert all("merge runs in one process and this job has 2: run it on one host" in log for log in logs)
