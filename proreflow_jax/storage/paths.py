"""Where runs and models lie, by one word: a local or mounted path, or gs://bucket/name. Names that are safe in either."""

import os
import re
from pathlib import Path

from proreflow_jax.storage.gcs import SCHEME, ObjectPath, check_bucket

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def parse_path(text: str | os.PathLike | ObjectPath, flag: str = "--config.root") -> Path | ObjectPath:
    """A path as a Path, or gs://bucket/name as an ObjectPath. Raises ValueError for any other url or a malformed name."""
    found = URL.match(str(text))
    if not found:
        return Path(text)
    if found[1] != SCHEME[:-3]:
        raise ValueError(f"{flag}={text} must be a local or mounted path or {SCHEME}bucket/folder: {found[1]}:// is not known")
    bucket, _, key = found[2].partition("/")
    key = key.strip("/")
    if not BUCKET.fullmatch(bucket) or not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"{flag}={text} must be {SCHEME}bucket/folder: a bucket's name and plain names below it")
    return ObjectPath(bucket, key)


Location = Path | ObjectPath


def parse_local(text: str | os.PathLike, flag: str) -> Path:
    """The path of what is written or read on this machine alone. Raises ValueError for a url."""
    if isinstance(found := parse_path(text, flag), Path):
        return found
    raise ValueError(f"{flag}={text} must be a folder of this machine: this job works on local and mounted folders only")


def check_reachable(location: Location, write: bool = True) -> None:
    """Looks at the bucket of a path. Raises ValueError or FileNotFoundError, one line, if it cannot be used; local: nothing."""
    if isinstance(location, Path):
        return
    try:
        check_bucket(location, write)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from None


NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_name(name: str) -> str:
    """The name itself, if it is safe as a file name. Raises ValueError for anything else, `.` and `..` included."""
    if not NAME.fullmatch(name) or set(name) == {"."}:
        raise ValueError(f"name {name!r} is not made of letters, digits, '.', '_' and '-' only: rename it")
    return name
