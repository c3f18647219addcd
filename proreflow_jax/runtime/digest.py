"""A 64-bit digest per leaf that does not depend on how the leaf is split over devices.

Each value's bits are mixed with its position and the results are summed modulo 2^32, twice with different mixing.
Sums of integers commute, so 1, 2, 4 and 8 devices agree bit for bit; for a fixed position the mixing is a
bijection, so a single wrong value is always seen. The mixing is the finaliser of MurmurHash3 (Appleby, public
domain). It runs on the device that holds the values: nothing but two integers per leaf reaches the host, which mixes small
leaves of its own memory itself.
"""

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from proreflow_jax import UserError
from proreflow_jax.storage.sealed import is_sealed, with_seal

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
GOLDEN = np.uint32(0x9E3779B9)
SMALL = 1 << 17  # numbers of a leaf that the host mixes while XLA would still compile for its shape


def named_leaves(tree: PyTree) -> dict[str, jax.Array]:
    """{path: leaf} with paths like `params/conv_in.weight`; numpy and Python scalars become jax arrays.

    Raises ValueError if two leaves share a path or jax cannot hold a leaf's dtype (float64 without x64).
    """
    pairs = [(leaf_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    leaves = {path: _as_array(path, leaf) for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise UserError("two leaves of the state have the same path: rename a key that contains '/'")
    return leaves


def leaf_path(path: tuple) -> str:
    """A jax key path as `a/b/0`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def digest(tree: PyTree) -> dict[str, str]:
    """{path of leaf: 16 hex digits} over value bits, positions, shape and dtype."""
    leaves = named_leaves(tree)
    sums = jax.device_get({path: _host_sums(leaf) or _drained(_sums(leaf)) for path, leaf in leaves.items()})
    return {path: _hex(leaves[path], sums[path]) for path in leaves}


def fold(digests: Mapping[str, str]) -> str:
    """One hex digest (64 digits) of all leaves and their names, for lineage."""
    text = "\n".join(f"{path} {digests[path]}" for path in sorted(digests))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _host_sums(leaf: jax.Array) -> tuple[np.uint32, np.uint32] | None:
    """What `_sums` says of a small leaf that lies whole in the host's memory; None of any other."""
    plain = leaf.dtype != jnp.bool_ and leaf.dtype.itemsize in UNSIGNED and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    here = leaf.is_fully_addressable and leaf.is_fully_replicated and {d.platform for d in leaf.devices()} == {"cpu"}
    if leaf.size > SMALL or not plain or not here:
        return None
    bits = np.asarray(leaf).reshape(-1).view(UNSIGNED[leaf.dtype.itemsize]).astype(np.uint32)
    key = _mix(np.arange(bits.size, dtype=np.uint32) + GOLDEN)
    return tuple(np.sum(_mix(mixed), dtype=np.uint32) for mixed in (bits ^ key, bits + key * GOLDEN))


@jax.jit
def _sums(leaf: Shaped[Array, "..."]) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    bits = _bits(leaf)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for d, length in enumerate(bits.shape):
        position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)

    key = _mix(position + GOLDEN)
    first = jnp.sum(_mix(bits ^ key), dtype=jnp.uint32)
    second = jnp.sum(_mix(bits + key * GOLDEN), dtype=jnp.uint32)
    return first, second


def _bits(leaf: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The values' bits as uint32; 8-byte types get a trailing dimension of 2."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = UNSIGNED.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mix(h: UInt32[Array | np.ndarray, "..."]) -> UInt32[Array | np.ndarray, "..."]:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _hex(leaf: jax.Array, sums: tuple) -> str:
    kind = zlib.crc32(f"{leaf.dtype}{leaf.shape}".encode("ascii"))
    first, second = (int(s) ^ kind for s in sums)
    return f"{first:08x}{second:08x}"


def _drained(sums: tuple) -> tuple:
    """On CPU, one collective at a time: with fewer threads than devices, queued ones wait for each other for ever."""
    return jax.block_until_ready(sums) if jax.default_backend() == "cpu" else sums


def _as_array(path: str, leaf: object) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return leaf
    array = jnp.asarray(leaf)
    if isinstance(leaf, np.ndarray | np.generic) and array.dtype != leaf.dtype:
        raise UserError(f"{path} is {leaf.dtype}, which jax would store as {array.dtype}: convert it first")
    return array


def inventory(step: int, leaves: Mapping[str, jax.Array], digests: Mapping[str, str], meta: Any) -> dict[str, Any]:
    """{step, meta, leaves: {path: [dtype, shape, digest]}, seal}. Raises TypeError if `meta` is no JSON."""
    table = {path: [str(leaf.dtype), list(leaf.shape), digests[path]] for path, leaf in leaves.items()}
    return with_seal({"step": step, "meta": meta, "leaves": table})


def check_seal(record: Mapping[str, Any], step: int) -> None:
    """Raises ValueError if the inventory is damaged or belongs to another step."""
    if not is_sealed(record):
        raise UserError("meta is not what was saved")
    if record["step"] != step:
        raise UserError(f"it is the checkpoint of step {record['step']} under another name")


def check_target(record: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str, part: bool = False) -> None:
    """Raises one UserError that lists every missing, unexpected and different leaf; `where` opens the sentence.

    With `part` a leaf that is not among `wanted` is no fault.
    """
    table = {path: (dtype, shape) for path, (dtype, shape, _) in record["leaves"].items()}
    kinds = {path: (str(leaf.dtype), list(leaf.shape)) for path, leaf in wanted.items()}
    faults = [
        *(f"{path} is missing" for path in sorted(kinds.keys() - table.keys())),
        *(f"{path} is not expected" for path in sorted(table.keys() - kinds.keys()) if not part),
        *(
            f"{path} is {table[path][0]}{table[path][1]}, not {kinds[path][0]}{kinds[path][1]}"
            for path in sorted(kinds.keys() & table.keys())
            if table[path] != kinds[path]
        ),
    ]
    if faults:
        raise UserError(f"{where} does not fit this config: {', '.join(faults)}; use the config it was trained with")


def wrong_values(record: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    """Paths of the leaves that were read and whose digest is not the one that was saved."""
    return [path for path, digest in digests.items() if record["leaves"][path][2] != digest]
