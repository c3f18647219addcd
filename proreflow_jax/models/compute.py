"""The way networks are computed: form of attention, arrays kept for the backward pass, devices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

ATTENTION = "attention"  # name of attention's outputs, for policies that keep them
SAVED = jax.checkpoint_policies


def in_turn(blocks: Sequence[Any], call: Callable[[Any, Array], Array], h: Array) -> Array:
    """call(block, h) for one block after the other."""
    for block in blocks:
        h = call(block, h)
    return h


class Compute(NamedTuple):
    """A network's machine: static values from the config and the mesh."""

    attention: str = "xla"  # one of FORMS; "auto": by platform and shape, see `choose`
    remat: str = "none"  # one of POLICIES: arrays that the backward pass recomputes
    platform: str = "cpu"  # of the devices that will run it: "cpu", "gpu", "tpu"
    mesh: Mesh | None = None  # axes data, fsdp (rows) and tensor (heads); None: one device
    repeat: Callable[..., Array] = in_turn  # how a row of equal blocks is run


PLAIN = Compute()


def _products(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Convolutions and products with weights are kept; scores are not, as their products have batch axes."""
    keeps_products = SAVED.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or keeps_products(primitive, *arguments, **parameters)


POLICIES: dict[str, Any] = {  # kept by the forward pass of each ResNet and transformer block, beside its inputs
    "none": None,  # all that the backward pass reads
    "products": SAVED.save_from_both_policies(_products, SAVED.save_only_these_names(ATTENTION)),
    "attention": SAVED.save_only_these_names(ATTENTION),
    "inputs": SAVED.nothing_saveable,
}


def rerun(remat: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs). The backward pass recomputes what POLICIES[remat] does not keep. Without one it costs nothing."""
    if remat == "none":
        return function(*inputs)
    return jax.checkpoint(function, policy=POLICIES[remat])(*inputs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(weight: Float[Array, "..."], mesh: Mesh) -> Float[Array, "..."]:
    """A weight whole on every device, where it is used; its gradient is whole too before it goes to wherever the state lies.

    Without it XLA multiplies by the pieces of a sharded weight in turn, which costs a transformer block 3.7 times the cycles;
    and works out its gradient in as many pieces as there are devices, narrower than the matrix unit: 1.7 to 1.8 times.
    """
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))


gather.defvjp(lambda weight, mesh: (gather(weight, mesh), None), lambda mesh, _, gradient: (gather(gradient, mesh),))
