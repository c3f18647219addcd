"""A folder of images with captions: a .txt or .json beside each image, or one metadata.jsonl / metadata.csv for all.

The latter is Hugging Face's `imagefolder`. Its file names come from a stranger: one that leads out of the folder is refused.
Order is that of the file names, or of the rows of the metadata, never the file system's.
"""

import csv
import hashlib
import json
import os
import stat
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

METADATA = ("metadata.jsonl", "metadata.csv")
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
            if self._captions is None:
                caption = file_caption(self._beside(path), self._key)
            else:
                caption = first_caption(self._captions[index])
            return Original(f"{self.name}, {self.names[index]!r}", read_regular(path, BYTE_LIMIT), caption)
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
        path: the folder. If it holds metadata.jsonl or metadata.csv, these say which images there are.
        caption_key: the column of the metadata with the text; without metadata "txt" or "json/FIELD", the file beside an image.

    Raises:
        FileNotFoundError: no such folder, or an image that the metadata names is missing.
        ValueError: no image, metadata that is broken or leads outside, a caption_key that is not there.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: --config.data.path must name one with images")
    there = [name for name in METADATA if (folder / name).is_file()]
    if len(there) > 1:
        raise UserError(f"{folder} holds both {' and '.join(there)}: keep one of them (--config.data.path)")
    images = sorted(_walk(folder))
    if not there:
        caption_file(caption_key)
        if not images:
            raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)}): see --config.data.path")
        return FolderImages(folder, images, None, caption_key)
    names, captions = _metadata(folder / there[0], caption_key)
    if missing := sorted(set(names) - set(images)):
        lost = f"{len(missing)} images that are not there, such as {missing[0]!r}"
        raise MissingFile(f"{folder / there[0]} names {lost}: see --config.data.path")
    return FolderImages(folder, names, captions, caption_key)


def folder_identity(path: str, caption_key: str) -> dict[str, str]:
    """The hash of the metadata's bytes, or without metadata of the images' names. Raises as `open_image_folder` does."""
    folder = Path(path).expanduser()
    facts = [atomic.sha256(folder / name) for name in METADATA if (folder / name).is_file()]
    facts = facts or open_image_folder(path, caption_key).names
    return {"folder": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


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
    """Images below a folder, as relative paths with "/". Names that begin with a dot are hidden."""
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        start = Path(here).relative_to(folder).as_posix()
        for name in names:
            if name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith("."):
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
