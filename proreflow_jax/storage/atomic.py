"""Files and folders that are whole or absent: the one writer of the package.

A draft lies beside its destination under a name that tells its writer, `.tmp.<process>.<machine>.<name>`. The draft is synced
and renamed: a rename within one file system is the only write that a kill cannot cut in half. A later start
can tell a dead writer's remains from the work of a process that runs beside it.

In an object store a put is whole by itself; a folder there carries the mark WRITING while it is filled.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from proreflow_jax import MissingFile, RunFailed, UserError
from proreflow_jax.storage import gcs, paths
from proreflow_jax.storage.gcs import WRITING, ObjectPath
from proreflow_jax.storage.lock import hold_lease
from proreflow_jax.storage.paths import Location

STALE_S = 3600.0  # seconds without a write after which another machine's writer counts as dead
MEND = "put a whole copy in its place, or run the job that writes it again"  # of a damaged file
JSON_LIMIT = 16 << 20  # bytes; no metadata file of ours or of tfds comes near the limit
DRAFT, ASIDE = "tmp", "old"  # kinds of names beside a destination: its replacement, and the old one during the swap


def read_json(path: str | Location, mend: str = MEND) -> dict[str, Any]:
    """The JSON object in a file.

    Raises MissingFile, or UserError, one line that ends in `mend`, if the file holds anything else.
    """
    path = paths.parse_path(path)
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist: run the job that writes it first") from None
    if len(text) > JSON_LIMIT:
        raise UserError(f"{path} is longer than {JSON_LIMIT} bytes, too long for metadata")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path} is no valid JSON ({one_line(error)}): {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where a JSON object belongs: {mend}")
    return value


def write_json(path: str | Location, value: Any, replace: bool = True) -> None:
    """Writes a value as JSON with sorted keys; readers see the old file or the new one, also after a power cut.

    With replace=False a file that is there already stays as it is.
    """
    path, text = paths.parse_path(path), json.dumps(value, indent=2, sort_keys=True) + "\n"
    if isinstance(path, ObjectPath):
        with suppress(FileExistsError):
            path.put(text.encode(), replace)
        return
    with drafted(path, replace) as draft:
        draft.write_text(text, encoding="utf-8")


def write_text(path: str | Location, text: str) -> None:
    """Writes a text file; readers see the old file or the new one, and an error of the disk names it."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def drafted(path: str | Location, replace: bool = True) -> Iterator[Path]:
    """A local file to write, which becomes `path` when the block ends well. Nothing is left if the block fails.

    What killed writers of the same file left is removed. With replace=False a file that is there already stays as it is.
    """
    path = paths.parse_path(path)
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    clear_drafts(path.parent, path.name)
    draft = temporary(path)
    try:
        with path_named(path):
            yield draft
            sync(draft)
        os.replace(draft, path) if replace else _place_first(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def atomic_folder(path: str | Location, overwrite: bool = False) -> AbstractContextManager[Path]:
    """An empty local folder that becomes `path` when the block ends well, and vanishes when the block fails.

    With `overwrite` an existing `path` is moved aside, and removed after the new one stands in its place. Remains of a killed
    process are cleared first; a folder that the process had moved aside and not replaced is put back. Raises ValueError if
    `path` exists and `overwrite` is not set. In an object store the folder is uploaded at the end (the old one is gone before
    the new one is whole).
    """
    path = paths.parse_path(path)
    if isinstance(path, ObjectPath):
        _check_free(path, overwrite or (path / WRITING).is_file())
        return _uploaded_folder(path)
    path = path.resolve() if path.is_symlink() else path  # the folder is replaced, its link stays
    recover(path)
    _check_free(path, overwrite)
    return _renamed_folder(path)


def _check_free(path: Location, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another folder")


@contextmanager
def _uploaded_folder(path: ObjectPath) -> Iterator[Path]:
    """Uploads the block's files. After a kill the folder is unchanged, or carries the mark WRITING."""
    with hold_lease(path), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        (path / WRITING).write_text("")
        for old in path.objects():
            if old.name not in (WRITING, gcs.LOCK):
                (path / old.name).unlink(missing_ok=True)
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            (path / file.relative_to(folder).as_posix()).upload(file)
        (path / WRITING).unlink()


@contextmanager
def _renamed_folder(path: Path) -> Iterator[Path]:
    draft = temporary(path)
    above = next(folder for folder in path.absolute().parents if folder.exists())  # the new folders' names are its entries
    draft.mkdir(parents=True)
    try:
        with path_named(path):
            yield draft
            for file in (*draft.rglob("*"), draft):
                sync(file)
        _swap(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for folder in path.absolute().parents:
        sync(folder)
        if folder == above:
            break


@contextmanager
def path_named(path: Path) -> Iterator[None]:
    """Puts a path into errors of the disk that name none: Python names it where a file is opened, not where it is written."""
    try:
        yield
    except shutil.Error as error:  # of copied folders: a list of (from, to, why)
        raise RunFailed(f"{path} could not be written: {one_line(error)}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _swap(draft: Path, path: Path) -> None:
    """Puts the draft in the place of `path`. The old folder is deleted only once the new one stands; see `recover`."""
    old = temporary(path, ASIDE)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(draft, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Clears the remains of killed writers beside a folder. A folder that was moved aside and not replaced is put back."""
    for old in stale_temporaries(path.parent, path.name, ASIDE):
        shutil.rmtree(old) if path.exists() else os.rename(old, path)
    clear_drafts(path.parent, path.name)


def clear_drafts(folder: Location, name: str = "*") -> None:
    """Removes the drafts of dead writers in a folder: of files or folders called `name` ("*": all). A store has none."""
    for draft in stale_temporaries(folder, name) if isinstance(folder, Path) else ():
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path, kind: str = DRAFT) -> Path:
    """The name under which this process drafts `path` (DRAFT), or moves it aside (ASIDE)."""
    return path.with_name(f".{kind}.{os.getpid()}.{_machine()}.{path.name}")


def stale_temporaries(folder: Path, name: str = "*", kind: str = DRAFT) -> list[Path]:
    """The temporaries of dead writers in a folder, sorted: of files or folders called `name` ("*": all).

    On this machine a writer is dead if its process no longer runs, or has this process's id (so call before writing). A
    writer on another machine is dead after STALE_S seconds without a write.
    """
    form = re.compile(rf"\.{kind}\.(\d+)\.([A-Za-z0-9-]+)\.({'.+' if name == '*' else re.escape(name)})")
    matches = [(path, form.fullmatch(path.name)) for path in sorted(folder.glob(f".{kind}.*"))]
    return [path for path, match in matches if match and _is_stale(path, int(match[1]), match[2])]


def _place_first(draft: Path, path: Path) -> None:
    """Gives the draft its name unless another process came first. Without hard links it renames: the last one wins."""
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:
        os.replace(draft, path)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()) or "machine"


def _is_stale(path: Path, process: int, machine: str) -> bool:
    if machine == _machine():
        return process == os.getpid() or not _runs(process)
    try:
        newest = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:  # its writer has just renamed it
        return False
    return time.time() - newest > STALE_S


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def one_line(error: BaseException | str) -> str:
    """Returns an error's text on one line of at most 200 characters, for use inside a message of ours."""
    return " ".join(str(error).split())[:200]


def plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dict as JSON reads it back: tuples become lists. So it equals the stored one.

    Raises:
        ValueError: a value is no JSON, such as an array, a NaN or an object.
    """
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"not plain JSON ({one_line(error)}): {one_line(repr(value))}") from error


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of plain JSON, in hex; the order of a dict's fields does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_readable(path: Path) -> None:
    """Raises RunFailed if a file's bytes cannot be read now: nothing is known about them, so the file is not damaged."""
    try:
        sha256(path)
    except OSError as error:
        raise RunFailed(f"{path} could not be read: {one_line(error)}; run the same command again") from error


def file_size(path: Any) -> int | None:
    """Returns the bytes of a file, or None if there is none."""
    try:
        return path.stat().st_size if not isinstance(path, Path) or path.is_file() else None
    except FileNotFoundError:
        return None
