"""Tensors on disk -> parameters on a mesh: each process reads its own shards and nothing else.

A shard is a slice in our layout; its axes in torch's order (`weights.order`) make it a slice of the file. So a model that lies
over four machines is read once in all, and no host ever holds more than its part and one tensor. Where every device holds
the whole, every process must read the whole, but once, not once a device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from proreflow_jax.pretrained.weights import Shapes, Tensors, check_tensors, finite, names_today, order

Index = tuple[slice, ...]
Part = Callable[[Index], np.ndarray]  # a slice of one tensor, both in torch's layout


def place(
    tensors: Mapping[str, np.ndarray],
    shapes: Shapes,
    shardings: Mapping[str, jax.sharding.Sharding],
    origin: str,
    dtype: Any = np.float32,
) -> dict[str, jax.Array]:
    """`weights.from_torch` for arrays that are born where they live.

    Args:
      tensors: {torch name: array in torch's layout}. Those of `weights.Tensors` are read in part; of any other mapping each is
        taken whole, one at a time.
      shapes: what the network expects, from `Network.shapes`.
      shardings: {our name: where it lies}.
      origin: where the tensors come from, for the error.
      dtype: of the result.

    Raises:
      ValueError: one line with every kind of mismatch: missing, unexpected, of another shape, not finite. A number that is
        not finite is seen by the processes that read it. Names, and shapes where they stand in the file, are compared before
        anything is read.
    """
    named = names_today(tensors, shapes)
    told = [name for name in shapes if name in named] if isinstance(tensors, Tensors) else []
    found = {name: _ours(name, tensors.shape(named[name])) for name in told}
    check_tensors(origin, shapes, named, {name: shape for name, shape in found.items() if shape != shapes[name].shape}, ())
    placed, wrong, broken = {}, {}, []
    for name, expected in shapes.items():
        shape, part = _source(tensors, named[name])
        if _ours(name, shape) != expected.shape:
            wrong[name] = _ours(name, shape)
            continue
        read = _reader(name, part, dtype, broken)
        placed[name] = jax.make_array_from_callback(expected.shape, shardings[name], read, dtype=dtype)
    check_tensors(origin, shapes, named, wrong, broken)
    return placed


def _ours(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order(name, len(shape)))


def _source(tensors: Mapping[str, np.ndarray], name: str) -> tuple[tuple[int, ...], Part]:
    """(shape, how to read a part) of one tensor."""
    if isinstance(tensors, Tensors):
        return tensors.shape(name), lambda index: tensors.part(name, index)
    whole = tensors[name]
    return whole.shape, whole.__getitem__


def _reader(name: str, part: Part, dtype: Any, broken: list[str]) -> Callable[[Index], np.ndarray]:
    """The callback of one array: a slice of ours -> its numbers. Devices that hold the same slice share one reading."""
    read: dict[tuple, np.ndarray] = {}

    def callback(index: Index) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in read:
            axes = order(name, len(index))
            found = part(tuple(index[axes.index(axis)] for axis in range(len(axes)))).transpose(axes)
            if not finite(found) and name not in broken:
                broken.append(name)
            read[key] = np.ascontiguousarray(found, dtype)
        return read[key]

    return callback
