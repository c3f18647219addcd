"""Opens a run: the config and its base model (folder, single file or hub id), checked before anything is written."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import OF_FLOWS, OF_TABLES, Parameterization, check_prediction, prediction_types
from proreflow_jax.flow.schedule import RectifiedFlow, Schedule, from_config
from proreflow_jax.flow.windows import check_windows
from proreflow_jax.models.layers import Compute
from proreflow_jax.pretrained import pipeline, sources
from proreflow_jax.pretrained.pipeline import Pipeline, read_constants, read_denoiser
from proreflow_jax.reflow.loss import check_loss
from proreflow_jax.reflow.pairs import Networks
from proreflow_jax.run import dataset
from proreflow_jax.run.base_identity import base_identity
from proreflow_jax.run.check_config import check_choice, check_config, check_data_resolution, check_student
from proreflow_jax.run.experiment import BaseDenoiser, Experiment, Weights, check_begun, check_taught
from proreflow_jax.run.find_model import find_base_model
from proreflow_jax.run.stages import Stage, check_counts, loss_recipe, plan_stages, read_done
from proreflow_jax.run.train_state import parameter_shardings, state_layout, warn_of_whole_weights
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import paths, sealed


def open_experiment(
    config: ConfigDict,
    base_alone: bool = False,
    device: jax.Device | None = None,
    checked: Callable[[], None] = lambda: None,
) -> Experiment:
    """Reads the base model and checks the config; writes nothing. Raises UserError, one line.

    Args:
      base_alone: no stage is opened, so a student may be the base model whatever the config's stages are.
      device: the one device to use, whatever mesh the config has; None: all, as the config says.
      checked: called once the base model is read and fits the config: before anything is compiled.
    """
    if device is None:
        machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, slices=config.mesh.slices)
    else:
        machine = mesh.make_mesh(1, 1, 1, [device])
    paths.check_reachable(_checked(config, machine))
    base = load_base_model(config, machine)
    warn_of_whole_weights(config, machine, base.denoiser.shapes)
    places = parameter_shardings(config, machine, base.denoiser.shapes)
    denoiser = BaseDenoiser(partial(read_denoiser, base, places), partial(read_constants, base, places))
    denoiser.params()  # a model that does not fit is refused here
    return _opened(config, machine, base, denoiser, cache(partial(base_identity, base)), base_alone=base_alone, checked=checked)


def open_outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """The same on devices that need not be here, its base model in shapes: for compiling, not for running."""
    machine = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices, config.mesh.slices)
    _checked(config, machine)
    base = outline_base_model(config, machine)
    return _opened(config, machine, base, BaseDenoiser(lambda: base.params[base.denoiser_name]), dict)


def reopen(experiment: Experiment, config: ConfigDict) -> Experiment:
    """Another config of the same base model on the same mesh, checked alike."""
    _checked(config, experiment.mesh)
    return _opened(config, experiment.mesh, experiment.base, experiment.denoiser, experiment.identity)


def open_in_memory(config: ConfigDict, machine: Mesh, base: Pipeline, denoiser: BaseDenoiser) -> Experiment:
    """The same of a base model that no --config.model.path names."""
    paths.check_reachable(_checked(config, machine))
    return _opened(config, machine, base, denoiser, dict)


def _checked(config: ConfigDict, machine: Mesh) -> paths.Location:
    """The run's folder, after all checks that need no base model."""
    run = paths.parse_path(config.root) / paths.check_name(config.name)
    check_config(config, machine)
    check_loss(loss_recipe(config))
    check_counts(config.stages)
    return run


def _opened(
    config: ConfigDict,
    machine: Mesh,
    base: Pipeline,
    denoiser: BaseDenoiser,
    identity: Callable[[], dict[str, str]],
    *,
    base_alone: bool = False,
    checked: Callable[[], None] = lambda: None,
) -> Experiment:
    """All parts as one value. Raises UserError, one line, where config and base model do not fit each other."""
    run = paths.parse_path(config.root) / config.name
    flow = base_flow(config, base)
    if not flow.windows:
        check_student(config, flow.prediction)
    elif not base_alone:
        _check_from_student(config, flow, base.source.student)
    if config.pairs.start == "data":  # images become latents of the shape that the noise has
        check_data_resolution(config, base.resolution)
    networks, layout = _networks(base), state_layout(config, machine, base.networks)
    checked()
    return Experiment(
        config=config,
        run=run,
        base=base,
        denoiser=denoiser,
        networks=networks,
        flow=flow,
        stages=[] if base_alone else plan_stages(config, run, flow, base.latent_shape),
        layout=layout,
        mesh=machine,
        identity=identity,
    )


def open_model(config: ConfigDict, device: jax.Device) -> tuple[Pipeline, Networks, Weights]:
    """A model alone on one device, without a run: a config's blocks model and conditioning, and train.remat, are read.

    Raises as `find_base_model`, `load_pipeline` and `base_flow`.
    """
    machine = mesh.make_mesh(1, 1, 1, [device])
    base = load_base_model(config, machine)
    flow, networks = base_flow(config, base), _networks(base)
    params = read_denoiser(base, dict.fromkeys(base.denoiser.shapes, mesh.replicated(machine)))
    return base, networks, Weights(params, flow, base.source.student.get("digest") or fold(digest(params)))


