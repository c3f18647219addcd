"""What else happens to runs: two jobs at once, a move, a folder that cannot be written, hang-ups, closed pipes, empty files."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
from reliability import PATIENCE, await_file, command, drafts, finish, report, running
from test_verbs_kill import results
from verb import run, tiny_flags

from proreflow_jax import STOPPED
from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.reliability
CHAIN = {"train__steps": 40, "checkpoint__every": 1, "train__log_every": 10}
LONG = {"train__steps": 100_000, "checkpoint__every": 100}
TRAINING = ("stage-4/checkpoints/3",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a run `whole` that nobody disturbed."""
    folder = tmp_path_factory.mktemp("odd")
    tiny.write_model(folder / "model")
    finish(folder, "distill", name="whole", **CHAIN)
    return folder


def whole(place: Path) -> dict:
    return results(place / "runs" / "whole")


def test_two_jobs_at_once_on_one_run(place: Path) -> None:
    with running(**command(place, "distill", name="twice", **CHAIN)) as first:
        assert await_file(place / "runs/twice", TRAINING, [first], set()), first.stderr.read()
        second = subprocess.run(**command(place, "distill", name="twice", **CHAIN), timeout=PATIENCE)
        _, errors = first.communicate(timeout=PATIENCE)
    last = second.stderr.splitlines()[-1]
    report("two jobs", codes=[first.returncode, second.returncode], second=last[:200])
    assert first.returncode == 0 and second.returncode == 2 and f"in use by process {first.pid}" in last, errors
    assert results(place / "runs" / "twice") == whole(place)


def test_two_jobs_started_together(place: Path) -> None:
    """Both begin at the same moment, on a folder that is not there yet."""
    with running(**command(place, "distill", name="race", **CHAIN)) as one:
        with running(**command(place, "distill", name="race", **CHAIN)) as other:
            ends = [process.communicate(timeout=PATIENCE)[1].splitlines()[-1] for process in (one, other)]
    codes = sorted([one.returncode, other.returncode])
    report("two jobs together", codes=codes)
    assert codes == [0, 2] and any("in use by process" in line for line in ends), ends
    assert results(place / "runs" / "race") == whole(place)


def test_a_run_moved_between_its_stages(place: Path) -> None:
    with running(**command(place, "distill", name="moved", **CHAIN)) as process:
        assert await_file(place / "runs/moved", ("stage-4/DONE.json",), [process], set())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == STOPPED
    (place / "elsewhere").mkdir()
    shutil.move(place / "runs" / "moved", place / "elsewhere" / "named-anew")
    shutil.copytree(place / "model", place / "model-elsewhere")
    again = {"root": place / "elsewhere", "name": "named-anew", "model__path": place / "model-elsewhere"}
    finish(place, "distill", **CHAIN | again)
    report("moved run", equal=results(place / "elsewhere/named-anew") == whole(place))
    assert results(place / "elsewhere/named-anew") == whole(place)


def fixed(folder: Path, on: bool) -> bool:
    """Makes a folder and all below it unchangeable, for root too, or changeable again; whether the system can."""
    ended = subprocess.run(["chattr", "-R", "+i" if on else "-i", str(folder)], capture_output=True, check=False)
    return ended.returncode == 0


@pytest.mark.parametrize("verb", ["train", "make_pairs", "export"])
def test_a_folder_that_becomes_read_only_midway(place: Path, verb: str) -> None:
    name, stage = f"fixed-{verb}", place / "runs" / f"fixed-{verb}" / "stage-4"
    fields = CHAIN | {"name": name, "pairs__examples": 16 * 60}
    if verb != "make_pairs":
        finish(place, "make_pairs", "--stage=4", **fields)
    if verb == "export":
        finish(place, "train", "--stage=4", **fields)
        (place / "exported").mkdir()
        target, point = place / "exported", ".tmp*"
        words = ("--stage=4", f"--out={target / 'x'}")
    else:
        words, target = ("--stage=4",), stage / ("checkpoints" if verb == "train" else "pairs")
        point = "3" if verb == "train" else "*.done.json"
    try:
        with running(**command(place, verb, *words, **fields)) as process:
            assert await_file(target, (point,), [process], set()), process.stderr.read()
            if not fixed(target, True):
                pytest.skip("this file system has no chattr")
            _, errors = process.communicate(timeout=PATIENCE)
    finally:
        fixed(target, False)
    last = errors.splitlines()[-1]
    report("read-only", verb=verb, code=process.returncode, said=last[:300])
    assert process.returncode == 1 and "Traceback" not in errors and str(target) in last, errors
    finish(place, verb, *words, **fields)
    assert drafts(target) == []


