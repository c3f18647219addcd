"""The digest: the same on any split, different for any single wrong bit, moved value, dtype or shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from proreflow_jax.runtime import digest as digest_lib
from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.digest import digest, fold

VALUES = np.random.default_rng(0).standard_normal((8, 16, 4))
DTYPES = ["float32", "float16", "bfloat16", "int32", "int8", "uint32", "bool", "complex64"]


def one(array: object) -> str:
    return digest({"x": array})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_on_every_number_of_devices_and_every_axis(dtype: str) -> None:
    array = np.asarray(VALUES * 50, dtype)
    found = {one(array)}
    for devices in (1, 2, 4, 8):
        mesh = mesh_lib.make_mesh(data=1, fsdp=devices, devices=jax.devices()[:devices])
        for spec in [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec()]:
            found.add(one(jax.device_put(array, NamedSharding(mesh, spec))))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_and_the_devices_agree(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.asarray(VALUES * 50, dtype), np.asarray(3, dtype), np.zeros((0, 4), dtype), np.asarray(VALUES[:, 0].T, dtype)]
    by_host = [one(array) for array in arrays]
    monkeypatch.setattr(digest_lib, "SMALL", -1)
    assert [one(array) for array in arrays] == by_host


def test_any_single_bit_changes_it() -> None:
    array = np.asarray(VALUES[0, 0], np.float32)
    bits = array.view(np.uint32)
    found = {one(array)}
    for position in range(4):
        for bit in range(32):
            changed = bits.copy()
            changed[position] ^= np.uint32(1) << np.uint32(bit)
            found.add(one(changed.view(np.float32)))
    assert len(found) == 1 + 4 * 32


def test_the_sign_of_zero_and_the_payload_of_nan_count() -> None:
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert one(np.float32(0.0)) != one(np.float32(-0.0))
    assert one(nan[:1]) != one(nan[1:])


def test_position_shape_dtype_and_name_count() -> None:
    row = np.arange(6, dtype=np.int32)
    different = [row, row[::-1].copy(), np.roll(row, 1), row.reshape(2, 3), row.reshape(3, 2), row.astype(np.uint32)]
    assert len({one(array) for array in different}) == len(different)
    assert len({one(np.zeros(n, np.float32)) for n in range(5)}) == 5
    assert fold(digest({"a": row})) != fold(digest({"b": row}))


def test_two_swapped_rows_are_seen() -> None:
    array = np.asarray(VALUES[0], np.float32)
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert one(array) != one(swapped)


def test_fold_does_not_depend_on_order() -> None:
    digests = digest({"a": jnp.ones(2), "b": {"c": jnp.zeros(3)}, "d": 3})
    assert set(digests) == {"a", "b/c", "d"} and all(len(value) == 16 for value in digests.values())
    assert fold(digests) == fold(dict(reversed(digests.items())))


def test_what_jax_would_change_in_silence_is_refused() -> None:
    with pytest.raises(ValueError, match="x is float64, which jax would store as float32"):
        digest({"x": np.zeros(2)})
    with pytest.raises(ValueError, match="same path"):
        digest({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
