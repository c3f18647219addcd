"""Paths of runs and models, local, mounted or gs://bucket/name; names that are safe in both; local copies of gs:// paths."""

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proreflow_jax import MissingFile, UserError
from proreflow_jax.storage.gcs import LOCK, SCHEME, WRITING, Listed, ObjectPath, check_bucket

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def parse_path(text: str | os.PathLike | ObjectPath, flag: str = "--config.root") -> Path | ObjectPath:
    """A path as a Path, `~` expanded, or gs://bucket/name as an ObjectPath.

    Raises ValueError for any other url, a malformed name, or the home of a user that is not known.
    """
    url = URL.match(str(text))
    if not url:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise UserError(f"{flag}={text}: no such user's home is known: write the whole path") from None
    if url[1] != SCHEME[:-3]:
        raise UserError(f"{flag}={text} must be a local or mounted path or {SCHEME}bucket/folder: {url[1]}:// is not known")
    bucket, _, key = url[2].partition("/")
    key = key.strip("/")
    if not BUCKET.fullmatch(bucket) or not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise UserError(f"{flag}={text} must be {SCHEME}bucket/folder: a bucket's name and plain names below it")
    return ObjectPath(bucket, key)


Location = Path | ObjectPath


def parse_local(text: str | os.PathLike, flag: str) -> Path:
    """A path on this machine, for jobs that take no gs:// path. Raises ValueError for a url."""
    if isinstance(location := parse_path(text, flag), Path):
        return location
    raise UserError(f"{flag}={text} must be a folder of this machine: this job works on local and mounted folders only")


def check_reachable(location: Location, write: bool = True) -> None:
    """Looks at the bucket of a path. Raises ValueError or FileNotFoundError, one line, if it cannot be used."""
    if isinstance(location, Path):
        return
    try:
        check_bucket(location, write)
    except OSError as error:
        raise (MissingFile if isinstance(error, FileNotFoundError) else UserError)(str(error)) from None


def make_folder(folder: Location, what: str) -> None:
    """Makes a folder and those above it where they are missing. Raises UserError, one line that begins with `what`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what}: the folder {folder} can't be made ({error.strerror}): name another") from None


NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_name(name: str) -> str:
    """The name itself, if it is safe as a file name. Raises ValueError for anything else, `.` and `..` included."""
    if not NAME.fullmatch(name) or set(name) == {"."}:
        raise UserError(f"name {name!r} is not made of letters, digits, '.', '_' and '-' only: rename it")
    return name


log = logging.getLogger(__name__)
CACHE = "PROREFLOW_CACHE"  # environment variable: the folder for copies and compiled programs
STREAMS = 8  # objects read at once


def local_copy(location: Location, flag: str = "", names: Collection[str] | None = None) -> Path:
    """A local path as it is; a file or folder of an object store as a copy on this machine.

    names: of the files of the folder that are copied, those that are there; all of them by default.

    Raises in one line: FileNotFoundError if there is nothing, ValueError if the folder is unfinished, forbidden or has names
    that lead outside, OSError for the disk or if an object changed during the copy.
    """
    if isinstance(location, Path):
        return location
    check_reachable(location, write=False)
    listed = [item for item in _listed(location, flag) if names is None or item.name in names]
    facts = [[item.name, item.size, item.generation] for item in listed]
    digest = hashlib.sha256(json.dumps([str(location), facts]).encode()).hexdigest()[:32]
    place = cache_folder() / "copies" / digest / location.name
    if not _is_whole(place, listed):
        _make(location, listed, place)
    return place


def _listed(location: ObjectPath, flag: str) -> list[Listed]:
    """The objects of a copy, names relative to it; one of the empty name if it is a file."""
    if location.is_file():
        status = location.stat()
        return [Listed(name="", size=status.st_size, generation=status.generation)]
    objects = [item for item in location.objects() if not item.name.endswith("/")]
    if any(item.name == WRITING for item in objects):
        raise UserError(f"{location} is unfinished: its writer works or was stopped; run the command that writes it again")
    objects = [item for item in objects if item.name.rpartition("/")[2] not in (LOCK, WRITING)]
    if not objects:
        raise MissingFile(f"{location} does not exist{f': {flag} must name a file or folder' if flag else ''}")
    for item in objects:
        if "\\" in item.name or any(part in ("", ".", "..") for part in item.name.split("/")):
            raise UserError(f"{location} holds an object named {item.name!r}, which is no plain path: rename it")
    return objects


def cache_folder() -> Path:
    """Where this user's copies and compiled programs lie: $PROREFLOW_CACHE, or below $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or f"{home}/proreflow_jax").expanduser().absolute()


def _is_whole(place: Path, listed: list[Listed]) -> bool:
    try:
        return all((place / item.name).stat().st_size == item.size for item in listed)
    except OSError:
        return False


def _make(location: ObjectPath, listed: list[Listed], place: Path) -> None:
    """Copies the missing objects. The copy appears whole."""
    blobs = {_blob(location, item): item for item in listed}
    missing = [blob for blob, item in blobs.items() if not _is_whole(blob, [Listed(name="", size=item.size)])]
    _check_room(location, sum(blobs[blob].size for blob in missing))
    log.info("copying %d files of %s to %s", len(missing), location, cache_folder())
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda blob: _fetch(location, blobs[blob], blob), missing))

    draft = place.parent.with_name(f"{place.parent.name}.{uuid.uuid4().hex}")
    for blob, item in blobs.items():
        target = draft / place.name / item.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(blob, target)
    shutil.rmtree(place.parent, ignore_errors=True)  # one that is not whole
    try:
        os.rename(draft, place.parent)
    except OSError:  # another process was first
        shutil.rmtree(draft, ignore_errors=True)
        if not _is_whole(place, listed):
            raise


def _blob(location: ObjectPath, item: Listed) -> Path:
    """The local file of one generation of one object, shared by all copies."""
    name = location / item.name if item.name else location
    return cache_folder() / "objects" / hashlib.sha256(f"{name}#{item.generation}".encode()).hexdigest()[:32]


def _check_room(location: ObjectPath, needed: int) -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(cache_folder()).free):
        say = f"{needed / 2**30:.1f} GiB of {location} do not fit in {cache_folder()}, {free / 2**30:.1f} GiB free"
        raise UserError(f"{say}: name another folder by the environment variable {CACHE}, or delete old copies")


def _fetch(location: ObjectPath, item: Listed, blob: Path) -> None:
    blob.parent.mkdir(parents=True, exist_ok=True)
    draft = blob.with_name(f"{blob.name}.{uuid.uuid4().hex}")
    try:
        (location / item.name if item.name else location).download(draft, item.generation)
        with draft.open("rb") as file:  # a copy counts by its size: after a power cut its bytes must be there too
            os.fsync(file.fileno())
        os.replace(draft, blob)
    except (FileNotFoundError, FileExistsError) as error:
        raise OSError(f"{location} was changed while it was copied ({error}): run the same command again") from None
    finally:
        draft.unlink(missing_ok=True)
