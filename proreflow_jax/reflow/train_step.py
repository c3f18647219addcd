"""What training carries from step to step, and the update that every job of this project shares.

A job brings two pure functions: `draw(frozen, batch, key)` makes whatever is random (noise, times, the teacher's pairs) for the
whole global batch, and `loss(params, examples)` is deterministic. So gradients accumulated over parts of a batch are those
of the whole, and one key per run is enough: it is folded with the step here and nowhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from proreflow_jax.models.network import Params
from proreflow_jax.runtime import mesh as meshes
from proreflow_jax.runtime import stacks
from proreflow_jax.runtime.optimizer import ema
from proreflow_jax.runtime.stacks import Table

Batch = Mapping[str, Array]
Draw = Callable[[PyTree, Batch, Key[Array, ""]], dict[str, PyTree]]
Loss = Callable[[Params, Mapping[str, PyTree]], tuple[Float[Array, ""], PyTree]]


class TrainState(NamedTuple):
    """Master weights and everything that must survive a kill; `ema` is empty when the config turns it off."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: PyTree


def averaged(state: TrainState) -> Params:
    """The weights to hand on: the average where there is one."""
    return state.ema or state.params


def init_state(params: Params, optimizer: optax.GradientTransformation, average: bool) -> TrainState:
    """A fresh state around `params`; their average starts as a copy of them."""
    copy = {name: jnp.array(value) for name, value in params.items()} if average else {}
    return TrainState(jnp.zeros((), jnp.int32), dict(params), copy, optimizer.init(dict(params)))


def train_step(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    draw: Draw,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int,
    unroll: bool,
    in_order: Mesh | None = None,
    tables: Sequence[Table] = (),
) -> tuple[TrainState, PyTree]:
    """One update on one global batch.

    Args:
      state: donated by the jit that wraps this.
      frozen: whatever `draw` reads beside the batch and never changes: a teacher, encoders.
      batch: {name: (b, ...)}; leading axes split over the mesh.
      key: the run's one key; folded with the step.
      draw, loss, optimizer, ema_decay, accumulation: bound once by `partial`. `loss` returns (mean, metrics), and metrics
        are sums or means that average over parts of a batch.
      unroll: write the accumulation out instead of scanning (XLA's CPU convolution gradients are slow inside a scan).
      in_order: a mesh along whose data axis gradients are summed device by device, see `_in_order`; None: as XLA likes.
      tables: how the state's parameters lie in stacks (`runtime.stacks`); none: each has its name. `loss` knows names alone.

    Returns:
      (state, metrics): metrics plus "loss" and "grad_norm".
    """
    examples = draw(frozen, batch, jax.random.fold_in(key, state.step))

    means = partial(_means, jax.value_and_grad(loss, has_aux=True), count=accumulation, unroll=unroll)
    means = means if in_order is None else _in_order(means, in_order)
    (mean, metrics), gradients = means(stacks.unstack(state.params, *tables), examples)
    gradients = stacks.stack(gradients, *tables)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = ema(state.ema, params, ema_decay, state.step) if state.ema else {}
    numbers = {"loss": mean, "grad_norm": optax.global_norm(gradients), **metrics}
    return TrainState(state.step + 1, params, average, opt_state), numbers


def _means(value_and_grad: Callable, params: Params, examples: Mapping[str, PyTree], *, count: int, unroll: bool) -> PyTree:
    """((loss, metrics), gradients) of a batch, worked out in `count` parts."""
    parts = jax.tree.map(lambda x: _split(x, count), examples)
    one = lambda part: value_and_grad(params, part)
    if count == 1 or unroll:
        results = [one(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(count)]
        return jax.tree.map(lambda *xs: sum(xs) / count, *results)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    add = lambda total, part: (jax.tree.map(lambda a, b: a + b / count, total, one(part)), None)
    return jax.lax.scan(add, zero, parts)[0]


def _in_order(means: Callable[[Params, PyTree], PyTree], mesh: Mesh) -> Callable[[Params, PyTree], PyTree]:
    """The same of a batch whose rows lie along data: what the devices find is summed in their order, and told to all.

    XLA leaves the order of a sum over devices to whoever carries it out: on CPUs its own threads add from the first device on
    where one process holds all, gloo in rings where several do. Their last bits differ, and Adam makes them larger.
    """
    devices, whole = mesh.shape["data"], PartitionSpec()

    def summed(params: Params, examples: PyTree) -> PyTree:
        flat, unflatten = ravel_pytree(means(params, examples))
        pieces = jnp.pad(flat, (0, -flat.size % devices)).reshape(devices, -1)  # device i sums the i-th
        mean = jnp.mean(jax.lax.all_to_all(pieces, "data", 0, 0), axis=0)
        return unflatten(jax.lax.all_gather(mean, "data", tiled=True)[: flat.size])

    return jax.shard_map(summed, mesh=mesh, in_specs=(whole, PartitionSpec("data")), out_specs=whole, check_vma=False)


def _split(x: Array, parts: int) -> Array:
    """(b, ...) -> (parts, b / parts, ...), each part spread over the devices as the whole was."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def state_shardings(mesh: Mesh, rules: list, state: PyTree) -> PyTree:
    """Shardings of a TrainState (or its shapes) by the rules over parameter names; moments follow their parameter."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = {name: value.shape for name, value in state.params.items()}
    by_name = meshes.shardings(mesh, meshes.specs(rules, shapes, mesh))

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        sharding = by_name.get(names[-1]) if names else None
        return sharding if sharding is not None and leaf.shape == shapes[names[-1]] else replicated

    return jax.tree_util.tree_map_with_path(place, state)
