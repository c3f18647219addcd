"""Pair records: a teacher's states in ArrayRecord shards that a student can trust; a cache (`cached`) likewise.

Any number of processes that come and go write a folder of pairs. It is read only when it is whole:

    plan.json                                  fixed at the first start; another plan is refused
    pairs-00003-of-00016.array_record          examples [3 S, 4 S), always the same bytes
    pairs-00003-of-00016.done.json             its count, size and hash, written after the shard is in place
    MANIFEST.json                              all of these together, once every marker is valid; readers demand it

A shard is written to a temporary name, closed, synced, re-opened and counted, hashed, renamed, and only then marked
done: a kill at any moment costs at most one shard of that process. Writers also take a folder in an object store (see
`files`): a shard is then made on this machine and uploaded whole. Readers want a local copy. One example is one safetensors
blob, a dict of numpy arrays (states (m+1, h, w, c), first (), ids (length,)); nothing is ever unpickled.
"""

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import record_plan
from proreflow_jax.data.record_plan import PLAN, fix_plan, read_plan, shard_count, shard_name, shard_range
from proreflow_jax.storage import atomic, paths

__all__ = [
    "PLAN",
    "PairRecords",
    "clean",
    "fix_plan",
    "missing_shards",
    "publish",
    "read_plan",
    "shard_count",
    "shard_name",
    "shard_range",
    "write_shard",
]

