"""Images and captions in parquet files, as Hugging Face lays out a dataset: one column of image bytes, one of text.

Parquet is made for reading in order: a row group is read whole. So random access costs a row group an image, unless it is
among those kept in memory. Files with large groups are refused, with advice in the error.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.data import webdataset
from proreflow_jax.data.images import Original, Unusable, check_index, first_caption
from proreflow_jax.storage import atomic

KEPT_BYTES = 1 << 30  # of row groups kept in memory, of a process
GROUP_LIMIT = 1 << 30  # bytes of a row group, both columns
SPLITS = ("train", "validation", "test")  # how Hugging Face begins the names of a split's files


class _File(NamedTuple):
    """A file and its metadata. The metadata is parsed once; the file is opened again for every group."""

    path: Path
    metadata: Any


class ParquetRows:
    """`rows[i] -> Original`, row i of all files in order; see `open_parquet`."""

    def __init__(self, name: str, opened: list[_File], image_key: str, caption_key: str) -> None:
        self.name, self._files, self._keys = name, opened, (image_key, caption_key)
        self._groups = [(f, g) for f in range(len(opened)) for g in range(opened[f].metadata.num_row_groups)]
        sizes = [opened[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = np.cumsum([0, *sizes])
        self._kept: OrderedDict[int, Any] = OrderedDict()  # group -> table, the latest used last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Original:
        check_index(index, len(self))
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table, row = self._group(group), index - int(self._starts[group])
        name = f"{self._files[self._groups[group][0]].path}, group {self._groups[group][1]}, row {row}"
        image, caption = (table.column(key)[row] for key in self._keys)
        try:
            return Original(name, _image_bytes(image), first_caption(_text(caption)))
        except Unusable as error:
            raise Unusable(f"{name}: {error}") from error

    def _group(self, group: int) -> Any:
        """A row group's table, kept in memory as long as there is room."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, number = self._files[self._groups[group][0]], self._groups[group][1]
        table = _read_group(file, number, self._keys)
        with self._lock:
            self._kept[group] = table
            while len(self._kept) > 1 and sum(entry.nbytes for entry in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return table


def open_parquet(path: str, image_key: str, caption_key: str) -> ParquetRows:
    """Opens parquet files.

    Args:
        path: a folder with .parquet files of one split, or a pattern such as data/train-*.parquet.
        image_key: the column of images: {bytes, path}, or the bytes themselves. A path is never followed.
        caption_key: the column of text, or of lists of text (the first is taken).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: pyarrow is not installed; a file that is no parquet; no such column; a column of another type; row groups
            that are too large; a folder with several splits.
    """
    paths = webdataset.find_shards(path, ".parquet")
    if len(there := sorted({split for file in paths for split in SPLITS if file.name.startswith(f"{split}-")})) > 1:
        mend = f"name one by --config.data.path={Path(path) / there[0]}-*.parquet"
        raise UserError(f"{path} holds files of several splits, {' and '.join(there)}: {mend}")
    opened = [_open(file, image_key, caption_key) for file in paths]
    rows = ParquetRows(path, opened, image_key, caption_key)
    if not len(rows):
        raise UserError(f"{path} holds no row in {len(paths)} parquet files: see --config.data.path")
    return rows


def parquet_identity(path: str) -> dict[str, str]:
    """The hash of the files' names and sizes. Raises as `webdataset.find_shards` does."""
    return webdataset.shards_identity(path, ".parquet")


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--config.data.kind=parquet needs pyarrow ({atomic.one_line(error)}): pip install 'proreflow_jax[parquet]'"
        ) from error
    return pyarrow


def _open(path: Path, image_key: str, caption_key: str) -> _File:
    """Reads a file's metadata and checks it; no row is read."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole parquet file ({atomic.one_line(error)}): see --config.data.path") from error
    for flag, key, good in (("image_key", image_key, _is_image), ("caption_key", caption_key, _is_text)):
        if schema.names.count(key) != 1:
            raise UserError(f"{path} has no single column {key!r}, it has {sorted(schema.names)}: set --config.data.{flag}")
        if not good(schema.field(key).type):
            what = "text" if flag == "caption_key" else "bytes of images"
            raise UserError(f"{path}: {key!r} is {schema.field(key).type}, not {what}: set --config.data.{flag}")
    for number in range(metadata.num_row_groups):
        if (size := _group_bytes(metadata.row_group(number), (image_key, caption_key))) > GROUP_LIMIT:
            raise UserError(
                f"{path}: row group {number} has {size} bytes, over the limit of {GROUP_LIMIT}, and is read whole for every "
                "image: write the file again with groups of about 50 images, see docs/data.md (--config.data.path)"
            )
    return _File(path, metadata)


def _group_bytes(group: Any, keys: tuple[str, ...]) -> int:
    columns = (group.column(place) for place in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in keys)


def _read_group(file: _File, number: int, keys: tuple[str, ...]) -> Any:
    """A row group's two columns. Raises ValueError if it is damaged; checksums are compared where the file has them."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(file.path, metadata=file.metadata, page_checksum_verification=True) as reader:
            table = reader.read_row_group(number, columns=list(dict.fromkeys(keys)), use_threads=False)
            rows = file.metadata.row_group(number).num_rows
            if table.num_rows != rows:
                raise UserError(f"{table.num_rows} rows where the metadata says {rows}")
            return table
    except FileNotFoundError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file.path}: row group {number} is damaged ({atomic.one_line(error)}): fetch it again") from error


def _is_image(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    types = _pyarrow().types
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def _image_bytes(value: Any) -> bytes:
    content = value.as_py()
    content = content.get("bytes") if isinstance(content, dict) else content
    if not content:
        raise Unusable("no bytes of an image (a path in its place is not followed)")
    return content


def _text(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise Unusable(f"a caption that is not UTF-8 (byte {error.start + 1})") from error
