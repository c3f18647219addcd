"""Only what was read and is wrong is damaged: a disk that fails ends the run, and nothing is passed over or deleted."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
AGAIN = "could not be read: .*run the same command again"


def state(step: int) -> dict:
    return {"large": jnp.full((300, 300), float(step)) + jnp.arange(300.0), "small": jnp.ones(3, jnp.bfloat16) * step}


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"position": step})
    return tmp_path / "c"


def check_whole(checkpoints: Checkpoints, folder: Path) -> None:
    """The same object goes on once the disk is back; its next save deletes the oldest step, not the newest."""
    step, values, _ = checkpoints.restore(None, state(0))
    assert step == 2 and np.array_equal(np.asarray(values["large"]), np.asarray(state(2)["large"]))
    checkpoints.save(3, state(3), {})
    checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["2", "3"]


FILES = ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_not_damaged(two_steps, name):
    """Reading /proc/self/mem from its start is an input/output error, EIO."""
    with Checkpoints(two_steps) as checkpoints:
        paths = [path for path in (two_steps / "2").glob(name) if path.is_file()]
        assert paths
        for path in paths:
            path.rename(two_steps.parent / path.name)
            path.symlink_to("/proc/self/mem")
        with pytest.raises(RuntimeError, match=rf"step 2 in {two_steps} {AGAIN}"):
            checkpoints.restore(None, state(0))
        for path in paths:
            (two_steps.parent / path.name).replace(path)
        check_whole(checkpoints, two_steps)


DESCRIPTORS = """
import os, resource, sys
import jax.numpy as jnp
from proreflow_jax.runtime.checkpoint import Checkpoints

folder, state = sys.argv[1], {"x": jnp.arange(9.0)}
with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for work in (lambda: checkpoints.restore(None, state), lambda: Checkpoints(folder, read_only=True).latest()):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limits[1]))
        try:
            said = f"took {work()}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        print(said.replace(chr(10), " "))
    print(checkpoints.restore(None, state).step)
"""


def test_a_process_without_file_descriptors_left_says_so(tmp_path):
    """No step in sight is not an empty folder either: that run would begin again, and its saves delete what is there."""
    words = [sys.executable, "-c", DESCRIPTORS, tmp_path / "c"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    restored, opened, later = done.stdout.splitlines()
    for said in (restored, opened):
        assert said.startswith("RunFailed: ") and "could not be read" in said and "Too many open files" in said
    assert later == "2"


def wrapped(error: Exception) -> Exception:
    """As a library wraps an error in one of its own."""
    outer = KeyError("state")
    outer.__cause__ = Exception("Encountered error while reading array index")
    outer.__cause__.__context__ = error
    return outer


def store_error(text: str, number: int) -> ValueError:
    """As tensorstore says what the system said."""
    where = f'Error opening "zarr" driver: Error reading local file "/c/2/state/d/0": {os.strerror(number)}'
    return ValueError(f"{text}: {where} [os_error_code='{number}']")


SYSTEM = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.ENFILE, "Too many open files in system"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError("timed out"),
    wrapped(OSError(errno.ETIMEDOUT, "Connection timed out")),
    wrapped(store_error("UNKNOWN", errno.EIO)),
    store_error("UNKNOWN", errno.EIO),
    store_error("ABORTED", errno.ESTALE),
    store_error("RESOURCE_EXHAUSTED", errno.EMFILE),
    ValueError("UNAVAILABLE: CURL error"),
    ExceptionGroup("several leaves", [ValueError("x"), OSError(errno.EREMOTEIO, "Remote I/O error")]),
]


@pytest.mark.parametrize("error", SYSTEM, ids=repr)
def test_the_system_s_errors_are_no_damage_however_they_are_wrapped(two_steps, monkeypatch, error):
    with Checkpoints(two_steps) as checkpoints:
        read = checkpoints._read_leaves

        def fails(step: int, *more: object) -> dict:
            if step == 2:
                raise error
            return read(step, *more)

        monkeypatch.setattr(checkpoints, "_read_leaves", fails)
        with pytest.raises(RuntimeError, match=f"step 2 .*{AGAIN}"):
            checkpoints.restore(None, state(0))
        monkeypatch.undo()
        check_whole(checkpoints, two_steps)


BYTES = [
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    wrapped(NotADirectoryError(errno.ENOTDIR, "Not a directory")),
    store_error("NOT_FOUND", errno.ENOENT),
    ValueError("NOT_FOUND: chunk"),
    ValueError("DATA_LOSS: checksum"),
    ValueError("OUT_OF_RANGE: requested byte range [0, 290) is not valid"),
    ValueError("FAILED_PRECONDITION: Invalid blosc-compressed data; at byte 0"),
    KeyError("seal"),
]


@pytest.mark.parametrize("error", BYTES, ids=repr)
def test_bytes_that_are_wrong_or_not_there_are_damage(two_steps, monkeypatch, error):
    with Checkpoints(two_steps) as checkpoints:
        read = checkpoints._read_leaves

        def fails(step: int, *more: object) -> dict:
            if step == 2:
                raise error
            return read(step, *more)

        monkeypatch.setattr(checkpoints, "_read_leaves", fails)
        assert checkpoints.restore(None, state(0)).step == 1


def test_a_mount_that_was_away_for_a_moment_costs_no_step(two_steps, monkeypatch):
    """A library that asks whether a file exists is told no by a mount that fails; when the files are looked at it is back."""
    with Checkpoints(two_steps) as checkpoints:
        read, calls = checkpoints._read_leaves, []

        def fails_once(*arguments: object) -> dict:
            calls.append(arguments)
            if len(calls) == 1:
                raise FileNotFoundError("state is not there")
            return read(*arguments)

        monkeypatch.setattr(checkpoints, "_read_leaves", fails_once)
        assert checkpoints.restore(None, state(0)).step == 2


def test_a_committed_step_that_orbax_does_not_list_is_not_passed_over(two_steps, monkeypatch):
    import orbax.checkpoint as ocp

    monkeypatch.setattr(ocp.CheckpointManager, "all_steps", lambda *_: [1])
    with pytest.raises(RuntimeError, match=f"{two_steps} could not be read: .*step 2 is there"):
        Checkpoints(two_steps, read_only=True)


def test_a_folder_that_the_system_cannot_look_at_is_not_missing(two_steps, monkeypatch):
    """As an NFS server's restart leaves it."""
    stat = os.stat

    def stale(path: object, *more: object, **options: object) -> os.stat_result:
        if str(path).startswith(str(two_steps)):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, *more, **options)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(RuntimeError, match=f"{two_steps} {AGAIN}"):
        Checkpoints(two_steps, read_only=True)


