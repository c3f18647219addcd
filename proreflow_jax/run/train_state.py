"""The training state of a run: what is trained, where it lives, how it is stacked. Worked out once, for all stages.

At rest, in checkpoints and in whatever is handed on, every tensor has its torch name. The training loop holds stacks of equal
tensors (`runtime.stacks`): a call of SD 1.5's step takes 212 arrays in place of 2,949, which is its cost on the host.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.models.network import Network, Params
from proreflow_jax.pretrained import lora_factors
from proreflow_jax.pretrained.sources import denoiser_name
from proreflow_jax.reflow import train_step
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.reflow.train_step import TrainState, init_state, state_shardings
from proreflow_jax.run.check_config import RULES, WHOLE
from proreflow_jax.runtime import mesh, stacks
from proreflow_jax.runtime.stacks import Table

log = logging.getLogger(__name__)
LAYERS = "--config.student.lora.layers"
MUCH = 0.01  # share of the weights from which one line says that they stay whole
Shapes = Mapping[str, jax.ShapeDtypeStruct]


class StateLayout(NamedTuple):
    """What the stages of a run train, and where it lives."""

    shapes: Shapes  # of what is trained: the denoiser's weights, or low-rank factors
    target: TrainState  # shapes, dtypes and shardings of the whole state, for a restore
    shardings: TrainState  # of the whole state
    optimizer: Any  # optax chain of a stage
    average: bool  # whether the state has an average of the weights
    scale: float  # what a LoRA's product counts; 0: all weights are trained
    constants: frozenset[str]  # of the denoiser's arrays, those that no training changes: they stay the base model's
    table: Table  # what is trained, as stacks
    frozen_tables: dict[str, Table]  # frozen networks as stacks, by component
    teacher_dtype: str
    teacher_whole: bool  # a train step's own teacher lies whole on each device


def state_layout(config: ConfigDict, machine: Mesh, networks: Mapping[str, Network]) -> StateLayout:
    """The layout of a config on a mesh. Raises UserError for a LoRA's regex without a layer, and for bad sharding rules."""
    lora, denoiser = config.student.lora, networks[denoiser_name(networks)]
    shapes = _factor_shapes(trainable(denoiser), lora) if lora.rank else trainable(denoiser)
    chain = train_step.make_optimizer({**config.optimizer, "steps": config.train.steps})
    average = config.train.ema > 0
    whole = jax.eval_shape(lambda p: init_state(p, chain, average), shapes)
    shardings = state_shardings(machine, _rules(config), whole)
    where, decays = parameter_shardings(config, machine, shapes), train_step.decays(config.optimizer, shapes)
    return StateLayout(
        shapes=shapes,
        target=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), whole, shardings),
        shardings=shardings,
        optimizer=chain,
        average=average,
        scale=lora_factors.scale_of(lora.rank, lora.alpha) if lora.rank else 0.0,
        constants=denoiser.constants,
        table=stacks.stack_table(shapes, {name: (where[name].spec, decays[name]) for name in shapes}),
        frozen_tables=_frozen_tables(networks, parameter_shardings(config, machine, denoiser.shapes)),
        teacher_dtype=config.model.teacher_dtype,
        teacher_whole=config.mesh.teacher == WHOLE,
    )


def trainable(network: Network) -> Shapes:
    """Shapes of a network's weights without its constants, such as a table of positions: no moments, no average, no decay."""
    return {name: shape for name, shape in network.shapes.items() if name not in network.constants}


def _factor_shapes(weights: Shapes, lora: ConfigDict) -> Shapes:
    shapes = lora_factors.factor_shapes(weights, lora.layers, lora.rank)
    if any(".attn.add_q_proj." in name for name in weights) and not any(".attn." in name for name in shapes):
        log.warning("%s: no factors in joint attention, which is most of this transformer's (docs/bring-your-model.md)", LAYERS)
    full = max(shape.shape[-1] for name, shape in shapes.items() if name.endswith(lora_factors.A))
    if lora.rank > full:
        raise UserError(f"--config.student.lora.rank={lora.rank} is more than {full}, the full rank of the largest layer")
    return shapes


def parameter_shardings(config: ConfigDict, machine: Mesh, shapes: Shapes) -> dict[str, Any]:
    """Where a network's parameters live, by --config.mesh.rules: {name: sharding}."""
    return mesh.shardings(machine, mesh.specs(_rules(config), {name: shape.shape for name, shape in shapes.items()}, machine))


