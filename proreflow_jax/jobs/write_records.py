"""What the jobs that write records share: the shards that are missing, made batch by batch, by one process or many.

All processes compute every batch together, in one order. Shards are dealt out: each process fetches and writes its own, in a
thread, while the devices go on with the next batches. A shard's records depend on their numbers alone, so the number of
processes changes no byte. A process begins a shard when its last one is marked done: a kill costs each one shard at most.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from proreflow_jax import RunFailed, UserError
from proreflow_jax.data import loader, records
from proreflow_jax.runtime import mesh, stopping
from proreflow_jax.runtime.device_clock import DeviceClock
from proreflow_jax.runtime.processes import all_arrived, broadcast, first, host_arrays
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
AHEAD = 2  # batches that lie on the devices, computed or not, while the one before them is fetched
ROOM = 1 << 30  # bytes of fetched batches that wait to be written
SEEN_S = 90.0  # until a file that another host has written is seen here: NFS remembers for a minute that there was none
Rows = Mapping[str, np.ndarray]  # of a batch, by field


class Maker(NamedTuple):
    """How a job makes records. Every batch has one shape; the last of a shard is filled up."""

    machine: Mesh
    size: int  # rows of a batch
    read: Callable[[np.ndarray], Rows]  # numbers, maybe behind the last -> this process's rows of a batch; in a thread
    compute: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]  # a batch, on the devices; whole on every process
    records: Callable[[range, Rows], Iterator[Rows]]  # numbers, what was computed -> the numbers' records; in a thread


class Part(NamedTuple):
    """What a batch holds of one shard: rows `at` of it."""

    shard: int
    numbers: range  # of its examples
    begins: bool  # the shard
    ends: bool
    own: bool  # written by this process
    at: slice


def begin_records(folder: Location, plan: dict[str, Any], flag: str = "--config.name") -> list[int]:
    """The shards that are missing, as process 0 sees them; its plan is fixed before the others go on.

    Raises UserError, one line, if the folder holds another plan, or another process does not see it there; `flag` names
    another folder.
    """

    def look() -> list[int]:
        records.fix_plan(folder, plan, flag)
        return records.missing_shards(folder, plan)

    missing, lacks = first(look), np.zeros(records.shard_count(plan), bool)
    records.clean(folder)  # each process on its own machine; none writes yet
    lacks[missing or []] = True
    lacks = broadcast(lacks)
    if not _in_time((folder / records.PLAN).exists):
        where = f"process {jax.process_index()} does not see what process 0 has written to {folder}"
        raise UserError(
            f"{where}: every process writes its own shards there, name a folder that all see by --config.root or --out"
        )
    return [int(shard) for shard in np.flatnonzero(lacks)]


def write_records(
    folder: Location,
    plan: dict[str, Any],
    missing: list[int],
    maker: Maker,
    progress: Progress,
    kept: Callable[[], None] = lambda: None,
) -> None:
    """Makes and writes the missing shards, and publishes the whole.

    progress: counts the rows that are computed. kept: called after each batch that ends a shard.
    """
    batches = shared_out(plan, missing, maker.size)
    with shard_writer(folder, plan, maker.records) as writer, DeviceClock() as clock:
        for parts, arrays in _computed(maker, batches, clock):
            if _own(parts):
                rows = host_arrays(arrays)
                for part in _own(parts):
                    writer.write(part, {name: values[part.at] for name, values in rows.items()})
            else:
                jax.block_until_ready(arrays)
            del arrays  # off the devices
            writer.check()
            progress.advance(sum(len(part.numbers) for part in parts))
            if parts[-1].ends:
                kept()
    log.info("%s: %s", progress.title, clock.line())
    all_arrived()
    first(lambda: publish_records(folder, plan))


def shared_out(plan: dict[str, Any], missing: list[int], size: int) -> list[list[Part]]:
    """The missing shards' batches in the order in which all processes compute them; shards go round the processes.

    A batch is of one shard, or holds as many whole ones as it has room for: several processes then write of it.
    """
    batches, full = [], size // plan["shard_size"]  # shards that a batch has room for
    for place, shard in enumerate(missing):
        whole, own = records.shard_range(plan, shard), place % jax.process_count() == jax.process_index()
        for begin in range(whole.start, whole.stop, size):
            numbers, at = range(begin, min(begin + size, whole.stop)), place % full * plan["shard_size"] if full > 1 else 0
            if not at:
                batches.append([])
            rows, begins, ends = slice(at, at + len(numbers)), begin == whole.start, numbers.stop == whole.stop
            batches[-1].append(Part(shard, numbers, begins, ends, own, rows))
    return batches


def numbers_of(parts: list[Part], size: int) -> np.ndarray:
    """The numbers of a batch's rows; those that fill it up lie behind the last."""
    numbers = np.concatenate([np.arange(part.numbers.start, part.numbers.stop) for part in parts])
    return np.append(numbers, numbers[-1] + np.arange(1, size - len(numbers) + 1))


