"""A config and its base model as one value: opened, and checked as far as it can be before anything is written."""

from collections.abc import Sequence
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax import MissingFile
from proreflow_jax.data import kinds
from proreflow_jax.data.loader import Source
from proreflow_jax.flow.parameterization import DIFFUSION, Parameterization
from proreflow_jax.flow.schedule import from_config
from proreflow_jax.pretrained import pipeline
from proreflow_jax.reflow import stages
from proreflow_jax.reflow.loss import check_loss
from proreflow_jax.reflow.pairs import Networks, check_pair_steps
from proreflow_jax.reflow.stages import DONE, Stage
from proreflow_jax.run import base_model, dataset
from proreflow_jax.run.check_config import check_choice, check_config, check_data_resolution, check_student
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.recipes import loss_recipe, pair_recipe, parent_stage, teacher_flow
from proreflow_jax.run.train_state import parameter_shardings, state_places, trained_shapes
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths


def open_experiment(config: ConfigDict) -> Experiment:
    """Reads the base model and checks the config; writes nothing. Raises ValueError or FileNotFoundError, one line."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    paths.check_reachable(_planned(config, machine)[0])
    return _opened(config, machine, base_model.load_base_model(config, machine, partial(parameter_shardings, config, machine)))


def open_outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """The same on devices that need not be here, its base model in shapes: for compiling, not for running."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices, config.mesh.slices)
    return _opened(config, machine, base_model.outline_base_model(config, machine))


def _opened(config: ConfigDict, machine: Mesh, base: pipeline.Pipeline) -> Experiment:
    run, plan = _planned(config, machine)
    networks = Networks(base.unet, base.condition, base.vae, from_config(base.scheduler), base.scaling)
    flow = Parameterization(base.scheduler.get("prediction_type", "epsilon"))
    check_choice(flow.prediction, DIFFUSION, "prediction_type in the base model's scheduler_config.json")
    return _fitting(Experiment(config, run, base, networks, flow, plan, machine))


def reopen(experiment: Experiment, config: ConfigDict) -> Experiment:
    """Another config of the same base model on the same mesh, checked alike."""
    run, plan = _planned(config, experiment.mesh)
    return _fitting(experiment._replace(config=config, run=run, stages=plan))


def _planned(config: ConfigDict, machine: Mesh) -> tuple[paths.Location, list[Stage]]:
    """The run's folder and its stages, after all checks that need no base model."""
    run = paths.parse_path(config.root) / paths.check_name(config.name)
    check_config(config, machine)
    check_loss(loss_recipe(config))
    return run, stages.plan_stages(config.stages, run)


def _fitting(experiment: Experiment) -> Experiment:
    """The experiment itself, if its config fits its base model: the reading, teacher's steps, resolution, LoRA's layers."""
    c, side = experiment.config, experiment.base.resolution
    check_student(c, experiment.flow.prediction)
    for stage in experiment.stages:
        check_pair_steps(pair_recipe(experiment, stage), teacher_flow(experiment, stage))
    if c.pairs.start == "data":  # images become latents of the shape that the noise has
        check_data_resolution(c, side)
    trained_shapes(experiment)
    return experiment


def check_ready(experiment: Experiment, stage: Stage) -> None:
    """Raises FileNotFoundError, one line, if the stage that another starts from is not done; ValueError for bad data or rules.

    A job asks this before it makes its folder. The digits are written by the job itself, so nothing is asked of them.
    """
    state_places(experiment)
    before = parent_stage(experiment, stage)
    if before is not None and not (before.folder / DONE).is_file():
        raise MissingFile(f"{before.folder / DONE} is missing: run distill, or train --stage={before.windows}")
    if kinds.is_demo(experiment.config.data):
        paths.parse_local(experiment.config.data.path, dataset.DATA)
    else:
        open_source(experiment)


def open_source(experiment: Experiment) -> Source:
    """The captions, and images or their latents, of the config; see `inputs.open_source`."""
    return dataset.open_source(experiment.config, experiment.base)
