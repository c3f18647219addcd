"""A folder of images with captions: a .txt or .json beside each image, or one metadata.jsonl / metadata.csv for all.

The latter is Hugging Face's `imagefolder`; a folder below may have one of its own. Its file names come from a stranger: one
that leads out of the folder is refused.
Order is that of the file names, or of the rows of the metadata, never the file system's.
"""

import csv
import errno
import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data.images import (
    BYTE_LIMIT,
    CAPTION_FILE_LIMIT,
    EXTENSIONS,
    Original,
    Unusable,
    caption_file,
    check_index,
    file_caption,
    first_caption,
)
from proreflow_jax.storage import atomic

log = logging.getLogger(__name__)
METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = ("txt", "json", "jsonl", "csv")  # left out without a word
ROW_LIMIT = 1 << 20  # bytes of a row of metadata


class FolderImages:
    """`images[i] -> Original`; see `open_image_folder`. `captions` is None where each lies in a file beside its image."""

    def __init__(self, folder: Path, names: list[str], captions: list[Any] | None, caption_key: str) -> None:
        self.name, self._folder, self.names = str(folder), folder, names
        self._captions, self._key = captions, caption_key

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Original:
        check_index(index, len(self))
        path = self._folder / self.names[index]
        try:
            image = _image_bytes(path)
            if self._captions is None:
                caption = file_caption(self._beside(path), self._key)
            else:
                caption = first_caption(self._captions[index])
            return Original(f"{self.name}, {self.names[index]!r}", image, caption)
        except Unusable as error:
            raise Unusable(f"{self.name}, {self.names[index]!r}: {error}") from error

    def _beside(self, image: Path) -> bytes:
        extension, _ = caption_file(self._key)
        try:
            return read_regular(image.with_suffix(f".{extension}"), CAPTION_FILE_LIMIT)
        except FileNotFoundError as error:
            raise Unusable(f"no .{extension} beside it (--config.data.caption_key={self._key})") from error


def open_image_folder(path: str, caption_key: str) -> FolderImages:
    """Opens a folder of images, sub-folders included.

    Args:
        path: the folder. If it or one below holds metadata.jsonl or metadata.csv, these say which images there are.
        caption_key: the column of the metadata with the text; without metadata "txt" or "json/FIELD", the file beside an image.

    Raises:
        FileNotFoundError: no such folder, or an image that the metadata names is missing.
        ValueError: no image, metadata that is broken or leads outside, a caption_key that is not there.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: --config.data.path must name one with images")
    files = sorted(_walk(folder))
    images = [name for name in files if _ending(name) in EXTENSIONS]
    metadata = _find_metadata(folder, files)
    if not metadata:
        extension, _ = caption_file(caption_key)
        if not images:
            raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)}): see --config.data.path")
        _log_left_out(folder, files, extension)
        return FolderImages(folder, images, None, caption_key)
    names, captions = _rows(folder, metadata, caption_key, set(images))
    if unnamed := len(images) - len(set(names)):
        log.info("%s: %d of %d images are named by no metadata, they are left out", folder, unnamed, len(images))
    return FolderImages(folder, names, captions, caption_key)


def _find_metadata(folder: Path, files: list[str]) -> list[str]:
    """The files of metadata, that of the folder itself first. Raises ValueError where one folder holds two."""
    paths = sorted((name for name in files if name.rpartition("/")[2] in METADATA), key=lambda name: (name.count("/"), name))
    folders = [name.rpartition("/")[0] for name in paths]
    if twice := [here for here in folders if folders.count(here) > 1]:
        raise UserError(f"{folder / twice[0]} holds both {' and '.join(METADATA)}: keep one of them (--config.data.path)")
    return paths


def _rows(folder: Path, metadata: list[str], caption_key: str, images: set[str]) -> tuple[list[str], list[Any]]:
    """(names of images, captions) of all metadata; each file speaks of its own folder and those below."""
    names, captions, named_by = [], [], {}
    for file in metadata:
        some, words = _metadata(folder / file, caption_key)
        below = file.rpartition("/")[0]
        some = [f"{below}/{name}" if below else name for name in some]
        if missing := sorted(set(some) - images):
            lost = f"{len(missing)} images that are not there, such as {missing[0]!r}"
            raise MissingFile(f"{folder / file} names {lost}: see --config.data.path")
        if shared := [name for name in some if named_by.setdefault(name, file) != file]:
            pair = f"two files of metadata, {named_by[shared[0]]} and {file}"
            raise UserError(f"{folder}: {shared[0]} is named by {pair}: keep one of them (--config.data.path)")
        names, captions = names + some, captions + words
    return names, captions


def _log_left_out(folder: Path, files: list[str], extension: str) -> None:
    """Counts the files that are neither image nor caption, by their ending."""
    endings = Counter(_ending(name) for name in files)
    if left_out := [f"{endings[name]} .{name}" for name in sorted(endings) if name not in (*EXTENSIONS, extension, *TEXTS)]:
        log.info("%s: %s are left out: images are %s", folder, ", ".join(left_out), ", ".join(EXTENSIONS))


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def folder_identity(path: str, caption_key: str) -> dict[str, str]:
    """The hash of the metadata's bytes, or without metadata of the images' names. Raises as `open_image_folder` does."""
    folder = Path(path).expanduser()
    metadata = _find_metadata(folder, list(_walk(folder)))
    digests = [atomic.sha256(folder / name) for name in metadata]
    alone = len(metadata) == 1 and metadata[0] in METADATA
    facts = digests if alone else list(zip(metadata, digests, strict=True))
    facts = facts or open_image_folder(path, caption_key).names
    return {"folder": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def _image_bytes(path: Path) -> bytes:
    """An image's bytes. Raises Unusable for a link to a file that is not there: one bad example."""
    try:
        return read_regular(path, BYTE_LIMIT)
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            raise Unusable(f"a link to {os.readlink(path)}, which is not there") from error
        if error.errno == errno.ENOENT:
            raise MissingFile(f"{path} was there when --config.data.path was opened: put it back, or start again") from error
        raise


