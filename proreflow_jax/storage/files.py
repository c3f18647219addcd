"""Facts about files and values: hashes, sizes, errors on one line."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def size(path: Any) -> int | None:
    """Returns the bytes of a file, or None if there is none."""
    try:
        return path.stat().st_size if not isinstance(path, Path) or path.is_file() else None
    except FileNotFoundError:
        return None
