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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from array_record.python.array_record_module import ArrayRecordReader

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import record_file
from proreflow_jax.data.record_file import AGAIN
from proreflow_jax.data.record_plan import PLAN, fix_plan, read_plan, shard_count, shard_name, shard_range
from proreflow_jax.storage import atomic, paths

__all__ = [
    "PLAN",
    "PairRecords",
    "clean",
    "fix_plan",
    "missing_shards",
    "open_shard",
    "publish",
    "read_plan",
    "shard_count",
    "shard_name",
    "shard_range",
    "write_shard",
]

MANIFEST = "MANIFEST.json"
REDO = f"delete it and {AGAIN}"


# --- writing ----------------------------------------------------------------------------------------------------------


def missing_shards(folder: Any, plan: Mapping[str, Any]) -> list[int]:
    """Returns the shards without a valid marker, ascending: the remaining work."""
    plan = atomic.plain_json(plan)
    return [shard for shard, row in enumerate(_markers(paths.parse_path(folder), plan)) if row is None]


def write_shard(folder: Any, plan: Mapping[str, Any], shard: int, examples: Iterable[Mapping[str, np.ndarray]]) -> Any:
    """Writes one whole shard of these examples, those of `shard_range(plan, shard)` in this order. Raises as `open_shard`."""
    with open_shard(folder, plan, shard) as write:
        for example in examples:
            write(example)
    return paths.parse_path(folder) / shard_name(plan, shard)


@contextmanager
def open_shard(folder: Any, plan: Mapping[str, Any], shard: int) -> Iterator[Callable[[Mapping[str, np.ndarray]], None]]:
    """A block that writes one whole shard and marks it done at its end; equal examples give equal bytes, whoever writes them.

    Args:
        folder: holds a plan, by `fix_plan`.
        plan: that plan.
        shard: which shard; its examples are those of `shard_range(plan, shard)`, in this order.

    Yields: writes one example, a dict of numpy arrays. Another thread than the block's may call it.

    Raises:
        ValueError: too few or too many examples, or one that is not a dict of arrays of known dtypes.
        OSError: the shard could not be written (a full disk, say); nothing is marked, no temporary is left.
    """
    folder, plan, count = paths.parse_path(folder), atomic.plain_json(plan), len(shard_range(plan, shard))
    path = folder / shard_name(plan, shard)
    with atomic.drafted(path) as draft:
        with record_file.written_draft(draft, path, count) as write:
            yield write
        row = {"name": path.name, "count": count, "bytes": draft.stat().st_size, "sha256": atomic.sha256(draft)}
    atomic.write_json(_marker_path(folder, plan, shard), {**row, "plan": atomic.json_digest(plan)})


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
            return record_file.decode(self._reader(shard).read([row])[0])
        except (RuntimeError, KeyError, ValueError, safetensors.SafetensorError) as error:
            path = self.folder / shard_name(self.plan, shard)
            atomic.check_readable(path)
            raise UserError(f"{path} is damaged at record {row} ({atomic.one_line(error)}): {REDO}") from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        """One open file per shard, opened when first read."""
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(
                    str(self.folder / shard_name(self.plan, shard)), record_file.RANDOM_ACCESS
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
    if (count := record_file.count_records(path)) != row["count"]:
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