def read_regular(path: Path, most: int) -> bytes:
    """A file's bytes. Raises Unusable if it is longer than `most` bytes, or no regular file: a pipe would keep us waiting."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(f"{path.name!r} is no file")
        if status.st_size > most:
            raise Unusable(f"{path.name!r} has {status.st_size} bytes, over the limit of {most}")
        return file.readall()


def _walk(folder: Path) -> Iterator[str]:
    """Files below a folder, as relative paths with "/". Names that begin with a dot are hidden."""
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        start = Path(here).relative_to(folder).as_posix()
        for name in names:
            if not name.startswith("."):
                yield name if start == "." else f"{start}/{name}"


def _metadata(path: Path, caption_key: str) -> tuple[list[str], list[Any]]:
    """(file names, captions as they stand) of the rows."""
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    names, captions, has_column = [], [], False
    for where, row in rows:
        names.append(_inside(where, row.get("file_name")))
        captions.append(row.get(caption_key))
        has_column = has_column or caption_key in row
    if not names:
        raise UserError(f"{path} names no image: see --config.data.path")
    if not has_column:
        raise UserError(f"{path} has no column {caption_key!r}: set --config.data.caption_key")
    return names, captions


def _inside(where: str, name: Any) -> str:
    """A file name of the metadata, if it stays inside the folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} has no file_name (--config.data.path)")
    parts = name.removeprefix("./").split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise UserError(f"{where} has the file_name {name[:100]!r}, which may lead outside the folder: refused")
    return "/".join(parts)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line, as strict UTF-8 of at most ROW_LIMIT bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(ROW_LIMIT + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > ROW_LIMIT:
                raise UserError(f"{where} is longer than {ROW_LIMIT} bytes (--config.data.path)")
            try:
                yield where, line.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 (byte {error.start + 1}): save it as UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({atomic.one_line(error)}): see --config.data.path") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} holds a {type(row).__name__} where a JSON object belongs: see --config.data.path")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for row in rows:
            yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        where, why = f"{path}, line {rows.line_num}", atomic.one_line(error)
        raise UserError(f"{where} is not CSV ({why}): see --config.data.path") from error
