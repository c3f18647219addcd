"""Folders with a record of their files: reflow.json holds bytes and SHA-256 of every file that was written beside it.

The record says that a folder is this package's own, so that it may be replaced; and that its files are as they were written, so
that a flipped bit or a file cut to 0 bytes is not read. README.md may be edited by its owner: only an empty one is damaged. The
record has a hash of itself (`seal`), as every record has that says how numbers are read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.storage import atomic
from proreflow_jax.storage.gcs import LOCK, WRITING
from proreflow_jax.storage.paths import Location

RECORD, PAGE = "reflow.json", "README.md"
FILES, FORMAT, SEAL = "files", "format", "seal"  # fields of a record: {path: [bytes, SHA-256]}; of an export alone; its hash
MEND = "write the folder again by the same command, or copy it again"
LATER = (RECORD, "replay.json")  # of an export: written after the files were counted


def with_seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its seal, a hash of all its fields. Raises TypeError if the record is no JSON."""
    return {**record, SEAL: _hash(record)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether the record is as it was sealed."""
    return record.get(SEAL) == _hash(record)


def _hash(record: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in record.items() if name != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record: `record`, and the files that lie in the folder now. Everything else is written before."""
    listed = {name: [(folder / name).stat().st_size, atomic.sha256(folder / name)] for name in file_names(folder)}
    write_record(folder, {**record, FILES: {name: value for name, value in listed.items() if name not in LATER}})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a record that lists its files already."""
    atomic.write_json(folder / RECORD, with_seal(record))


def file_names(folder: Location) -> list[str]:
    """The paths of all files and links below a folder, relative to it, sorted."""
    if not isinstance(folder, Path):
        return sorted(item.name for item in folder.objects() if item.name.rpartition("/")[2] not in (WRITING, LOCK))
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def read_record(folder: Location) -> dict[str, Any]:
    """The record of a folder; {} if there is none. Raises UserError, one line, for one that is damaged."""
    if not (folder / RECORD).is_file():
        return {}
    record = atomic.read_json(folder / RECORD, MEND)
    if not is_sealed(record):
        raise UserError(f"{folder / RECORD} is not as it was written: {MEND}")
    return record


def damage(folder: Location, record: Mapping[str, Any], skip: Callable[[str], bool] | None = None) -> str:
    """The first file that is not as the record says, and how; "" if all are. Of an object store's folder sizes alone.

    skip: of a path; whether its file is left out.
    """
    for name, (size, digest) in sorted(record.get(FILES, {}).items()):
        if skip and skip(name):
            continue
        actual = atomic.file_size(folder / name)
        if actual is None:
            return f"{name} is missing"
        if actual != size and (name != PAGE or actual == 0):
            return f"{name} has {actual} bytes instead of {size}"
        if isinstance(folder, Path) and name != PAGE and atomic.sha256(folder / name) != digest:
            return f"{name} holds other bytes than were written"
    return ""


def check_undamaged(folder: Path, record: Mapping[str, Any], mend: str, skip: Callable[[str], bool] | None = None) -> None:
    """Raises UserError, one line that ends in `mend`, if a file is not as the folder's record says."""
    if wrong := damage(folder, record, skip):
        raise UserError(f"{folder}: {wrong} ({RECORD} lists its files): {mend}")


def check_own(folder: Location, known: Callable[[str], bool], flag: str) -> None:
    """Raises UserError, one line, unless a folder may be replaced: it is absent, empty, or an export and nothing else.

    known: of a path; whether an export may hold such a file. It decides where the record itself is damaged.
    """
    if not folder.exists() or (folder / WRITING).is_file():  # the mark: its own writer was stopped
        return
    if folder.is_file():
        raise UserError(f"{folder} is a file: {flag} must name a folder")
    names = file_names(folder)
    try:
        record = read_record(folder)
        ours = {*record.get(FILES, {}), *LATER} if record.get(FORMAT) else set()
    except UserError:
        ours = {*LATER, *filter(known, names)}
    if stray := [name for name in names if name not in ours]:
        kind = "an export, and holds what no export wrote" if ours else "not an export, and holds"
        raise UserError(f"{folder} is {kind}: {_some(stray)}: nothing there is replaced, let {flag} name another folder")


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def check_apart(folder: Location, places: Mapping[str, Location], flag: str) -> None:
    """Raises UserError, one line, if a folder that is to be written is one of `places`, or holds one.

    places: {what it is: where}.
    """
    target = _real(folder)
    for what, place in places.items():
        if type(place) is not type(folder):
            continue
        inner = _real(place)
        inside = inner.is_relative_to(target) if isinstance(target, Path) else f"{inner}/".startswith(f"{target}/")
        if inside:
            holds = "is" if inner == target else "holds"
            raise UserError(f"{flag}={folder} {holds} {what}{'' if inner == target else f' ({place})'}: name another folder")


def _real(place: Location) -> Location:
    return place.resolve() if isinstance(place, Path) else place
