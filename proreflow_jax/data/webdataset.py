"""Images and captions in webdataset's tar shards, by random access: an index of offsets, built once and kept.

A sample is the members of one shard that share a name up to its first dot, "000042.jpg" and "000042.txt", or
"42.image.jpg" and "42.caption.txt". Where several images share it, as in "pic.7.jpg" and "pic.8.jpg", each is a sample of its
own, with the caption of the same name up to the last dot. Names of members are keys and nothing else: nothing is unpacked, no
name becomes a path, links are ignored. The index of a shard lies in a cache folder. Its name holds the shard's path, size and
time of change, so a changed shard gets a new index.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from proreflow_jax import MissingFile, RunFailed, UserError
from proreflow_jax.data.images import (
    BYTE_LIMIT,
    CAPTION_FILE_LIMIT,
    EXTENSIONS,
    Original,
    Unusable,
    caption_file,
    check_index,
    file_caption,
)
from proreflow_jax.storage import atomic

BLOCK = 512  # bytes; tar's unit
SHARD_LIMIT = 100_000  # shards that a pattern may name
VERSION = 2  # of the index
WIDTH = 4  # numbers a sample: offset and size of its image, offset and size of its caption; size -1: there is none
NONE = (0, -1)

Members = dict[tuple[str, str], tuple[int, int]]  # of one key: (name between the dots, extension) -> offset and size
log = logging.getLogger(__name__)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarSamples:
    """`samples[i] -> Original`, sample i of all shards in order; see `open_webdataset`."""

    def __init__(self, name: str, shards: list[Path], stats: list[tuple[int, int]], tables: list[np.ndarray], key: str) -> None:
        self.name, self._shards, self._stats, self._key = name, shards, stats, key
        self._table = np.concatenate(tables)
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Original:
        check_index(index, len(self))
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        image_at, image_size, caption_at, caption_size = map(int, self._table[index])
        with open(self._shards[shard], "rb", buffering=0) as file:
            if _stat(file.fileno()) != self._stats[shard]:
                raise RunFailed(f"{self._shards[shard]} changed while it is read: run the same command again")
            header = os.pread(file.fileno(), 100, image_at - BLOCK)  # starts with the member's name, cut at 100 bytes
            name = f"{self._shards[shard]}, {header.split(bytes(1))[0].decode('utf-8', 'replace')!r}"
            if caption_size < 0:
                raise Unusable(f"{name}: no {self._key.partition('/')[0]} beside it (--config.data.caption_key={self._key})")
            for size, most in ((image_size, BYTE_LIMIT), (caption_size, CAPTION_FILE_LIMIT)):
                if size > most:
                    raise Unusable(f"{name}: a member of {size} bytes is over the limit of {most}")
            image, text = os.pread(file.fileno(), image_size, image_at), os.pread(file.fileno(), caption_size, caption_at)
        if (len(image), len(text)) != (image_size, caption_size):
            raise RunFailed(f"{name}: cut short while it was read")
        try:
            return Original(name, image, file_caption(text, self._key))
        except Unusable as error:
            raise Unusable(f"{name}: {error}") from error


def open_webdataset(path: str, caption_key: str, cache: str | os.PathLike) -> TarSamples:
    """Opens tar shards; builds the indexes that the cache folder lacks (about a minute for a million samples).

    Args:
        path: a folder with .tar files, or a pattern such as data/{00000..00099}.tar or data/*.tar.
        caption_key: the caption's file beside the image: "txt", or "json/FIELD" for a field of a .json.
        cache: the folder where indexes are kept, local; made if it is not there.

    Raises:
        FileNotFoundError: no such folder, no shard, or a shard that the pattern names is missing.
        ValueError: a shard that is no tar, is compressed or cut, or holds no image; a caption_key of another form.
    """
    caption_file(caption_key)
    shards = find_shards(path)
    stats = [_stat(shard) for shard in shards]
    tables = [_index(shard, stat, caption_key, Path(cache)) for shard, stat in zip(shards, stats, strict=True)]
    with_image, known = [table[table[:, 1] >= 0] for table in tables], ", ".join(EXTENSIONS)
    count, every = sum(map(len, with_image)), sum(map(len, tables))
    if not count:
        raise UserError(f"{path} holds no image ({known}) in {len(shards)} tar shards: see --config.data.path")
    if count < every:
        log.info("%s: %d of %d samples have no image (%s), they are left out", path, every - count, every, known)
    return TarSamples(path, shards, stats, with_image, caption_key)


# --- shards -----------------------------------------------------------------------------------------------------------


def find_shards(path: str, suffix: str = ".tar") -> list[Path]:
    """The files that a folder, a file, or a pattern with {000..099}, {a,b}, *, ? and [] names, in order.

    Raises FileNotFoundError if there is none, or one that braces name is missing; ValueError for more than SHARD_LIMIT.
    """
    whole = Path(path).expanduser()
    if whole.is_dir():
        files = sorted(file for file in whole.iterdir() if file.name.endswith(suffix) and not file.name.startswith("."))
        if not files:
            raise MissingFile(f"{whole} holds no {suffix} file: --config.data.path must name a folder or pattern of them")
        return files
    if whole.is_file():
        return [whole]
    files = [file for name in expand_braces(path) for file in _expand_stars(Path(name).expanduser())]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        which = f"{len(missing)} of {len(files)} files are missing, such as {missing[0]}" if missing else "no file is so named"
        raise MissingFile(f"{path}: {which}: --config.data.path must name a folder or pattern of {suffix} files")
    return files


def shards_identity(path: str, suffix: str = ".tar") -> dict[str, str]:
    """The hash of the shards' names and sizes. Raises as `find_shards` does."""
    shards = find_shards(path, suffix)
    rows = [[shard.name, shard.stat().st_size] for shard in shards]
    return {"shards": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def expand_braces(pattern: str) -> list[str]:
    """Expands {00000..00099} and {a,b} as a shell does. Raises ValueError if more than SHARD_LIMIT names result."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices, count = [], 1
    for place, piece in enumerate(pieces):
        bounds = _RANGE.fullmatch(piece) if place % 2 else None
        size = int(bounds[2]) - int(bounds[1]) + 1 if bounds else len(piece.split(",")) if place % 2 else 1
        count *= size
        if not 0 < count <= SHARD_LIMIT:
            raise UserError(f"{pattern} names {max(count, 0)} shards, not 1 to {SHARD_LIMIT}: see --config.data.path")
        if bounds:
            choices.append([f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)])
        else:
            choices.append(piece.split(",") if place % 2 else [piece])
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_stars(path: Path) -> list[Path]:
    """The files of a path with a glob in its last part; without a glob, the path itself."""
    return sorted(path.parent.glob(path.name)) if any(star in path.name for star in "*?[") else [path]


def _stat(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


# --- the index of a shard ---------------------------------------------------------------------------------------------


def _index(shard: Path, stat: tuple[int, int], caption_key: str, cache: Path) -> Int[np.ndarray, "n 4"]:
    """A shard's index: kept, or built and then kept. A cache that cannot be written only costs time."""
    extension, _ = caption_file(caption_key)
    key = [VERSION, str(shard.resolve()), *stat, extension]
    path = cache.expanduser() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.index"
    table = _read_index(path)
    if table is None:
        table = build_index(shard, extension)
        _write_index(path, table)
    return table


def _read_index(path: Path) -> Int[np.ndarray, "n 4"] | None:
    """An index as `_write_index` left it; None if it is absent or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32] or (len(content) - 32) % (8 * WIDTH):
        return None
    return np.frombuffer(content, "<i8", offset=32).reshape(-1, WIDTH)


def _write_index(path: Path, table: Int[np.ndarray, "n 4"]) -> None:
    """SHA-256 of the numbers, then the numbers: little-endian, 8 bytes each."""
    numbers = table.astype("<i8").tobytes()
    with suppress(OSError):  # an index is a convenience
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.drafted(path) as draft:
            draft.write_bytes(hashlib.sha256(numbers).digest() + numbers)


def build_index(shard: Path, extension: str) -> Int[np.ndarray, "n 4"]:
    """Reads a shard's headers: WIDTH numbers for each sample, in the order of the shard; one without image counts too.

    Raises ValueError: no tar, compressed, or cut before its end mark.
    """
    mend = "fetch it again, or leave it out of --config.data.path"
    size, samples = shard.stat().st_size, {}
    try:
        with open(shard, "rb", buffering=1 << 16) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > size:
                    raise UserError(f"cut inside of {member.name!r}")
                _note(samples, member, extension)
                tar.members.clear()  # tarfile keeps all members otherwise
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"cut or damaged at byte {tar.offset}, where the next header or the end mark belongs")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise UserError(f"{shard} is not a whole uncompressed tar ({atomic.one_line(error)}): {mend}") from error
    rows = [row for members in samples.values() for row in _sample_rows(members, extension)]
    return np.array(rows, np.int64).reshape(-1, WIDTH)


def _note(samples: dict[str, Members], member: tarfile.TarInfo, extension: str) -> None:
    """Enters a member by its key, field and extension; of several with one name the first counts."""
    name = PurePosixPath(member.name)
    stem, dot, rest = name.name.partition(".")
    if not stem or not dot or not member.isreg() or member.issparse():
        return
    members = samples.setdefault(f"{name.parent}/{stem}", {})
    field, _, ending = rest.rpartition(".")
    if (ending := ending.lower()) in (*EXTENSIONS, extension):
        members.setdefault((field, ending), (member.offset_data, member.size))


def _sample_rows(members: Members, extension: str) -> Iterator[tuple[int, ...]]:
    """(offset and size of the image, of the caption) of each sample that shares a key; see the top of this file."""
    captions = {field: place for (field, ending), place in members.items() if ending == extension}
    images: dict[str, tuple[int, int]] = {}
    for ending in EXTENSIONS:  # of several images of one field the first kind counts
        for (field, kind), place in members.items():
            if kind == ending:
                images.setdefault(field, place)
    if len(images) <= 1:
        only = captions.get("") or (next(iter(captions.values())) if len(captions) == 1 else NONE)
        for field, image in (images or {"": NONE}).items():
            yield (*image, *captions.get(field, only))
        return
    for field in dict.fromkeys(field for field, _ in members if field in images or field in captions):
        if field in images or field:  # a caption that stands for all of them is of none
            yield (*images.get(field, NONE), *captions.get(field, NONE))
