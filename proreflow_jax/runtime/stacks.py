"""Arrays of one shape held as one: a call of a jitted function then hands over a few hundred arrays in place of thousands.

A call costs the host microseconds an array of any size. SD 1.5's state has 2,744 arrays, of 49 shapes in each of its four
trees. So a training loop keeps its state in stacks; at rest, and in a network, every array has its own name.

A table groups the names of a flat dict {name: array}: {first name: names in the order of the stack's leading axis}.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

Table = Mapping[str, tuple[str, ...]]


def stack_table(shapes: Mapping[str, Any], kinds: Mapping[str, Hashable]) -> Table:
    """The table of a dict: arrays of one shape, dtype and kind (such as their sharding) lie together."""
    groups: dict[Hashable, list[str]] = {}
    for name, value in shapes.items():
        groups.setdefault((tuple(value.shape), jnp.dtype(value.dtype), kinds[name]), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def stack(tree: PyTree, *tables: Table) -> PyTree:
    """The tree with stacks in place of each flat dict that has a table's names: (n, ...) by the first of n names."""
    return _each(tree, {frozenset(_names(t)): partial(_joined, table=t) for t in tables})


def unstack(tree: PyTree, *tables: Table) -> PyTree:
    """The inverse of `stack`."""
    return _each(tree, {frozenset(t): partial(_apart, table=t) for t in tables})


def stack_shapes(tree: PyTree, *tables: Table, dtype: Any = None, whole: bool = False) -> PyTree:
    """`stack_arrays` of `jax.ShapeDtypeStruct` with NamedShardings."""
    return _each(tree, {frozenset(_names(t)): partial(_joined_shapes, table=t, dtype=dtype, whole=whole) for t in tables})


def stack_arrays(tree: PyTree, *tables: Table, dtype: Any = None, whole: bool = False, consume: bool = False) -> PyTree:
    """`stack` of arrays on their devices, one dict after the other: the leading axis is whole, the others live as they did.

    dtype: of the stacks; None: the arrays' own.
    whole: each device holds all of every stack.
    consume: delete the arrays of a dict as soon as it is stacked.
    """

    def put(params: Mapping[str, jax.Array], table: Table) -> dict[str, jax.Array]:
        places = tuple((first, _behind_one(params[first].sharding, whole)) for first in table)
        stacked = _program(_joined, tuple(table.items()), dtype, places)(dict(params))
        if consume:
            jax.tree.map(lambda x: x.delete(), dict(params))
        return stacked

    return _each(tree, {frozenset(_names(t)): partial(put, table=t) for t in tables})


def unstack_arrays(tree: PyTree, *tables: Table) -> PyTree:
    """The inverse of `stack_arrays`, beside the stacks, which stay."""

    def put(stacks: Mapping[str, jax.Array], table: Table) -> dict[str, jax.Array]:
        where = {first: stacks[first].sharding for first in table}
        whole = {first: NamedSharding(place.mesh, PartitionSpec(*place.spec[1:])) for first, place in where.items()}
        places = tuple((name, whole[first]) for first, names in table.items() for name in names)
        return _program(_apart, tuple(table.items()), None, places)(dict(stacks))

    return _each(tree, {frozenset(t): partial(put, table=t) for t in tables})


@cache
def _program(function: Callable, table: tuple, dtype: Any, places: tuple) -> Callable:
    """One for all dicts that are alike: trees of a state, stages of a chain."""
    return jax.jit(partial(function, table=dict(table), dtype=dtype), out_shardings=dict(places))


def _behind_one(place: NamedSharding, whole: bool) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec() if whole else PartitionSpec(None, *place.spec))


def _names(table: Table) -> list[str]:
    return [name for names in table.values() for name in names]


def _joined(params: Mapping[str, jax.Array], table: Table, dtype: Any = None) -> dict[str, jax.Array]:
    one = lambda name: params[name].astype(dtype or params[name].dtype)
    return {first: jnp.stack([one(name) for name in names]) for first, names in table.items()}


def _apart(stacks: Mapping[str, jax.Array], table: Table, dtype: None = None) -> dict[str, jax.Array]:
    return {name: stacks[first][i] for first, names in table.items() for i, name in enumerate(names)}


def _joined_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct], table: Table, dtype: Any, whole: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    def one(member: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *member.shape), dtype or member.dtype, sharding=_behind_one(member.sharding, whole))

    return {first: one(shapes[first], len(names)) for first, names in table.items()}


def _each(tree: PyTree, functions: Mapping[frozenset, Callable]) -> PyTree:
    """The tree, each dict of these names replaced by the function's result."""
    known = lambda node: isinstance(node, Mapping) and frozenset(node) in functions
    return jax.tree.map(lambda node: functions[frozenset(node)](node) if known(node) else node, tree, is_leaf=known)
