"""Global batches by position: row r of step s is item s B + r of an endless sequence of shuffled epochs.

The sequence depends on the seed and the source's length alone, not on how many processes read it or where they began,
so a resumed run needs one integer (the step) and any number of processes sees the same global batch. Each process reads
its own row range; batches are built ahead in threads, whose errors come up where the batch is taken.
"""

from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Source(Protocol):
    """Random access to examples: `len(source)` and `source[i] -> {name: array or text}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def position(step: int, row: int, batch: int) -> int:
    """Returns the place of row `row` of global batch `step` in the sequence: step * batch + row."""
    return step * batch + row


def permutation(seed: int, epoch: int, length: int) -> Int[np.ndarray, " length"]:
    """Returns the order of one epoch: the ranks of counter-based random words.

    Philox's raw words are the part of numpy's random numbers that is promised to stay the same in later releases.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(words, kind="stable")


class Loader:
    """Endless iterator over (step, {name: stacked arrays, or a list of text}) from `start_step` on; a context manager.

    Args:
        source: random access; read from several threads at once.
        batch: global batch size, B.
        seed: of the shuffling, >= 0.
        start_step: the first step to yield; nothing before it is read.
        rows: the rows of each global batch to read, this process's; all of them by default.
        prefetch: batches built ahead, each in a thread of its own.
        keep: names of the fields to keep; all of them by default.

    Raises (at once): ValueError for a size out of range or an empty source.
    Raises (where the batch is taken): what the source raised, or ValueError if examples do not stack.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        start_step: int = 0,
        rows: Sequence[int] | None = None,
        prefetch: int = 2,
        keep: Collection[str] | None = None,
    ) -> None:
        _check_sizes(len(source), batch, seed, start_step, prefetch)
        self._source, self._batch, self._seed, self._length = source, batch, seed, len(source)
        self._rows = range(batch) if rows is None else rows
        self._keep = keep
        self._epoch: tuple[int, np.ndarray] | None = None  # the current epoch and its order
        self._next_step = start_step
        self._ahead: deque[tuple[int, Future]] = deque()
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(prefetch, thread_name_prefix="loader")
        self._open = True

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[int, dict[str, Any]]:
        if not self._open:
            raise StopIteration
        while len(self._ahead) <= self._prefetch:
            indices = [self.index(self._next_step, row) for row in self._rows]
            self._ahead.append((self._next_step, self._pool.submit(_collect, self._source, indices, self._keep)))
            self._next_step += 1
        step, future = self._ahead.popleft()
        try:
            return step, future.result()
        except BaseException:
            self.close()
            raise

    def index(self, step: int, row: int) -> int:
        """Returns which example of the source row `row` of global batch `step` is."""
        epoch, place = divmod(position(step, row, self._batch), self._length)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(self._seed, epoch, self._length))
        return int(self._epoch[1][place])

    def close(self) -> None:
        """Ends the iteration: batches not begun are dropped, those being built are waited for."""
        self._open = False
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_sizes(length: int, batch: int, seed: int, start_step: int, prefetch: int) -> None:
    if start_step < 0:
        raise ValueError(f"start_step = {start_step} must be at least 0")
    for flag, value, least in (("train.batch", batch, 1), ("seed", seed, 0), ("data.prefetch", prefetch, 1)):
        if value < least:
            raise ValueError(f"{flag} = {value} must be at least {least}: set --config.{flag}")
    if length == 0:
        raise ValueError("the data source is empty: look at --config.data.path and --config.data.split")


def _collect(source: Source, indices: Sequence[int], keep: Collection[str] | None) -> dict[str, Any]:
    """Reads the examples of one batch and stacks them field by field."""
    examples = [source[index] for index in indices]
    names = list(examples[0]) if keep is None else list(keep)
    return {name: _stack(name, examples, indices) for name in names}


def _stack(name: str, examples: Sequence[dict[str, Any]], indices: Sequence[int]) -> np.ndarray | list[str]:
    for index, example in zip(indices, examples, strict=True):
        if name not in example:
            raise ValueError(f"example {index} has no field {name!r}, it has {sorted(example)}: look at --config.data")
    values = [example[name] for example in examples]
    if isinstance(values[0], str):
        return values
    first = np.asarray(values[0])
    for index, value in zip(indices, values, strict=True):
        if np.shape(value) != first.shape or np.asarray(value).dtype != first.dtype:
            raise ValueError(
                f"example {index} has {name} of {np.asarray(value).dtype}{np.shape(value)} and example {indices[0]} "
                f"of {first.dtype}{first.shape}: one batch needs one shape, look at --config.data.resolution"
            )
    return np.stack(values)
