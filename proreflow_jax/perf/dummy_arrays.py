"""Random arrays with the true shapes and shardings, for benchmarks.

Weights keep activations near one. Only moments, biases and counters are all zeros: a chip draws less power, and is faster, on
zeros.
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from proreflow_jax.run.experiment import Experiment

MOMENTS = ("mu", "nu")  # of optax: zeros at the first step
SPREAD = math.sqrt(3)  # of a uniform number between -1 and 1, to make its variance one
TINY = 8  # numbers on each device of an array whose values and size do not matter


def filled(experiment: Experiment, shapes: Any) -> Any:
    """A job's arguments: a tree of `jax.ShapeDtypeStruct` with shardings (from `perf.jobs`) -> arrays.

    Weights are random by rank and name, ids lie in the encoders' vocabularies, images are noise, keys are keys, the student
    has one window; other integers are 0.
    """
    words = min(experiment.base.networks[name].config["vocab_size"] for name in experiment.base.text)
    return jax.tree_util.tree_map_with_path(partial(_drawn, words=words), shapes)


def _drawn(path: tuple, shape: jax.ShapeDtypeStruct, words: int) -> jax.Array:
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path] or [""]
    like = shape.shape, shape.dtype, shape.sharding
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), shape.sharding)
    if names[-1] == "windows":
        return _full(*like)(1)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        below = 256 if shape.dtype == jnp.uint8 else words if names[-1] in ("ids", "empty") else 1
        return _integers(*like)(jax.random.key(1), below)
    if not shape.shape or len(shape.shape) == 1 or set(names) & set(MOMENTS):
        return _full(*like)(float(names[-1].endswith("weight") and not set(names) & set(MOMENTS)))
    inputs = math.prod(shape.shape[:-1]) if "." in names[-1] else 1  # a parameter's name has dots
    return _uniform(*like)(jax.random.key(2), SPREAD / math.sqrt(inputs))


@cache
def _integers(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    make = lambda key, below: jax.random.randint(key, shape, 0, below, jnp.int32).astype(dtype)
    return jax.jit(make, out_shardings=place)


@cache
def _full(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    return jax.jit(lambda value: jnp.full(shape, value, dtype), out_shardings=place)


@cache
def _uniform(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    make = lambda key, most: (most * jax.random.uniform(key, shape, jnp.float32, -1, 1)).astype(dtype)
    return jax.jit(make, out_shardings=place)


def tiny(shapes: Any) -> Any:
    """The same tree with the same names and kinds of shardings, of arrays of 8 numbers a device; keys stay keys."""
    return jax.tree.map(_tiny, shapes)


def _tiny(shape: jax.ShapeDtypeStruct) -> jax.Array:
    place = shape.sharding
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), place)
    axes = [axis for entry in place.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    split = NamedSharding(place.mesh, PartitionSpec(tuple(axes)) if axes else PartitionSpec())
    return _full((TINY * place.mesh.size,), shape.dtype, split)(0)
