"""Arrays held as one: nothing is lost, nothing moves between devices, what lives or decays differently lies apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from proreflow_jax.runtime import mesh, stacks

SHAPES = {"a.weight": (4, 8), "a.bias": (8,), "b.weight": (4, 8), "b.bias": (8,), "c.weight": (8, 4), "d.bias": (8,)}
KINDS = {name: name.endswith("weight") for name in SHAPES} | {"d.bias": "other"}
TABLE = {"a.weight": ("a.weight", "b.weight"), "a.bias": ("a.bias", "b.bias"), "c.weight": ("c.weight",), "d.bias": ("d.bias",)}


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema: dict
    moments: tuple


def params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def state(put=jnp.asarray) -> State:
    made = [jax.tree.map(put, params(seed)) for seed in range(3)]
    return State(jnp.int32(3), made[0], {}, ({"mu": made[1], "nu": made[2]},))


def same(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_arrays_of_one_shape_and_kind_lie_together_in_the_order_of_their_names():
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    assert stacks.stack_table(shapes, KINDS) == TABLE
    half = shapes | {"b.bias": jax.ShapeDtypeStruct((8,), jnp.bfloat16)}
    assert stacks.stack_table(half, KINDS)["b.bias"] == ("b.bias",)


def test_a_state_in_stacks_is_the_state_and_other_dicts_stay():
    held = stacks.stack(state(), TABLE)
    assert held.params["a.weight"].shape == (2, 4, 8) and set(held.moments[0]["mu"]) == set(TABLE)
    np.testing.assert_array_equal(held.params["a.weight"][1], state().params["b.weight"])
    assert held.ema == {} and held.step == 3
    same(stacks.unstack(held, TABLE), state())
    other = {"x": {"a.weight": jnp.ones(2)}}
    same(stacks.stack(other, TABLE), other)
    same(stacks.stack(state()), state())


@pytest.mark.parametrize("consume", [False, True])
def test_on_devices_every_stack_lies_where_its_arrays_lay(consume):
    machine = mesh.make_mesh(1, 4, devices=jax.devices()[:4])
    where = {
        name: NamedSharding(machine, PartitionSpec(*(("fsdp" if d == 0 else None) for d in range(len(s)))))
        for name, s in SHAPES.items()
    }
    given = State(jnp.int32(3), jax.device_put(params(0), where), {}, ())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)
    held = stacks.stack_arrays(given, TABLE, dtype=jnp.bfloat16, consume=consume)
    said = stacks.stack_shapes(shapes, TABLE, dtype=jnp.bfloat16)
    assert said.params["a.weight"].sharding.spec == PartitionSpec(None, "fsdp", None)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    assert described(held.params) == described(said.params)
    assert all(x.is_deleted() == consume for x in given.params.values())
    back = stacks.unstack_arrays(held, TABLE)
    same(back.params, {name: value.astype(jnp.bfloat16) for name, value in params(0).items()})
    assert all(back.params[name].sharding == where[name] for name in SHAPES)
    again = stacks.stack_arrays(back, TABLE)
    assert described(again.params) == described(held.params)


def test_a_stack_may_lie_whole_on_every_device_wherever_its_arrays_lie():
    machine = mesh.make_mesh(1, 4, devices=jax.devices()[:4])
    where = {name: NamedSharding(machine, PartitionSpec("fsdp")) for name in SHAPES}
    given = jax.device_put(params(0), where)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in given.items()}
    held, said = stacks.stack_arrays(given, TABLE, whole=True), stacks.stack_shapes(shapes, TABLE, whole=True)
    assert {name: x.sharding for name, x in held.items()} == {name: x.sharding for name, x in said.items()}
    assert all(x.sharding.is_fully_replicated for x in held.values())
    same(stacks.unstack(held, TABLE), params(0))
