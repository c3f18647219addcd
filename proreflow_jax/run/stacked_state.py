"""What a training loop holds while it runs: its state and its frozen networks in stacks (`runtime.stacks`).

At rest, in checkpoints and in whatever is handed on, every tensor has its torch name; a call of SD 1.5's step is given 212
arrays in place of 2,949, which is what it costs the host. Letting go of a state takes its memory once more until it is saved.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jaxtyping import PyTree

from proreflow_jax.models.network import Params
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.reflow.train_step import TrainState
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.train_state import parameter_shardings, state_target, trained_shapes
from proreflow_jax.runtime import optimizer, stacks
from proreflow_jax.runtime.stacks import Table


def trained_table(experiment: Experiment) -> Table:
    """What lies together of what is trained: tensors of one shape that live and decay alike."""
    shapes = trained_shapes(experiment)
    where, decays = (
        parameter_shardings(experiment.config, experiment.mesh, shapes),
        optimizer.decays(experiment.config.optimizer, shapes),
    )
    return stacks.stack_table(shapes, {name: (where[name].spec, decays[name]) for name in shapes})


def hold(experiment: Experiment, state: TrainState) -> TrainState:
    """The state in stacks; the one that was given is deleted on the way."""
    return stacks.stack_arrays(state, trained_table(experiment), consume=True)


def let_go(experiment: Experiment, state: PyTree) -> PyTree:
    """The inverse of `hold`, of a state or of one of its trees; both are there then."""
    return stacks.unstack_arrays(state, trained_table(experiment))


def held_shapes(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of `hold`."""
    return stacks.stack_shapes(state_target(experiment), trained_table(experiment))


def hold_frozen(experiment: Experiment, frozen: Frozen) -> Frozen:
    """The frozen networks in stacks, the teacher in the dtype it is computed in; a base beside low-rank factors as it is."""
    return _stacked(experiment, frozen, stacks.stack_arrays)


def held_frozen_shapes(experiment: Experiment, frozen: Frozen) -> Frozen:
    """Shapes, dtypes and shardings of `hold_frozen`."""
    return _stacked(experiment, frozen, stacks.stack_shapes)


def loose_frozen(experiment: Experiment) -> Callable[[Frozen], Frozen]:
    """The inverse of `hold_frozen`, to be traced."""
    return partial(_networks, tables=_frozen_tables(experiment), change=lambda params, table, _: stacks.unstack(params, table))


def _stacked(experiment: Experiment, frozen: Frozen, stack: Callable[..., Params]) -> Frozen:
    dtypes = {"unet": jnp.dtype(experiment.config.model.teacher_dtype)}
    one = lambda params, table, name: stack(params, table, dtype=dtypes.get(name))
    return _networks(frozen, _frozen_tables(experiment), one)


def _frozen_tables(experiment: Experiment) -> dict[str, Table]:
    """By component; all but the UNet lie whole on every device."""
    networks = experiment.base.networks
    where = parameter_shardings(experiment.config, experiment.mesh, networks["unet"].shapes)
    kinds = {"unet": {name: place.spec for name, place in where.items()}}
    return {name: stacks.stack_table(n.shapes, kinds.get(name, dict.fromkeys(n.shapes))) for name, n in networks.items()}


def _networks(frozen: Frozen, tables: Mapping[str, Table], change: Callable[[Params, Table, str], Params]) -> Frozen:
    one = lambda name, params: change(params, tables[name], name) if params else {}
    text = {name: one(name, params) for name, params in frozen.text.items()}
    return frozen._replace(text=text, vae=one("vae", frozen.vae), teacher=one("unet", frozen.teacher))
