"""Files are whole or absent; names are safe; a run folder has one writer."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proreflow_jax.runtime import files
from proreflow_jax.runtime.processes import lock


def test_json_round_trip_is_sorted_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    files.write_json(path, {"b": 1, "a": [1.5, None, "ü"]})
    assert files.read_json(path) == {"a": [1.5, None, "ü"], "b": 1}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    files.write_json(path, 1)
    with pytest.raises(TypeError):
        files.write_json(path, {"not json": object()})

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, 2)
    assert files.read_json(path) == 1
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x'])
def test_garbage_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json is no valid JSON") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        files.read_json(tmp_path / "nowhere.json")


def test_names() -> None:
    for name in ["a", "run-8.2_x", ".hidden", "a..b"]:
        assert files.check_name(name) == name
    for name in ["", ".", "..", "a/b", "../a", "a b", "a\n", "ä", "a\0"]:
        with pytest.raises(ValueError, match="rename it"):
            files.check_name(name)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with files.atomic_folder(target) as folder:
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
    with pytest.raises(RuntimeError), files.atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "half").touch()
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == (["export"] if overwrite else [])
    assert not overwrite or os.listdir(target) == ["old"]


def test_an_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError, match="exists already.*--overwrite"), files.atomic_folder(target):
        raise AssertionError("the block must not run")
    with files.atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["export"]


HOLDER = """
import sys
from proreflow_jax.runtime.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_the_second_writer_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError) as error, lock(tmp_path / "run"):
            raise AssertionError("the block must not run")
        assert str(tmp_path / "run") in str(error.value) and f"process {holder.pid}:" in str(error.value)
        holder.kill()
    with lock(tmp_path / "run"):  # the kernel freed it
        assert int((tmp_path / "run" / ".lock").read_text()) == os.getpid()
    with lock(tmp_path / "run"):
        pass


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, ["x" * 1] * 10)
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
        files.write_json(path, ["x"] * count)


def test_what_a_killed_writer_left_is_swept_and_a_living_writers_folder_is_not(tmp_path: Path) -> None:
    code = f"""
import os, signal
from proreflow_jax.runtime.files import atomic_folder
with atomic_folder({str(tmp_path / "out")!r}) as draft:
    (draft / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with files.atomic_folder(tmp_path / "out") as first:
        assert list(tmp_path.iterdir()) == [first]
        with files.atomic_folder(tmp_path / "out"):
            assert first.is_dir()
        (tmp_path / "out").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