FAULT = """
import ctypes, errno, os, sys
from pathlib import Path
folder, environment = Path(sys.argv[1]), ctypes.CDLL(None).setenv

def set_fault(path, at="", number=0):
    for name, value in (("FAIL_PATH", path), ("FAIL_AT", at), ("FAIL_ERRNO", str(number))):
        environment(name.encode(), value.encode(), 1)

def try_faults(work, faults):
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES):
        for at, path in faults:
            try:
                set_fault(path, at, number)
                said = f"took {work()}"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            set_fault("")
            print(errno.errorcode[number], at, path, said.replace(chr(10), " "), sep="|", flush=True)
"""

CHECKPOINTS = """
import jax.numpy as jnp
from proreflow_jax.runtime.checkpoint import Checkpoints

state = {"x": jnp.arange(90000.0).reshape(300, 300)}
with Checkpoints(folder, keep=2) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, {})

def restore():
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(None, state).step

files = ("/2/meta/metadata", "/2/state/_METADATA", "/2/state/d/", "/2/state/manifest.ocdbt", "/2/")
try_faults(restore, [(at, path) for at in ("open", "read") for path in files] + [("list", str(folder))])
assert sorted(os.listdir(folder)) == ["1", "2"]
"""

RECORDS = """
import numpy as np
from proreflow_jax.data import records

plan = {"examples": 4, "shard_size": 4}
records.fix_plan(folder, plan)
records.write_shard(folder, plan, 0, ({"x": np.arange(9)} for _ in range(4)))
records.publish(folder, plan)
whole = records.PairRecords(folder)
whole[0]
try_faults(lambda: len(records.PairRecords(folder, verify=False)), [("open", ".array_record"), ("read", ".array_record")])
try_faults(lambda: whole[1], [("read", ".array_record")])
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
@pytest.mark.parametrize(("program", "count"), [(CHECKPOINTS, 44), (RECORDS, 12)], ids=["checkpoints", "records"])
def test_a_disk_that_fails_at_any_layer_is_never_taken_for_damage(tmp_path, program, count):
    """Below Python, tensorstore, ArrayRecord and orbax alike: the C library's calls fail."""
    library = tmp_path / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "failing_disk.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "FAIL_PATH": "", "FAIL_AT": ""}
    words = [sys.executable, "-c", FAULT + program, tmp_path / "c"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|", 3) for line in done.stdout.splitlines()]
    wrong = [row for row in rows if "RunFailed" not in row[3] or "could not be read" not in row[3]]
    assert not wrong, "\n".join(map(str, wrong))
    assert len(rows) == count