def _own(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.own]


def _computed(maker: Maker, batches: list[list[Part]], clock: DeviceClock) -> Iterator[tuple[list[Part], dict[str, jax.Array]]]:
    """What is computed of each batch, in order, ready or not; the AHEAD batches behind it are sent to the devices before."""
    own, sent = mesh.own_rows(maker.machine, maker.size), deque()
    with loader.Ahead(lambda parts: maker.read(numbers_of(parts, maker.size)[own]), batches, depth=2) as inputs:
        for parts, rows in zip(batches, inputs, strict=True):
            stopping.stop_if_asked()
            batch = mesh.put_batch(maker.machine, rows, maker.size)
            arrays = clock.timed(lambda batch=batch: maker.compute(batch))
            if _own(parts):
                jax.tree.map(lambda array: array.copy_to_host_async(), arrays)
            sent.append((parts, arrays))
            if len(sent) > AHEAD:
                yield sent.popleft()
    yield from sent


class ShardWriter:
    """Writes this process's shards in a thread, one after the other; made by `shard_writer`."""

    def __init__(self, open_shard: Callable[[int], Any], recorded: Callable[[range, Rows], Iterator[Rows]]) -> None:
        self.block = ExitStack()  # of the shard under way
        self._open, self._records = open_shard, recorded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._tasks: deque[tuple[Future, int]] = deque()  # with the bytes that they hold

    def write(self, part: Part, arrays: Rows) -> None:
        """Takes a batch. Waits until the shard before is marked; and for room, where more than ROOM bytes wait."""
        if part.begins:
            self.settle(0)
        self._tasks.append((self._pool.submit(self._add, part, arrays), sum(array.nbytes for array in arrays.values())))
        self.settle(ROOM)

    def check(self) -> None:
        """Raises what the thread has raised so far."""
        while self._tasks and self._tasks[0][0].done():
            self._tasks.popleft()[0].result()

    def settle(self, room: int) -> None:
        """Waits until the batches that wait hold at most so many bytes. Raises as `check`."""
        while self._tasks and sum(held for _, held in self._tasks) > room:
            self._tasks.popleft()[0].result()

    def end(self) -> None:
        """Drops the batches that wait."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _add(self, part: Part, arrays: Rows) -> None:
        """In the thread."""
        if part.begins:
            self._write = self.block.enter_context(self._open(part.shard))
        for record in self._records(part.numbers, arrays):
            self._write(record)
        if part.ends:
            self.block.close()


@contextmanager
def shard_writer(
    folder: Location, plan: dict[str, Any], recorded: Callable[[range, Rows], Iterator[Rows]]
) -> Iterator[ShardWriter]:
    """A writer of this process's shards; the block's end waits for the last one.

    After an error, of the block or of the thread, nothing is left of the shard under way.
    """
    writer = ShardWriter(partial(records.open_shard, folder, plan), recorded)
    with writer.block:
        try:
            yield writer
            writer.settle(0)
        finally:
            writer.end()


def records_there(plan: dict[str, Any], missing: list[int]) -> int:
    """Records in the shards that are not missing."""
    return plan["examples"] - sum(len(records.shard_range(plan, shard)) for shard in missing)


def publish_records(folder: Location, plan: dict[str, Any]) -> None:
    """Writes the manifest. Raises RunFailed if a shard is missing."""
    if not _in_time(lambda: records.publish(folder, plan)):
        raise RunFailed(f"{folder}: shards are missing after the last one was made; run the same command again")


def _in_time(question: Callable[[], bool]) -> bool:
    """Whether a question is answered by yes; files of another host's are waited for, up to SEEN_S seconds."""
    until = time.monotonic() + (SEEN_S if jax.process_count() > 1 else 0.0)
    while not question():
        if time.monotonic() >= until:
            return False
        time.sleep(1.0)
    return True