def whole_share(config: ConfigDict, machine: Mesh, shapes: Shapes) -> float:
    """`mesh.whole_share` of a network's weights by --config.mesh.rules."""
    return mesh.whole_share(_rules(config), {name: shape.shape for name, shape in shapes.items()}, machine)


def warn_of_whole_weights(config: ConfigDict, machine: Mesh, shapes: Shapes) -> None:
    """One line if more than MUCH of a network's weights stay whole on each device, though rules would split them."""
    if (share := whole_share(config, machine, shapes)) > MUCH:
        log.warning(
            "%.1f %% of the weights stay whole on each device: fsdp=%d divides none of their dimensions; a smaller "
            "--config.mesh.fsdp with --config.mesh.data=-1 may take less memory",
            100 * share,
            machine.shape["fsdp"],
        )


def _rules(config: ConfigDict) -> list[tuple[str, Any]]:
    return [(pattern, RULES[value]) for pattern, value in config.mesh.rules]


def _frozen_tables(networks: Mapping[str, Network], denoiser: Mapping[str, Any]) -> dict[str, Table]:
    """By component; all but the denoiser lie whole on every device."""
    kinds = {denoiser_name(networks): {name: sharding.spec for name, sharding in denoiser.items()}}
    return {name: stacks.stack_table(n.shapes, kinds.get(name, dict.fromkeys(n.shapes))) for name, n in networks.items()}


def fresh_state(layout: StateLayout, start: Params) -> TrainState:
    """A state that starts from weights (or a LoRA's factors), born where it lives."""
    init = lambda p: init_state(p, layout.optimizer, layout.average)
    return jax.jit(init, out_shardings=layout.shardings)(start)


def whole_weights(layout: StateLayout, trained: Params, base: Params) -> Params:
    """What is trained -> the denoiser's weights: the one function in front of `apply` that makes a student a LoRA.

    base: `beside_trained` of the base model's weights.
    """
    if layout.scale:
        return lora_factors.add(base, trained, layout.scale)
    return {**trained, **{name: base[name] for name in layout.constants}} if layout.constants else trained


def beside_trained(layout: StateLayout, base: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's arrays that are needed beside what is trained: all beside a LoRA's factors, else the constants."""
    return dict(base) if layout.scale else {name: base[name] for name in layout.constants}


def stacked(layout: StateLayout, state: TrainState) -> TrainState:
    """The state as stacks; the arrays of the one that was passed are deleted on the way."""
    return stacks.stack_arrays(state, layout.table, consume=True)


def unstacked(layout: StateLayout, state: PyTree) -> PyTree:
    """A stacked state, or one of its trees, by torch names. Unstacking doubles the memory until the stacks are dropped."""
    return stacks.unstack_arrays(state, layout.table)


def stacked_shapes(layout: StateLayout) -> TrainState:
    """Shapes, dtypes and shardings of `stacked`."""
    return stacks.stack_shapes(layout.target, layout.table)


def stack_frozen(layout: StateLayout, frozen: Frozen) -> Frozen:
    """The frozen networks as stacks, the teacher in the dtype of its computation, where --config.mesh.teacher says.

    A base beside a LoRA stays as it is.
    """
    return _stacked(layout, frozen, stacks.stack_arrays)


def frozen_shapes(layout: StateLayout, frozen: Frozen) -> Frozen:
    """Shapes, dtypes and shardings of `stack_frozen`."""
    return _stacked(layout, frozen, stacks.stack_shapes)


def unstack_frozen(layout: StateLayout) -> Callable[[Frozen], Frozen]:
    """The inverse of `stack_frozen`, to be traced."""
    return partial(_networks, tables=layout.frozen_tables, change=lambda params, table, _: stacks.unstack(params, table))


def _stacked(layout: StateLayout, frozen: Frozen, stack: Callable[..., Params]) -> Frozen:
    teacher = dict(dtype=jnp.dtype(layout.teacher_dtype), whole=layout.teacher_whole)
    of = {denoiser_name(layout.frozen_tables): teacher}
    one = lambda params, table, name: stack(params, table, **of.get(name, {}))
    return _networks(frozen, layout.frozen_tables, one)


def _networks(frozen: Frozen, tables: Mapping[str, Table], change: Callable[[Params, Table, str], Params]) -> Frozen:
    one = lambda name, params: change(params, tables[name], name) if params else {}
    text = {name: one(name, params) for name, params in frozen.text.items()}
    return frozen._replace(text=text, vae=one("vae", frozen.vae), teacher=one(denoiser_name(tables), frozen.teacher))
