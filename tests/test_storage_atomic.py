"""Files are whole or absent; names are safe; a run folder has one writer."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proreflow_jax.runtime.processes import job_lock
from proreflow_jax.storage import atomic, paths


def test_json_round_trip_is_sorted_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    atomic.write_json(path, {"b": 1, "a": [1.5, None, "ü"]})
    assert atomic.read_json(path) == {"a": [1.5, None, "ü"], "b": 1}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    atomic.write_json(path, {"is": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"not json": object()})

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_json(path, {"is": 2})
    assert atomic.read_json(path) == {"is": 1}
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x'])
def test_garbage_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json is no valid JSON") as error:
        atomic.read_json(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        atomic.read_json(tmp_path / "nowhere.json")


def test_names() -> None:
    for name in ["a", "run-8.2_x", ".hidden", "a..b"]:
        assert paths.check_name(name) == name
    for name in ["", ".", "..", "a/b", "../a", "a b", "a\n", "ä", "a\0"]:
        with pytest.raises(ValueError, match="rename it"):
            paths.check_name(name)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with atomic.atomic_folder(target) as folder:
        (folder / "unet").mkdir()
        assert not target.exists()
    assert (target / "unet").is_dir()
    assert os.listdir(tmp_path) == ["export"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "export"
    if overwrite:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(RuntimeError), atomic.atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "half").touch()
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == (["export"] if overwrite else [])
    assert not overwrite or os.listdir(target) == ["old"]


def test_an_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError, match="exists already"), atomic.atomic_folder(target):
        raise AssertionError("the block must not run")
    with atomic.atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["export"]


HOLDER = """
import sys
from proreflow_jax.storage.lock import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_the_second_writer_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError) as error, job_lock(tmp_path / "run"):
            raise AssertionError("the block must not run")
        assert str(tmp_path / "run") in str(error.value) and f"process {holder.pid}:" in str(error.value)
        holder.kill()
    with job_lock(tmp_path / "run"):  # the kernel freed it
        assert int((tmp_path / "run" / ".lock").read_text()) == os.getpid()
    with job_lock(tmp_path / "run"):
        pass


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomic.write_json(path, ["x" * 1] * 10)
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=_write_many, args=(str(path),))
    writer.start()
    sizes = set()
    while writer.is_alive():
        sizes.add(len(json.loads(path.read_text())))
    writer.join()
    assert writer.exitcode == 0 and sizes <= {10, 10_000}


def _write_many(path: str) -> None:
    for count in [10, 10_000] * 20:
        atomic.write_json(path, ["x"] * count)


def test_every_file_and_folder_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch) -> None:
    target, synced, rename = tmp_path / "new" / "deep" / "export", [], os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(os, "rename", lambda old, new: (synced.append("renamed"), rename(old, new)))
    with atomic.atomic_folder(target) as draft:
        (draft / "unet").mkdir()
        for name in ("reflow.json", "unet/weights"):
            (draft / name).write_text("x")
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") + 1 :]
    assert set(before) == {draft, draft / "unet", draft / "reflow.json", draft / "unet" / "weights"}
    assert after == [target.parent, target.parent.parent, tmp_path]  # the new folders' names too


DRAFTING = """
import os, signal, sys
from pathlib import Path
from proreflow_jax.storage.atomic import atomic_folder
with atomic_folder(sys.argv[1]) as draft:
    (draft / "half").write_text("x")
    print("drafting", flush=True)
    input()
"""


def start(code: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def test_a_dead_writers_draft_is_cleared_and_a_living_writers_is_not(tmp_path: Path) -> None:
    with start(DRAFTING, tmp_path / "out") as writer:
        assert writer.stdout.readline() == b"drafting\n"
        (draft,) = tmp_path.iterdir()
        with atomic.atomic_folder(tmp_path / "out"):
            assert (draft / "half").is_file()
        writer.kill()
    assert draft.is_dir()
    with atomic.atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CUT = """
import os, signal, sys
from proreflow_jax.storage.atomic import write_json
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_json(sys.argv[1], {"half": 1})
"""


def test_the_draft_of_a_small_file_does_not_outlive_the_next_start(tmp_path: Path) -> None:
    for name in ("plan.json", "other.json"):
        with start(CUT, tmp_path / name) as writer:
            writer.wait()
    assert len(list(tmp_path.glob(".tmp.*"))) == 2
    atomic.write_json(tmp_path / "plan.json", {"whole": 1})
    assert [path.name.rpartition(".tmp")[2].endswith("other.json") for path in tmp_path.glob(".tmp.*")] == [True]
    with job_lock(tmp_path):  # whoever starts the job again
        assert sorted(os.listdir(tmp_path)) == [".lock", "plan.json"]


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write_json(tmp_path / "plan.json", {})
        with job_lock(tmp_path):
            pass
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("plan.json", ".lock"), 0o666 & ~mask
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from proreflow_jax.storage.atomic import atomic_folder
rename, count = os.rename, int(sys.argv[1].rpartition("-")[2])
def counted(old, new):
    global count
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    rename(old, new)
os.rename = counted
with atomic_folder(sys.argv[1], overwrite=True) as draft:
    (draft / "new").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("renames", "left"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_between_the_renames_loses_neither_folder_for_good(tmp_path: Path, renames: int, left: str) -> None:
    target = tmp_path / f"export-{renames}"
    target.mkdir()
    (target / "old").touch()
    with start(KILLED, target) as writer:
        writer.wait(60)
    atomic.recover(target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert os.listdir(target) == [left]


def test_a_folder_that_can_not_be_put_back_stays_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "export", os.rename
    target.mkdir()
    (target / "old").touch()

    def once(old: str, new: str) -> None:
        if Path(old) != target:
            raise OSError("the disk is gone")
        rename(old, new)

    with pytest.raises(OSError), atomic.atomic_folder(target, overwrite=True):
        monkeypatch.setattr(os, "rename", once)
    monkeypatch.undo()
    atomic.recover(target)
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["export"]