def _networks(base: Pipeline) -> Networks:
    """The model's networks and schedule."""
    schedule = from_config(base.scheduler)
    _check_noise_levels(base.source, schedule)
    return Networks(base.denoiser, base.condition, base.vae, schedule, base.scaling)


def base_flow(config: ConfigDict, base: Pipeline) -> Parameterization:
    """How the base model is read: by its scheduler's config, or, of a student that export wrote, by its reflow.json.

    Raises UserError, one line, for a prediction type or a record that does not exist.
    """
    card, scheduler = base.source.student, base.scheduler
    stated = card.get("flow") or (scheduler if "windows" in scheduler else None)  # our own scheduler's config says so too
    if stated is None:
        if windows := scheduler.get(sources.STUDENT):
            raise UserError(
                f"{sources.PATH}={config.model.path} is a student of {windows} windows by its own words, and its "
                f"{sealed.RECORD} is missing, which says how it is read: put that back, or export it again"
            )
        known = prediction_types(scheduler)
        if config.model.prediction_type and known == OF_FLOWS:
            raise UserError(
                f"--config.model.prediction_type={config.model.prediction_type}: {config.model.path} is a rectified flow, "
                "which predicts its velocity alone: leave it out"
            )
        flow = Parameterization(scheduler.get("prediction_type", known[0]))
        check_choice(flow.prediction, known, "prediction_type in the base model's scheduler_config.json")
        return flow
    where = f"{sources.PATH}={config.model.path}"
    try:
        flow = Parameterization(**{field: stated[field] for field in Parameterization._fields})
        check_windows(flow.windows)
        check_prediction(flow.prediction, flow.path)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{where} is a student whose record of its windows is damaged ({error}): export it again") from None
    if config.model.prediction_type:
        raise UserError(f"{where} is a student, read as its export says: leave out --config.model.prediction_type")
    return flow


def _check_from_student(config: ConfigDict, flow: Parameterization, card: Mapping[str, Any]) -> None:
    """Raises UserError, one line, unless the config's stages go on where a student that is the base model has stopped."""
    where = f"{sources.PATH}={config.model.path} is a student of {flow.windows} windows"
    before, first = flow.windows, config.stages[0]
    if first >= before or before % first:
        raise UserError(f"{where}: --config.stages={config.stages} must begin with a smaller divisor, or name its base model")
    for field, value in (("prediction", flow.prediction), ("path", flow.path)):
        if config.student[field] != value:
            raise UserError(f"{where}, read as {value}: take --config.student.{field}={value}, or name its base model")
    baked = card.get("guidance", {}).get("teacher", 1.0)
    if config.pairs.guidance != baked:
        raise UserError(f"{where} that has guidance {baked:g} in it: take --config.pairs.guidance={baked:g}, or its base model")


def _check_noise_levels(source: sources.ModelSource, schedule: Schedule) -> None:
    """Raises UserError, one line, if a single file's own table of noise levels is another than its config's."""
    levels = None if isinstance(schedule, RectifiedFlow) else source.noise_levels()
    if levels is not None and not np.allclose(levels, schedule.alphas_cumprod, rtol=1e-2, atol=1e-3):
        own, other = (f"{table[0]:.4g} to {table[-1]:.4g}" for table in (levels, schedule.alphas_cumprod))
        zero = ", which ends in pure noise (zero terminal SNR, refused here)" if levels[-1] < 1e-6 else ""
        raise UserError(
            f"{source.origin} has noise levels of its own (alphas_cumprod from {own}{zero}), {source.folder} says {other}: "
            f"name a folder with its schedule by {sources.LIKE}, or another {sources.PATH}"
        )


def check_ready(experiment: Experiment, stages: Sequence[Stage]) -> None:
    """Raises UserError, one line, if the stages cannot be made: what they start from is not done, bad data, another config's.

    A job asks this before it makes its folder.
    """
    if stages[0].parent is not None:
        read_done(stages[0].parent)
        check_taught(experiment, stages[0].parent)
    dataset.check_source(experiment.config, experiment.base)
    check_begun(experiment, stages)


def compute(config: ConfigDict, machine: Mesh) -> Compute:
    """How networks are computed on these devices, which need not be this machine's own."""
    return Compute(config.model.attention, config.train.remat, mesh.platform(machine), machine)


def load_base_model(config: ConfigDict, machine: Mesh) -> pipeline.Pipeline:
    """Reads the base model as the config says, without the denoiser's weights. Raises as `find_base_model`, `load_pipeline`."""
    return pipeline.load_pipeline(find_base_model(config), **_reading(config, machine), with_denoiser=False)


def outline_base_model(config: ConfigDict, machine: Mesh) -> pipeline.Pipeline:
    """The same model by its config.json files alone, parameters as shapes; nothing else is read or downloaded."""
    return pipeline.outline_pipeline(find_base_model(config, configs_only=True), **_reading(config, machine))


def _reading(config: ConfigDict, machine: Mesh) -> dict[str, Any]:
    """The config's words on how a model is read, as `pipeline` takes them."""
    kind, sizes = config.model.prediction_type, config.conditioning
    if kind:
        check_choice(kind, OF_TABLES, "--config.model.prediction_type")
    for name, value in sizes.items():
        if len(value) != 2 or any(type(side) is not int or side < 0 for side in value):
            raise UserError(f"--config.conditioning.{name}={value} must be two numbers of pixels, at least 0")
    return {"prediction_type": kind, **sizes, "compute": compute(config, machine)}
