"""The training state of a run: what is trained, where it lives, how it starts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import lora_factors
from proreflow_jax.reflow.pairs import Frozen
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.reflow.train_step import TrainState, init_state, state_shardings
from proreflow_jax.run.check_config import RULES
from proreflow_jax.run.experiment import PAIR_KEY, Experiment, Weights, run_key
from proreflow_jax.runtime import mesh, optimizer


def parameter_shardings(config: ConfigDict, machine: Mesh, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Where a network's parameters live, by --config.mesh.rules: {name: sharding}."""
    return mesh.shardings(machine, mesh.specs(_rules(config), {name: shape.shape for name, shape in shapes.items()}, machine))


def _rules(config: ConfigDict) -> list[tuple[str, Any]]:
    return [(pattern, RULES[value]) for pattern, value in config.mesh.rules]


def trained_shapes(experiment: Experiment) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a stage trains: all weights of the UNet, or low-rank factors. Raises ValueError for a regex without a layer."""
    l, shapes = experiment.config.student.lora, experiment.networks.unet.shapes
    return lora_factors.factor_shapes(shapes, l.layers, l.rank) if l.rank else shapes


def lora_scale(config: ConfigDict) -> float:
    """What the factors' product counts."""
    return lora_factors.scale_of(config.student.lora.rank, config.student.lora.alpha)


def whole_weights(trained: Params, base: Params, *, config: ConfigDict) -> Params:
    """What is trained -> the UNet's weights: the one function in front of `apply` that makes a student a LoRA."""
    return lora_factors.add(base, trained, lora_scale(config)) if config.student.lora.rank else trained


def frozen_arrays(experiment: Experiment, teacher: Params, stage: Stage, with_vae: bool) -> Frozen:
    """The arrays that a stage's jobs read and never change, on every device."""
    place = mesh.replicated(experiment.mesh)
    vae = experiment.base.params["vae"] if with_vae else {}
    beside = experiment.base.params["unet"] if experiment.config.student.lora.rank else {}
    empty = experiment.base.tokenizer.encode([""])[0]
    put = partial(jax.device_put, device=place)
    key = run_key(experiment.config, PAIR_KEY, stage.windows)
    return Frozen(put(experiment.base.text), put(vae), teacher, put(empty), key, beside)


def make_optimizer(config: ConfigDict) -> Any:
    """The optax chain of a stage."""
    return optimizer.make({**config.optimizer, "steps": config.train.steps})


def fresh_state(experiment: Experiment, parent: Weights) -> TrainState:
    """A state that starts from given weights, born where it lives; a LoRA goes on with the factors of the stage before."""
    l, start = experiment.config.student.lora, parent.params
    if l.rank:
        key = jax.random.key(experiment.config.seed)
        start = parent.factors or lora_factors.init(experiment.networks.unet.shapes, l.layers, l.rank, key)
    init = lambda p: init_state(p, make_optimizer(experiment.config), experiment.config.train.ema > 0)
    return jax.jit(init, out_shardings=state_places(experiment))(start)


def _state_shapes(experiment: Experiment) -> TrainState:
    config = experiment.config
    init = lambda p: init_state(p, make_optimizer(config), config.train.ema > 0)
    return jax.eval_shape(init, trained_shapes(experiment))


def state_places(experiment: Experiment) -> Any:
    """Shardings of the training state by --config.mesh.rules."""
    return state_shardings(experiment.mesh, _rules(experiment.config), _state_shapes(experiment))


def state_target(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the training state, for a restore."""
    place = lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p)
    return jax.tree.map(place, _state_shapes(experiment), state_places(experiment))
