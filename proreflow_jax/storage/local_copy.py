"""Where runs and models lie, by one word: a local or mounted path, or gs://bucket/name.

`path` reads the word. A run is written where it lies; what must be mapped into memory (models, pair records, datasets) is
copied to this machine first, by `local_copy`. The copy is named by the generation of every object in it, so that it is made
once and never shows a mixture of old and new.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proreflow_jax.storage.atomic import WRITING
from proreflow_jax.storage.gcs import Listed, ObjectPath
from proreflow_jax.storage.lease import LOCK
from proreflow_jax.storage.paths import Location, check_reachable

log = logging.getLogger(__name__)
CACHE = "PROREFLOW_CACHE"  # environment variable: the folder for copies
STREAMS = 8  # objects read at once


def local_copy(location: Location, flag: str = "") -> Path:
    """A local path as it is; a file or folder of an object store as a copy on this machine.

    Raises FileNotFoundError (nothing there), ValueError (unfinished, no rights, names that leave the folder), OSError (disk,
    or changed while it was read), one line.
    """
    if isinstance(location, Path):
        return location
    check_reachable(location, write=False)
    listed = _listed(location, flag)
    facts = [[item.name, item.size, item.generation] for item in listed]
    digest = hashlib.sha256(json.dumps([str(location), facts]).encode()).hexdigest()[:32]
    place = _cache() / "copies" / digest / location.name
    if not _is_whole(place, listed):
        _make(location, listed, place)
    return place


def _listed(location: ObjectPath, flag: str) -> list[Listed]:
    """The objects of a copy, names relative to it; one of the empty name if it is a file."""
    if location.is_file():
        found = location.stat()
        return [Listed(name="", size=found.st_size, generation=found.generation)]
    found = [item for item in location.objects() if not item.name.endswith("/")]
    if any(item.name == WRITING for item in found):
        raise ValueError(f"{location} is unfinished: its writer works or was stopped; run the command that writes it again")
    found = [item for item in found if item.name.rpartition("/")[2] not in (LOCK, WRITING)]
    if not found:
        raise FileNotFoundError(f"{location} does not exist{f': {flag} must name a file or folder' if flag else ''}")
    for item in found:
        if "\\" in item.name or any(part in ("", ".", "..") for part in item.name.split("/")):
            raise ValueError(f"{location} holds an object named {item.name!r}, which is no plain path: rename it")
    return found


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or f"{home}/proreflow_jax").expanduser().absolute()


def _is_whole(place: Path, listed: list[Listed]) -> bool:
    try:
        return all((place / item.name).stat().st_size == item.size for item in listed)
    except OSError:
        return False


def _make(location: ObjectPath, listed: list[Listed], place: Path) -> None:
    """Copies what is not here yet; the copy appears whole."""
    blobs = {_blob(location, item): item for item in listed}
    missing = [blob for blob, item in blobs.items() if not _is_whole(blob, [Listed(name="", size=item.size)])]
    _check_room(location, sum(blobs[blob].size for blob in missing))
    log.info("copying %d files of %s to %s", len(missing), location, _cache())
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
    """Where one generation of one object lies, whatever copies it is part of."""
    name = location / item.name if item.name else location
    return _cache() / "objects" / hashlib.sha256(f"{name}#{item.generation}".encode()).hexdigest()[:32]


def _check_room(location: ObjectPath, needed: int) -> None:
    _cache().mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(_cache()).free):
        say = f"{needed / 2**30:.1f} GiB of {location} do not fit in {_cache()}, {free / 2**30:.1f} GiB free"
        raise ValueError(f"{say}: name another folder by the environment variable {CACHE}, or delete old copies")


def _fetch(location: ObjectPath, item: Listed, blob: Path) -> None:
    blob.parent.mkdir(parents=True, exist_ok=True)
    draft = blob.with_name(f"{blob.name}.{uuid.uuid4().hex}")
    try:
        (location / item.name if item.name else location).download(draft, item.generation)
        os.replace(draft, blob)
    except (FileNotFoundError, FileExistsError) as error:
        raise OSError(f"{location} was changed while it was copied ({error}): run the same command again") from None
    finally:
        draft.unlink(missing_ok=True)