MANIFEST = "MANIFEST.json"
WRITER = "group_size:1,uncompressed"  # one record a chunk: random access; latents do not compress
DTYPES = {  # safetensors' names; its own reader for numpy (0.8) has no bfloat16
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
AGAIN = "run make_pairs (or cache, if that made it) again with the same config"
REDO = f"delete it and {AGAIN}"


# --- writing ----------------------------------------------------------------------------------------------------------


def missing_shards(folder: Any, plan: Mapping[str, Any]) -> list[int]:
    """Returns the shards without a valid marker, ascending: the remaining work."""
    plan = atomic.plain_json(plan)
    return [shard for shard, row in enumerate(_markers(paths.parse_path(folder), plan)) if row is None]


def write_shard(folder: Any, plan: Mapping[str, Any], shard: int, examples: Iterable[Mapping[str, np.ndarray]]) -> Any:
    """Writes one whole shard and marks it done; equal examples give equal bytes, whoever writes them.

    Args:
        folder: holds a plan, by `fix_plan`.
        plan: that plan.
        shard: which shard; its examples are those of `shard_range(plan, shard)`, in this order.
        examples: one dict of numpy arrays each; of a dtype in DTYPES.

    Returns: the path of the shard.

    Raises:
        ValueError: too few or too many examples, or one that is not a dict of arrays of DTYPES.
        OSError: the shard could not be written (a full disk, say); nothing is marked, no temporary is left.
    """
    folder, plan, ids = paths.parse_path(folder), atomic.plain_json(plan), shard_range(plan, shard)
    path = folder / shard_name(plan, shard)
    with atomic.drafted(path) as draft:
        _write_records(draft, path, examples, len(ids))
        row = {"name": path.name, "count": len(ids), "bytes": draft.stat().st_size, "sha256": atomic.sha256(draft)}
    atomic.write_json(_marker_path(folder, plan, shard), {**row, "plan": atomic.json_digest(plan)})
    return path


def publish(folder: Any, plan: Mapping[str, Any]) -> bool:
    """Writes MANIFEST.json if every shard is marked done, and returns whether all are. Any process may call it at any time.

    A manifest that says the same already stays as it is.
    """
    folder, plan = paths.parse_path(folder), atomic.plain_json(plan)
    rows = _markers(folder, plan)
    if None in rows:
        return False
    manifest = {"plan": atomic.json_digest(plan), "examples": plan["examples"], "shards": rows}
    if not _says(folder / MANIFEST, manifest):
        atomic.write_json(folder / MANIFEST, manifest)
    return True


def _says(path: Any, value: dict[str, Any]) -> bool:
    try:
        return atomic.read_json(path) == value
    except (FileNotFoundError, ValueError):
        return False


def clean(folder: Any) -> list[str]:
    """Removes the temporaries of dead writers and returns their names. Call it before this process writes."""
    folder = paths.parse_path(folder)
    stale = atomic.stale_temporaries(folder) if isinstance(folder, Path) else []
    for path in stale:
        path.unlink(missing_ok=True)
    return [path.name for path in stale]


def _write_records(draft: Path, path: Any, examples: Iterable[Mapping[str, Any]], count: int) -> None:
    """Writes, closes, syncs, re-opens and counts."""
    with _disk(path):
        writer = ArrayRecordWriter(str(draft), WRITER)
    written = 0
    for example in examples:
        written += 1
        if written > count:
            break
        blob = _encode(example)
        with _disk(path):
            writer.write(blob)
    with _disk(path):
        writer.close()
    if written != count:
        raise UserError(f"{path} takes {count} examples and was given {'more' if written > count else written}")
    atomic.sync(draft)
    if (count_on_disk := record_plan.count_records(draft)) != count:
        raise OSError(f"{path} holds {count_on_disk} of {count} examples just written: look at the disk, {AGAIN}")


@contextmanager
def _disk(path: Any) -> Iterator[None]:
    """ArrayRecord reports a failed write as a RuntimeError; it is an OSError (the examples' own errors pass by)."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {atomic.one_line(error)}") from error


def _encode(example: Mapping[str, Any]) -> bytes:
    """One example -> safetensors bytes. safetensors 0.8 writes the wrong bytes of a strided array: hence order="C"."""
    if not example or not all(isinstance(value, np.ndarray | np.generic) for value in example.values()):
        kinds = {name: type(value).__name__ for name, value in example.items()}
        raise UserError(f"a pair record is a dict of numpy arrays and this one is {kinds}")
    arrays = {name: np.asarray(value, order="C") for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            known = ", ".join(map(str, DTYPES.values()))
            raise UserError(f"a pair record's {name} is {array.dtype}, none of {known}")
    return safetensors.numpy.save(arrays)


def _decode(blob: bytes) -> dict[str, np.ndarray]:
    tensors = safetensors.deserialize(blob)
    return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in tensors}


# --- reading ----------------------------------------------------------------------------------------------------------


class PairRecords:
    """Random access to a finished folder of pairs: `len(records)`, `records[i] -> {name: array}`, `records.plan`.

    Opening demands MANIFEST.json and compares it with the plan, with the names and sizes in the folder, and with every
    shard's number of records. verify: compare hashes too, at the disk's speed, of all shards or of those named: on a pod
    each process takes some. shards: those that will be read, all by default; no other need be there.

    Raises:
        FileNotFoundError: no plan, no manifest, or a shard of it is missing.
        ValueError: a shard is short, swapped, duplicated, foreign or damaged; the one line names it.
    """

    def __init__(
        self, folder: str | os.PathLike, verify: bool | Collection[int] = True, shards: Collection[int] | None = None
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise MissingFile(f"{self.folder / MANIFEST} is missing, the records are unfinished: {AGAIN}")
        self.plan = read_plan(self.folder)
        rows = _manifest_rows(self.folder, self.plan)
        _refuse_foreign(self.folder, {row["name"] for row in rows})
        hashes, read = {row["sha256"]: row["name"] for row in rows}, range(len(rows)) if shards is None else sorted(shards)
        hashed = set(read if verify is True else verify or ())

        check = lambda i: _check_shard(self.folder / rows[i]["name"], rows[i], hashes if i in hashed else {})
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, read))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.plan["examples"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} is outside 0 .. {len(self) - 1}")
        shard, row = divmod(int(index), self.plan["shard_size"])
        try:
            return _decode(self._reader(shard).read([row])[0])
        except (RuntimeError, KeyError, ValueError, safetensors.SafetensorError) as error:
            path = self.folder / shard_name(self.plan, shard)
            atomic.check_readable(path)
            raise UserError(f"{path} is damaged at record {row} ({atomic.one_line(error)}): {REDO}") from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        """One open file per shard, opened when first read."""
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(
                    str(self.folder / shard_name(self.plan, shard)), record_plan.RANDOM_ACCESS
                )
            return self._readers[shard]


def _manifest_rows(folder: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's rows, in shard order, each compared with the plan."""
    path = folder / MANIFEST
    manifest = atomic.read_json(path)
    if manifest.get("plan") != atomic.json_digest(plan):
        raise UserError(f"{path} belongs to another plan than {folder / PLAN}: restore it, or {REDO}")
    rows = manifest.get("shards")
    if not isinstance(rows, list) or len(rows) != shard_count(plan):
        raise UserError(f"{path} does not list the plan's {shard_count(plan)} shards: {REDO}")
    for shard, row in enumerate(rows):
        if not _is_row(row, plan, shard):
            name = row.get("name") if isinstance(row, dict) else row
            expected = f"{shard_name(plan, shard)} with {len(shard_range(plan, shard))} examples"
            raise UserError(f"{path} lists {name!r} where {expected} belongs: {REDO}")
    return rows


def _refuse_foreign(folder: Path, names: set[str]) -> None:
    for path in sorted(folder.glob("*.array_record")):
        if path.name not in names:
            raise UserError(f"{path} does not belong to these records ({MANIFEST} does not name it): take it out")


def _check_shard(path: Path, row: dict[str, Any], hashes: dict[str, str]) -> None:
    """Compares one shard with its row: size, number of records and, if `hashes` {sha256: name} is given, bytes."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing: {AGAIN}")
    if path.stat().st_size != row["bytes"]:
        raise UserError(f"{path} is {path.stat().st_size} bytes long and was written with {row['bytes']}: {REDO}")
    if hashes and (digest := atomic.sha256(path)) != row["sha256"]:
        why = f"holds the bytes of {hashes[digest]}" if digest in hashes else "is damaged or foreign (its hash differs)"
        raise UserError(f"{path} {why}: {REDO}")
    if (count := record_plan.count_records(path)) != row["count"]:
        atomic.check_readable(path)  # ArrayRecord counts nothing in a file that it cannot read
        raise UserError(f"{path} holds {count} examples and was written with {row['count']}: {REDO}")


# --- markers ----------------------------------------------------------------------------------------------------------


def _markers(folder: Any, plan: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Every shard's row, or None. Reads run in parallel, since each takes its time in an object store."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda shard: _marker(folder, plan, shard), range(shard_count(plan))))


def _marker_path(folder: Any, plan: Mapping[str, Any], shard: int) -> Path:
    return folder / shard_name(plan, shard).replace(".array_record", ".done.json")


def _marker(folder: Any, plan: dict[str, Any], shard: int) -> dict[str, Any] | None:
    """A shard's row {name, count, bytes, sha256} if its marker is whole, of this plan, and the file has that size."""
    try:
        row = atomic.read_json(_marker_path(folder, plan, shard))
    except (FileNotFoundError, ValueError):
        return None
    if row.pop("plan", None) != atomic.json_digest(plan) or not _is_row(row, plan, shard):
        return None
    return row if atomic.file_size(folder / shard_name(plan, shard)) == row["bytes"] else None


def _is_row(row: Any, plan: Mapping[str, Any], shard: int) -> bool:
    expected = {"name": shard_name(plan, shard), "count": len(shard_range(plan, shard))}
    shape = {"name": str, "count": int, "bytes": int, "sha256": str}
    if not isinstance(row, dict) or {name: type(value) for name, value in row.items()} != shape:
        return False
    return all(row[name] == value for name, value in expected.items())
