"""Small files that are whole or absent: atomic JSON, atomic folders, safe names, and the lock of a run folder.

Everything is written beside its destination and renamed, because a rename within one file system is the only write
that a kill cannot cut in half. In an object store a put is whole by itself; a folder there carries the mark WRITING while it
is filled, and the lock is a lease.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from proreflow_jax.runtime import lease, objects
from proreflow_jax.runtime.lease import Locked
from proreflow_jax.runtime.objects import ObjectPath

__all__ = ["NAME", "WRITING", "Locked", "atomic_folder", "check_name", "lock", "read_json", "write_json"]

NAME = re.compile(r"[A-Za-z0-9._-]+")
WRITING = ".writing"  # in a folder that is not finished; its writer holds it locked


def check_name(name: str) -> str:
    """The name itself, if it is safe as a file name. Raises ValueError for anything else, `.` and `..` included."""
    if not NAME.fullmatch(name) or set(name) == {"."}:
        raise ValueError(f"name {name!r} is not made of letters, digits, '.', '_' and '-' only: rename it")
    return name


def write_json(path: str | Path | ObjectPath, obj: Any) -> None:
    """Write `obj` as JSON with sorted keys; a reader sees the old file or the new one, also after a power cut."""
    path = _located(path)
    text = json.dumps(obj, indent=2, sort_keys=True) + "\n"
    if isinstance(path, ObjectPath):
        path.write_text(text)
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_json(path: str | Path | ObjectPath) -> Any:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError in one line when it is no UTF-8 JSON."""
    path = _located(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: run the job that writes it first") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no valid JSON ({reason}): delete it and run the job that writes it") from None


def _located(path: str | Path | ObjectPath) -> Path | ObjectPath:
    return objects.path(path)  # a url in a str is no local path


def atomic_folder(path: str | Path | ObjectPath, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Yield an empty local folder that becomes `path` when the block ends, and vanishes when it fails.

    With `overwrite` an existing `path` is moved aside first and removed last. What a killed process left beside `path` is
    removed. Raises ValueError if `path` exists without `overwrite`. In an object store the folder is uploaded at the end and
    carries the mark WRITING meanwhile (so the old one is gone before the new one is whole).
    """
    path = _located(path)
    remote = isinstance(path, ObjectPath)
    if path.exists() and not overwrite and not (remote and (path / WRITING).is_file()):
        raise ValueError(f"{path} exists already: choose another folder, remove it, or pass --overwrite")
    return _uploaded_folder(path) if remote else _renamed_folder(path, overwrite)


@contextmanager
def _uploaded_folder(path: ObjectPath) -> Iterator[Path]:
    """The folder's objects are those of the block, or it carries the mark WRITING, or nothing was changed."""
    with lease.hold(path), tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        (path / WRITING).write_text("")
        for old in path.objects():
            if old.name not in (WRITING, lease.LOCK):
                (path / old.name).unlink(missing_ok=True)
        for file in sorted(file for file in Path(temporary).rglob("*") if file.is_file()):
            (path / file.relative_to(temporary).as_posix()).upload(file)
        (path / WRITING).unlink()


@contextmanager
def _renamed_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    handle = os.open(temporary / WRITING, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel frees it when this process dies: so `_sweep` knows
        os.chmod(temporary, 0o755)
        yield temporary
        os.unlink(temporary / WRITING)
        if overwrite:
            _swap(temporary, path)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    _sync_folder(path.parent)


def _sweep(path: Path) -> None:
    """Remove the unfinished folders of writers that are no more."""
    for mark in path.parent.glob(f".{path.name}.*.tmp/{WRITING}"):
        handle = os.open(mark, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)
        except BlockingIOError:
            continue  # somebody is writing it
        finally:
            os.close(handle)


def lock(folder: str | Path | ObjectPath) -> AbstractContextManager[None]:
    """Hold `folder`/.lock; the kernel frees it when the process dies, so a kill leaves nothing to clean up.

    In an object store it is a lease, which runs out. Raises Locked, a ValueError naming the folder and its holder.
    """
    folder = _located(folder)
    return lease.hold(folder) if isinstance(folder, ObjectPath) else _flocked(folder)


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, folder)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise Locked(f"{folder} is in use by process {holder}: stop it, or choose another run folder") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path`; what lay there is moved aside, and put back if the second rename fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    existed = path.exists()
    if existed:
        os.rename(path, old / "previous")
    try:
        os.rename(new, path)
    except BaseException:
        if existed:
            os.rename(old / "previous", path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
