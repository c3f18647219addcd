"""Files that are whole or absent: atomic JSON, hashes, and temporaries that tell whose they are.

A file appears under its name only after its bytes are on the disk (write to a temporary, sync, rename, sync the
folder). The temporary's name carries the writer's process id and machine, so a later start can tell a dead writer's
remains from the work of a process that runs beside it.

A path may also be one of an object store, handed in by whoever knows such stores. It has the methods of a Path that are
used here; `put(bytes, replace)` and `upload(file)` take the place of temporary and rename, since what is put there is whole
or absent.
"""

import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"  # how an ArrayRecord file is opened here
STALE_S = 3600.0  # seconds without a write after which another machine's temporary is nobody's
JSON_LIMIT = 16 << 20  # bytes; no metadata file of ours or of tfds comes near it

_TEMPORARY = re.compile(r"\.tmp\.(\d+)\.([A-Za-z0-9-]+)\..+")


def one_line(error: BaseException | str) -> str:
    """Returns an error's text on one line of at most 200 characters, for use inside a message of ours."""
    return " ".join(str(error).split())[:200]


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what JSON makes of a dict (tuples become lists), so that it compares equal to itself read back.

    Raises:
        ValueError: it holds something JSON cannot carry: an array, a NaN, an object.
    """
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not plain JSON ({one_line(error)}): {one_line(repr(value))}") from error


def digest(value: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a dict of plain JSON, in hex; the order of its fields does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_records(path: Path) -> int:
    """Returns the number of records in an ArrayRecord file; a cut or broken one counts 0."""
    try:
        reader = ArrayRecordReader(str(path), RANDOM_ACCESS)
        count = reader.num_records()
        reader.close()
    except RuntimeError:
        return 0
    return count


def located(path: Any) -> Any:
    """Returns a str or os.PathLike as a Path, and a path of an object store as it is."""
    return Path(path) if isinstance(path, str | os.PathLike) else path


def size(path: Any) -> int | None:
    """Returns the bytes of a file, or None if there is none."""
    try:
        return path.stat().st_size if not isinstance(path, Path) or path.is_file() else None
    except FileNotFoundError:
        return None


@contextmanager
def drafted(path: Any) -> Iterator[Path]:
    """A local file's name to write to, which becomes `path` when the block ends well; else nothing is left of it."""
    if isinstance(path, Path):
        draft = temporary(path)
        try:
            yield draft
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        sync(path.parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
        path.upload(Path(folder) / path.name)


def read_json(path: Any) -> dict[str, Any]:
    """Returns the JSON object a file holds; FileNotFoundError if absent, ValueError if it is anything else."""
    with path.open("rb") as file:
        text = file.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path} is longer than {JSON_LIMIT} bytes, too long for metadata")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a JSON object belongs")
    return value


def write_json(path: Any, value: Mapping[str, Any], replace: bool = True) -> None:
    """Writes a JSON object whole or not at all; with replace=False a file that is already there stays as it is."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    if not isinstance(path, Path):
        with suppress(FileExistsError):
            path.put(text.encode(), replace)
        return
    draft = temporary(path)
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        sync(draft)
        os.replace(draft, path) if replace else _place_first(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """Returns the name under which this process drafts `path`: `.tmp.<process id>.<machine>.<name>` beside it."""
    return path.with_name(f".tmp.{os.getpid()}.{_machine()}.{path.name}")


def stale_temporaries(folder: Path, name: str = "*") -> list[Path]:
    """Returns the temporaries in a folder, of files called `name` (a glob), whose writers are gone; sorted.

    Of this machine: those of processes that no longer run, and of this one's own id (so ask before writing). Of other
    machines: those without a write for STALE_S seconds.
    """
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in sorted(folder.glob(f".tmp.*.{name}"))]
    return [path for path, match in found if match and _is_stale(path, int(match[1]), match[2])]


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
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:  # its writer has just renamed it
        return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
