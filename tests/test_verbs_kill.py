"""A run that is killed wherever it stands and started again by the same command ends bit-equal to one that never was.

That one is the session's finished run, of another process.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from verb import ROOT, environment, tiny_flags

from proreflow_jax import STOPPED
from proreflow_jax.storage.atomic import read_json

PATIENCE = 900  # seconds, for machines that do other things too
SHARD, SAVING = "stage-4/pairs/pairs-00000-*.array_record", "stage-4/checkpoints/2*"  # appear in the run's folder
MIDDLE, BETWEEN = "stage-4/checkpoints/4*", "stage-4/DONE.json"  # each new: what is there already strikes at once
LATER, EXPORTING = "stage-2/checkpoints/4*", "export/.tmp.*"
KILL, INTERRUPT, ASK = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
SAID = {INTERRUPT: (130, "interrupted"), ASK: (STOPPED, "asked to stop")}  # exit code, and a word of the last line


@pytest.fixture(scope="module")
def place(finished: Path, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs of the finished run's model, with a copy of its compiled programs: a kill may leave one in half."""
    folder = tmp_path_factory.mktemp("kill")
    shutil.copytree(programs, folder / "programs")
    (folder / "prompts.at").write_text(str(finished / "prompts.txt"))
    (folder / "model").symlink_to(finished / "model")
    return folder


def command(folder: Path, name: str) -> dict:
    """Arguments of subprocess for the distillation of folder/runs/<name>."""
    return {
        "args": [sys.executable, "-m", "proreflow_jax.distill", *tiny_flags(folder, folder / "model", name=name)],
        "env": environment(folder / "programs"),
        "cwd": ROOT,
        "text": True,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
    }


def struck(folder: Path, name: str, point: str, what: signal.Signals) -> tuple[int, str]:
    """Starts the run, sends it a signal as soon as `point` appears, and returns (exit code, stderr)."""
    run = folder / "runs" / name
    with subprocess.Popen(**command(folder, name)) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not any(run.glob(point)):
                assert process.poll() is None, f"ended before {point} appeared: {process.stderr.read()}"
                assert time.monotonic() < deadline, f"{point} never appeared"
                time.sleep(0.001)
            process.send_signal(what)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, errors


def results(run: Path) -> dict:
    """What must be bit-equal: the pairs' files, every stage's DONE.json, the losses, the exported weights."""
    hashed = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [json.loads(line) for path in sorted(run.glob("stage-*/metrics.jsonl")) for line in path.read_text().splitlines()]
    return {
        "pairs": {str(p.relative_to(run)): hashed(p) for p in sorted(run.glob("stage-*/pairs/*.array_record"))},
        "done": {n: read_json(run / f"stage-{n}" / "DONE.json") for n in (4, 2)},
        "losses": [(line["step"], line["loss"]) for line in lines],
        "exports": {str(p.relative_to(run)): hashed(p) for p in sorted(run.glob("export/*/unet/*.safetensors"))},
    }


def finish(folder: Path, name: str) -> dict:
    ended = subprocess.run(**command(folder, name), timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    run = folder / "runs" / name
    assert [str(path) for path in run.rglob("*") if ".tmp" in path.name] == []  # nothing half-written is left
    return results(run)


FEW = ((SHARD, KILL), (SAVING, KILL), (LATER, INTERRUPT))
MANY = ((SHARD, KILL), (SAVING, KILL), (MIDDLE, ASK), (BETWEEN, KILL), (LATER, KILL), (EXPORTING, KILL))


@pytest.mark.parametrize("strikes", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=len)
def test_killed_and_interrupted_in_its_phases_a_run_ends_bit_equal(finished, place, strikes):
    name = f"struck-{len(strikes)}"
    for point, what in strikes:
        code, errors = struck(place, name, point, what)
        if what is KILL:
            assert code == -KILL, f"not killed at {point}"
        else:
            assert code == SAID[what][0], errors
            last = errors.splitlines()[-1]
            assert SAID[what][1] in last and "run the same command again" in last and "Traceback" not in errors
    whole = results(finished / "runs" / "tiny")
    assert len(whole["pairs"]) == 4 and len(whole["exports"]) == 2 and len(whole["losses"]) == 6
    assert finish(place, name) == whole
