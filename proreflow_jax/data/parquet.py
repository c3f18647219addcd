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
    paths: dict[str, list[str]]  # key -> the column and the fields below it


class ParquetRows:
    """`rows[i] -> Original`, row i of all files in order; see `open_parquet`."""

    def __init__(self, name: str, opened: list[_File], image_key: str, caption_key: str) -> None:
        self.name, self._files = name, opened
        self._paths = [opened[0].paths[key] for key in (image_key, caption_key)] if opened else []
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
        image, caption = (table.column(path[0])[row] for path in self._paths)
        try:
            return Original(name, _image_bytes(_below(image, self._paths[0])), first_caption(_below(caption, self._paths[1])))
        except Unusable as error:
            raise Unusable(f"{name}: {error}") from error

    def _group(self, group: int) -> Any:
        """A row group's table, kept in memory as long as there is room."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, number = self._files[self._groups[group][0]], self._groups[group][1]
        table = _read_group(file, number, [path[0] for path in self._paths])
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
        Either may name a field below a struct: "column/field".

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
            f"--config.data.kind=parquet needs pyarrow ({atomic.one_line(error)}): pip install pyarrow (the extra `parquet`)"
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
    located = {}
    for flag, key, good in (("image_key", image_key, _is_image), ("caption_key", caption_key, _is_text)):
        located[key], kind = _locate(path, schema, key, flag)
        if not good(kind):
            what = "text" if flag == "caption_key" else "bytes of images"
            raise UserError(f"{path}: {key!r} is {kind}, not {what}: set --config.data.{flag}")
    columns = [fields[0] for fields in located.values()]
    for number in range(metadata.num_row_groups):
        if (size := _group_bytes(metadata.row_group(number), columns)) > GROUP_LIMIT:
            raise UserError(
                f"{path}: row group {number} has {size} bytes, over the limit of {GROUP_LIMIT}, and is read whole for every "
                "image: write the file again with groups of about 50 images, see docs/data.md (--config.data.path)"
            )
    return _File(path, metadata, located)


def _locate(path: Path, schema: Any, key: str, flag: str) -> tuple[list[str], Any]:
    """(the column and the fields below it, type of the value) of a key: a column's name, or "column/field". Else ValueError."""
    column, *fields = [key] if key in schema.names else key.split("/")
    if schema.names.count(column) != 1:
        raise UserError(f"{path} has no single column {column!r}, it has {sorted(schema.names)}: set --config.data.{flag}")
    kind = schema.field(column).type
    for number, field in enumerate(fields):
        while _is_list(kind):
            kind = kind.value_type
        there = [kind.field(place).name for place in range(kind.num_fields)] if _pyarrow().types.is_struct(kind) else []
        if field not in there:
            above = "/".join([column, *fields[:number]])
            raise UserError(f"{path} has no field {field!r} in {above!r}, it has {there}: set --config.data.{flag}")
        kind = kind.field(field).type
    return [column, *fields], kind


def _below(value: Any, path: list[str]) -> Any:
    """The value of a field below a column's, as Python has it; of lists the first."""
    try:
        value = value.as_py()
    except UnicodeDecodeError as error:
        raise Unusable(f"a caption that is not UTF-8 (byte {error.start + 1})") from error
    for field in path[1:]:
        while isinstance(value, list):
            value = value[0] if value else None
        value = value.get(field) if isinstance(value, dict) else None
    return value


def _group_bytes(group: Any, keys: list[str]) -> int:
    columns = [group.column(place) for place in range(group.num_columns)]
    own = lambda name: any(name == key or name.startswith(f"{key}.") for key in keys)
    return sum(column.total_uncompressed_size for column in columns if own(column.path_in_schema))


def _read_group(file: _File, number: int, keys: list[str]) -> Any:
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
    return _is_one_of(kind, "binary", "large_binary", "binary_view")


def _is_text(kind: Any) -> bool:
    if _is_list(kind) or _is_one_of(kind, "dictionary"):
        return _is_text(kind.value_type)
    return _is_one_of(kind, "string", "large_string", "string_view")


def _is_list(kind: Any) -> bool:
    return _is_one_of(kind, "list", "large_list", "fixed_size_list", "list_view", "large_list_view")


def _is_one_of(kind: Any, *names: str) -> bool:
    """Whether a type is of one of these kinds; older versions of pyarrow lack some."""
    types = _pyarrow().types
    return any(getattr(types, f"is_{name}")(kind) for name in names if hasattr(types, f"is_{name}"))


def _image_bytes(content: Any) -> bytes:
    content = content.get("bytes") if isinstance(content, dict) else content
    if not content:
        raise Unusable("no bytes of an image (a path in its place is not followed)")
    return content
