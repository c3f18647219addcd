"""Global batches by position: row r of step s is item s B + r of an endless sequence of shuffled epochs.

In G groups a source and a batch are cut alike, into G equal runs: rows of the g-th run of every batch are items of the
g-th run of the source, shuffled in itself. So whoever reads some rows needs their groups' examples alone. One group is the
plain sequence.

The sequence depends on the seed, the source's length and the groups alone. So a resumed run needs one integer (the step), and
any number of processes sees the same global batch. Each process reads its own rows. Threads build batches ahead; their errors
are raised where the batch is taken. Threads are enough: the codecs decode without Python's lock (docs/data.md has the numbers).
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from proreflow_jax import UserError


@runtime_checkable
class Source(Protocol):
    """Random access to examples: `len(source)` and `source[i] -> {name: array or text}`.

    A source that reads many at once better than one by one may have `read_many(indices) -> [example]` too.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@lru_cache(maxsize=2)  # an order of 10 million takes seconds, and every batch asks for it
def permutation(seed: int, epoch: int, length: int, groups: int = 1) -> Int[np.ndarray, " length"]:
    """Returns the order of one epoch: the ranks of counter-based random words, group after group of equal length.

    The array is cached, and so read-only. Philox's raw words are the part of numpy's random numbers that is promised to stay
    the same in later releases.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    runs = np.argsort(words.reshape(groups, -1), axis=1, kind="stable")
    order = (runs + np.arange(groups)[:, None] * (length // groups)).reshape(-1)
    order.flags.writeable = False
    return order


def epoch_places(numbers: Iterable[int], seed: int, length: int) -> list[int]:
    """Returns which examples of a source of that length the numbers of the sequence are."""
    split = [divmod(int(number), length) for number in numbers]
    return [int(permutation(seed, epoch, length)[place]) for epoch, place in split]


def row_group(row: int, batch: int, groups: int) -> int:
    """Returns the group of a row of every global batch; groups divide the batch."""
    return row * groups // batch


def batch_places(step: int, rows: Iterable[int], batch: int, seed: int, length: int, groups: int = 1) -> list[int]:
    """Returns which examples of a source of that length some rows of global batch `step` are; groups divide both."""
    size, each = batch // groups, length // groups

    def place(row: int) -> int:
        epoch, at = divmod(step * size + row % size, each)
        return int(permutation(seed, epoch, length, groups)[row_group(row, batch, groups) * each + at])

    return [place(int(row)) for row in rows]


def read_items(source: Source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns examples in the order of the indices, by the source's own `read_many` where it has one."""
    many = getattr(source, "read_many", None)
    return many(indices) if many else [source[index] for index in indices]


class Threaded:
    """A source with several threads that read and decode examples; Pillow decodes without Python's lock.

    Args:
        source: random access, read from several threads at once.
        threads: number of threads, >= 1. They end with the process.
    """

    def __init__(self, source: Any, threads: int) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoder")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def read_many(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples in the order of the indices. Raises the source's error for the first bad one."""
        return list(self._pool.map(self._source.__getitem__, indices))


class Ahead:
    """Iterator over make(number) of `numbers`, in their order. Threads make some results ahead.

    Args:
        make: from a number, in a thread; several may run at once.
        numbers: consumed as far as results are made.
        depth: results made ahead, each in a thread of its own.

    A context manager. Raises (where the result is taken): what `make` raised; the iteration is then over.
    """

    def __init__(self, make: Callable[[int], Any], numbers: Iterable[int], depth: int) -> None:
        self._make, self._numbers, self._depth = make, iter(numbers), depth
        self._made: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="loader")
        self._open = True

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        if not self._open:
            raise StopIteration
        while len(self._made) <= self._depth and (number := next(self._numbers, None)) is not None:
            self._made.append(self._pool.submit(self._make, number))
        if not self._made:
            self.close()
            raise StopIteration
        try:
            return self._made.popleft().result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the iteration: drops results that are not begun, waits for the others."""
        self._open = False
        self._made.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Loader(Ahead):
    """Endless iterator over (step, {name: stacked arrays, or a list of text}) from `start_step` on; a context manager.

    Args:
        source: random access; read from several threads at once.
        batch: global batch size, B.
        seed: of the shuffling, >= 0.
        start_step: the first step to yield; nothing before it is read.
        rows: the rows of each global batch to read, this process's; all of them by default.
        groups: that source and batch are cut into; they divide both.
        prefetch: batches built ahead, each in a thread of its own.
        keep: names of the fields to keep; all of them by default.

    Raises (at once): ValueError for a size out of range or an empty source.
    Raises (where the batch is taken): the source's error, or ValueError if examples do not stack.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        *,
        start_step: int = 0,
        rows: Sequence[int] | None = None,
        groups: int = 1,
        prefetch: int = 2,
        keep: Collection[str] | None = None,
    ) -> None:
        _check_sizes(len(source), batch, seed, start_step, prefetch)
        mine = range(batch) if rows is None else rows

        def make(step: int) -> tuple[int, dict[str, Any]]:
            indices = batch_places(step, mine, batch, seed, len(source), groups)
            return step, _collect(source, indices, keep)

        super().__init__(make, count(start_step), prefetch)


def rows_per_second(batches: Iterator[Any], steps: int, rows: int) -> float:
    """Reads `steps` batches of `rows` rows as fast as possible: the rate of one process's input, for benchmarks.

    The first batch is read before the clock starts. Take many steps: a loader has made a few of them by then.
    """
    next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * rows / (time.perf_counter() - start)


def _check_sizes(length: int, batch: int, seed: int, start_step: int, prefetch: int) -> None:
    if start_step < 0:
        raise UserError(f"start_step = {start_step} must be at least 0")
    for flag, value, least in (("train.batch", batch, 1), ("seed", seed, 0), ("data.prefetch", prefetch, 1)):
        if value < least:
            raise UserError(f"{flag} = {value} must be at least {least}: set --config.{flag}")
    if length == 0:
        raise UserError("the data source is empty: look at --config.data.path and --config.data.split")


def _collect(source: Source, indices: Sequence[int], keep: Collection[str] | None) -> dict[str, Any]:
    """Reads the examples of one batch and stacks them field by field."""
    examples = read_items(source, indices)
    names = list(examples[0]) if keep is None else list(keep)
    return {name: _stack(name, examples, indices) for name in names}


def _stack(name: str, examples: Sequence[dict[str, Any]], indices: Sequence[int]) -> np.ndarray | list[str]:
    for index, example in zip(indices, examples, strict=True):
        if name not in example:
            raise UserError(f"example {index} has no field {name!r}, it has {sorted(example)}: look at --config.data")
    values = [example[name] for example in examples]
    if isinstance(values[0], str):
        return values
    first = np.asarray(values[0])
    for index, value in zip(indices, values, strict=True):
        if np.shape(value) != first.shape or np.asarray(value).dtype != first.dtype:
            raise UserError(
                f"example {index} has {name} of {np.asarray(value).dtype}{np.shape(value)} and example {indices[0]} "
                f"of {first.dtype}{first.shape}: one batch needs one shape, look at --config.data.resolution"
            )
    return np.stack(values)
