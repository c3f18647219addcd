"""Opens a run: the config and its base model, checked as far as they can be before anything is written."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.flow.parameterization import DIFFUSION, Parameterization
from proreflow_jax.flow.schedule import from_config
from proreflow_jax.pretrained.pipeline import Pipeline, read_unet
from proreflow_jax.reflow.loss import check_loss
from proreflow_jax.reflow.pairs import Networks
from proreflow_jax.reflow.stages import Stage, check_counts
from proreflow_jax.run import base_model, dataset
from proreflow_jax.run.check_config import check_choice, check_config, check_data_resolution, check_student
from proreflow_jax.run.experiment import BaseUNet, Experiment
from proreflow_jax.run.lineage import check_done
from proreflow_jax.run.recipes import loss_recipe, plan_stages
from proreflow_jax.run.train_state import parameter_shardings, state_layout
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths


def open_experiment(config: ConfigDict) -> Experiment:
    """Reads the base model and checks the config; writes nothing. Raises UserError, one line."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    paths.check_reachable(_checked(config, machine))
    base = base_model.load_base_model(config, machine)
    unet = BaseUNet(lambda: read_unet(base, parameter_shardings(config, machine, base.unet.shapes)))
    unet.params()  # a model that does not fit is refused here
    return _opened(config, machine, base, unet)


def open_outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """The same on devices that need not be here, its base model in shapes: for compiling, not for running."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices, config.mesh.slices)
    _checked(config, machine)
    base = base_model.outline_base_model(config, machine)
    return _opened(config, machine, base, BaseUNet(lambda: base.params["unet"]))


def reopen(experiment: Experiment, config: ConfigDict) -> Experiment:
    """Another config of the same base model on the same mesh, checked alike."""
    _checked(config, experiment.mesh)
    return _opened(config, experiment.mesh, experiment.base, experiment.unet)


def _checked(config: ConfigDict, machine: Mesh) -> paths.Location:
    """The run's folder, after all checks that need no base model."""
    run = paths.parse_path(config.root) / paths.check_name(config.name)
    check_config(config, machine)
    check_loss(loss_recipe(config))
    check_counts(config.stages)
    return run


def _opened(config: ConfigDict, machine: Mesh, base: Pipeline, unet: BaseUNet) -> Experiment:
    """All parts as one value. Raises UserError, one line, where config and base model do not fit each other."""
    run = paths.parse_path(config.root) / config.name
    flow = Parameterization(base.scheduler.get("prediction_type", "epsilon"))
    check_choice(flow.prediction, DIFFUSION, "prediction_type in the base model's scheduler_config.json")
    check_student(config, flow.prediction)
    if config.pairs.start == "data":  # images become latents of the shape that the noise has
        check_data_resolution(config, base.resolution)
    return Experiment(
        config=config,
        run=run,
        base=base,
        unet=unet,
        networks=Networks(base.unet, base.condition, base.vae, from_config(base.scheduler), base.scaling),
        flow=flow,
        stages=plan_stages(config, run, flow, base.latent_shape),
        layout=state_layout(config, machine, base.networks),
        mesh=machine,
    )


def check_ready(experiment: Experiment, stage: Stage) -> None:
    """Raises UserError, one line, if the stage that another starts from is not done, or for bad data.

    A job asks this before it makes its folder.
    """
    if stage.parent is not None:
        check_done(stage.parent)
    dataset.check_source(experiment.config, experiment.base)
