"""One shard of records as an ArrayRecord file; an example as a safetensors blob, a dict of numpy arrays, in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from proreflow_jax import UserError
from proreflow_jax.storage import atomic

WRITER = "group_size:1,uncompressed"  # one record a chunk: random access; latents do not compress
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"  # how a file is opened here
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


@contextmanager
def written_draft(draft: Path, path: Any, count: int) -> Iterator[Callable[[Mapping[str, np.ndarray]], None]]:
    """A block that writes `count` examples; at its end the file is closed, synced, re-opened and counted.

    Yields: writes one example, a dict of numpy arrays. path: the shard's own, for messages.
    """
    with _disk(path):
        writer = ArrayRecordWriter(str(draft), WRITER)
    written = 0

    def write(example: Mapping[str, np.ndarray]) -> None:
        nonlocal written
        if written == count:
            raise UserError(f"{path} takes {count} examples and was given more")
        blob = encode(example)
        with _disk(path):
            writer.write(blob)
        written += 1

    yield write
    with _disk(path):
        writer.close()
    if written != count:
        raise UserError(f"{path} takes {count} examples and was given {written}")
    atomic.sync(draft)
    if (count_on_disk := count_records(draft)) != count:
        raise OSError(f"{path} holds {count_on_disk} of {count} examples just written: look at the disk, {AGAIN}")


@contextmanager
def _disk(path: Any) -> Iterator[None]:
    """ArrayRecord reports a failed write as a RuntimeError; it is an OSError (the examples' own errors pass by)."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {atomic.one_line(error)}") from error


def count_records(path: Path) -> int:
    """Returns the number of records in an ArrayRecord file; a cut or broken one counts 0."""
    try:
        reader = ArrayRecordReader(str(path), RANDOM_ACCESS)
        count = reader.num_records()
        reader.close()
    except RuntimeError:
        return 0
    return count


def encode(example: Mapping[str, Any]) -> bytes:
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


def decode(blob: bytes) -> dict[str, np.ndarray]:
    """safetensors bytes -> the example."""
    tensors = safetensors.deserialize(blob)
    return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in tensors}
