"""R2, R3, R5, R8: other topologies, SIGTERM, a full disk, a process that is lost or frozen."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reliability_topology
import tiny
from reliability import PATIENCE, await_ends, await_file, command, drafts, finish, logs, number, pod, report

from proreflow_jax import STOPPED

pytestmark = pytest.mark.reliability
STEPS = {"train__steps": 10_000, "checkpoint__every": 50, "train__log_every": 50}
FIRST_SAVE = ("stage-4/checkpoints/50",)
STOP_S, LOST_S, DISK_S = number("STOP_SECONDS", 12), number("LOST_SECONDS", 15), 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the pairs of a run `pairs`."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    return folder


# R2


def topology(folder: Path, axes: tuple[int, int], processes: int, devices: int) -> list[dict]:
    """What every process of `reliability_topology` writes, on a mesh of (data, fsdp)."""
    out = folder / f"{axes[0]}-{axes[1]}-{processes}"
    out.mkdir()
    script = [sys.executable, str(Path(reliability_topology.__file__)), str(folder), ",".join(map(str, axes)), str(out)]
    with pod(folder, "train", processes=processes, devices=devices, args=script) as members:
        assert set(await_ends(members)) == {0}, logs(folder, processes)
    return [json.loads((out / f"{k}.json").read_text()) for k in range(processes)]


TOPOLOGIES = (
    ((1, 1), 1, 1),
    ((1, 4), 1, 4),
    ((1, 8), 1, 8),
    ((2, 1), 2, 1),
    ((4, 1), 4, 1),
)  # (data, fsdp), processes, devices


def test_a_checkpoint_restores_on_other_topologies(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    saved = topology(tmp_path, (2, 2), 2, 2)
    assert saved[0] == saved[1]
    for axes, processes, devices in TOPOLOGIES:
        restored = topology(tmp_path, axes, processes, devices)
        assert restored == restored[:1] * processes
        gap = abs(restored[0]["loss"] / saved[0]["loss"] - 1)
        same = {name: restored[0][name] == saved[0][name] for name in ("leaves", "order", "step")}
        report("R2", saved="2x2, 2 processes", restored=axes, processes=processes, bitwise=same, relative_loss_gap=gap)
        assert all(same.values()) and gap <= 1e-6


# R3 and R8


def signalled(folder: Path, name: str, processes: int, victims: tuple[int, ...], number_: int) -> tuple[list[int], float]:
    """Exit codes, and seconds from the signal to the last end; the job trains and has saved once."""
    finish(folder, "make_pairs", "--stage=4", name=name, **STEPS)
    with pod(folder, "train", "--stage=4", processes=processes, devices=1, name=name, **STEPS) as members:
        assert await_file(folder / "runs" / name, FIRST_SAVE, members, set()), logs(folder, processes)
        time.sleep(random.uniform(0, 0.3))
        began = time.monotonic()
        for k in victims:
            members[k].send_signal(number_)
        others = members if number_ == signal.SIGTERM else [m for k, m in enumerate(members) if k not in victims]
        codes = await_ends(others)
        return codes, time.monotonic() - began


@pytest.mark.parametrize(("processes", "victims"), [(1, (0,)), (2, (0,)), (2, (1,)), (2, (0, 1))], ids=str)
def test_sigterm_gives_one_committed_step_on_all(place: Path, processes: int, victims: tuple[int, ...]) -> None:
    name = f"stop-{processes}-{len(victims)}-{victims[0]}"
    codes, seconds = signalled(place, name, processes, victims, signal.SIGTERM)
    said = logs(place, processes)
    saved = {int(step) for text in said for step in re.findall(r"step (\d+) is saved", text)}
    newest = max(int(p.name) for p in (place / "runs" / name / "stage-4/checkpoints").iterdir() if p.name.isdigit())
    report("R3", processes=processes, signalled=victims, codes=codes, seconds=round(seconds, 1), saved=sorted(saved))
    assert codes == [STOPPED] * processes and saved == {newest} and seconds <= STOP_S, said
    assert drafts(place / "runs" / name) == []


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_others_of_a_lost_or_frozen_process_end(place: Path, victim: int, what: signal.Signals) -> None:
    codes, seconds = signalled(place, f"lost-{victim}-{what.name}", 2, (victim,), what)
    text = logs(place, 2)[1 - victim]
    report("R8", process=victim, signal=what.name, codes=codes, seconds=round(seconds, 1), said=text.splitlines()[-1][:200])
    assert 0 not in codes and seconds <= LOST_S, text


# R5

LIMITS = {"make_pairs": 50_000, "train": 20_000, "export": 20_000}


@pytest.mark.parametrize("verb", LIMITS)
def test_a_full_disk_is_loud_and_the_same_command_goes_on(place: Path, verb: str) -> None:
    name, short = f"full-{verb}", {"train__steps": 20, "checkpoint__every": 10}
    words = ("--stage=4",) + ((f"--out={place / 'exported'}",) if verb == "export" else ())
    for before in [] if verb == "make_pairs" else ["make_pairs", "train"][: 1 if verb == "train" else 2]:
        finish(place, before, "--stage=4", name=name, **short)
    limit = LIMITS[verb]
    arguments = command(place, verb, *words, name=name, **short)
    began = time.monotonic()
    ended = subprocess.run(
        **arguments, timeout=PATIENCE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    seconds, last = time.monotonic() - began, ended.stderr.splitlines()[-1]
    report("R5", verb=verb, code=ended.returncode, seconds=round(seconds, 1), said=last[:300])
    assert ended.returncode == 1 and str(place) in last and "Traceback" not in ended.stderr, ended.stderr
    finish(place, verb, *words, name=name, **short)
    assert drafts(place / "runs" / name) == []