@pytest.mark.parametrize("reader", ["there", "gone"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["SIGHUP", "SIGTERM"])
def test_hang_ups_and_closed_pipes(place: Path, number: signal.Signals, reader: str) -> None:
    """A terminal that closes, a `tee` that was killed: the job saves, and its exit code says so."""
    name = f"{number.name}-{reader}"
    arguments = command(place, "distill", name=name, **CHAIN) | {"stdout": subprocess.PIPE}
    with running(**arguments) as process:
        assert await_file(place / "runs" / name, TRAINING, [process], set()), process.stderr.read()
        if reader == "gone":
            process.stderr.close()
            process.stdout.close()
        process.send_signal(number)
        code = process.wait(timeout=PATIENCE)
    report("hang-up", signal=number.name, reader=reader, code=code)
    assert code == STOPPED
    finish(place, "distill", name=name, **CHAIN)
    assert results(place / "runs" / name) == whole(place)


def test_a_reader_that_is_gone_does_not_stop_a_job(place: Path) -> None:
    with running(**command(place, "distill", name="deaf", **CHAIN) | {"stdout": subprocess.PIPE}) as process:
        assert await_file(place / "runs/deaf", TRAINING, [process], set())
        process.stderr.close()
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 0
    report("closed pipe", code=process.returncode)
    assert results(place / "runs" / "deaf") == whole(place)


# As a power cut leaves files whose names were synced and whose bytes were not.


def test_each_file_empty_as_after_a_power_cut(model: Path, tmp_path: Path, quick: None) -> None:
    """The same command mends, or refuses in one line; what it hands on is never another thing."""
    fields = {
        "train__steps": 4,
        "optimizer__warmup_steps": 1,
        "pairs__examples": 16,
        "stages": "(4,)",
        "export__stages": "(4,)",
    }
    assert run("distill", *tiny_flags(tmp_path, model, **fields)).code == 0
    home = tmp_path / "runs"
    shutil.copytree(home, tmp_path / "right")
    right = tmp_path / "right" / "tiny"
    files = [p.relative_to(right) for p in sorted(right.rglob("*")) if p.is_file() and p.stat().st_size and p.name != ".lock"]
    counts, wrong = {"mended": 0, "refused": 0}, []
    for file in files:
        shutil.rmtree(home)
        shutil.copytree(tmp_path / "right", home)
        os.truncate(home / "tiny" / file, 0)
        began = time.monotonic()
        try:
            ended = run("distill", *tiny_flags(tmp_path, model, **fields))
        except BaseException as error:
            wrong.append(f"{file}: {type(error).__name__}: {error!s:.300}")
            continue
        if ended.code == 2 and "Traceback" not in ended.err:
            counts["refused"] += 1
            report("empty file refused", file=file, said=ended.err.splitlines()[-1][:300])
        elif ended.code == 0 and _same(home / "tiny", right):
            counts["mended"] += 1
        else:
            wrong.append(f"{file}: code {ended.code} after {time.monotonic() - began:.0f} s: {ended.err[-300:]}")
    report("empty files", files=len(files), **counts, wrong=wrong)
    assert not wrong, "\n".join(wrong)


def _same(one: Path, other: Path) -> bool:
    weights = "export/stage-4/unet/diffusion_pytorch_model.safetensors"
    same = read_json(one / "stage-4/DONE.json") == read_json(other / "stage-4/DONE.json")
    return same and (one / weights).read_bytes() == (other / weights).read_bytes()
