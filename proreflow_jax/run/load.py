"""Models for Python: `load` opens whatever has weights (a stage, an export, a base model) as an `ImageModel`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.pretrained.sources import INDEX
from proreflow_jax.run import find_model, open
from proreflow_jax.run.experiment import Experiment, load_weights
from proreflow_jax.run.image_model import ImageModel
from proreflow_jax.run.read_config import CONFIG, changed, read_record
from proreflow_jax.run.stages import Stage, find_stage
from proreflow_jax.storage import paths
from proreflow_jax.storage.paths import Location

STAGE = re.compile(r"stage-(\d+)")  # a stage's folder


def load(
    source: str | Path | Stage,
    stage: int | None = None,
    *,
    dtype: str = "",
    revision: str = "main",
    like: str = "",
    vae: str = "",
    clip_skip: int | None = None,
    prediction_type: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> ImageModel:
    """Opens a model to draw with, on this machine's first device.

    Args:
      source: a run's folder, or one of its stages (runs/x/stage-4, or as `distill` returns them); a folder that `export`
        wrote; a diffusers folder, a .safetensors file, or a hub id. A student is read as its records say. Local, or gs://.
      stage: of a run: the windows of the student's stage, 0 for the base model; None: the last that is done.
      dtype: of the denoiser's computation, "float32" or "bfloat16"; "": as a run's config says, else float32.
      revision: of a hub id: branch, tag or commit.
      like: of a single file: folder or hub id with configs and tokenizer; "": its family's own, on the hub.
      vae: another VAE: its folder, a model with a vae/, a .safetensors file or a hub id; "": the model's own.
      clip_skip: last layers of the text encoder that are left out; None: as a student was taught, else none.
      prediction_type: of a diffusion model, where its scheduler_config.json says it wrong.
      overrides: of a run's config, {"model.path": "elsewhere"}, where its files were moved.

    Raises UserError, one line, if there is no such model, or one that is damaged or cannot be read.
    """
    place = source.folder if isinstance(source, Stage) else paths.parse_path(source, "source")
    run, count = find_run(place)
    words = {"revision": revision, "like": like, "vae": vae, "clip_skip": clip_skip, "prediction_type": prediction_type}
    if run is not None:
        return _load_stage(run, stage if count is None else count, dtype, overrides or {})
    if stage is not None or overrides:
        raise UserError(f"source={source} is no run (it has no {CONFIG}): leave out stage and overrides")
    with _python_words():
        config = _model_config(str(source), words)
        base, networks, weights = open.open_model(config, jax.local_devices()[0])
        return ImageModel(base, networks, weights, find_model.title(config, base.source), dtype or "float32")


def find_run(place: Location) -> tuple[Location | None, int | None]:
    """(the run's folder, windows of the stage), of a run's folder or a stage's; None for what a path does not say."""
    if (place / CONFIG).is_file() and not (place / INDEX).is_file():
        return place, None
    name = STAGE.fullmatch(place.name)
    return (place.parent, int(name[1])) if name and (place.parent / CONFIG).is_file() else (None, None)


def _load_stage(run: Location, stage: int | None, dtype: str, overrides: Mapping[str, Any]) -> ImageModel:
    """A student of a run, or its base model."""
    experiment = open_run(run, dtype, overrides, base_alone=stage == 0)
    config = experiment.config
    if stage == 0:
        return ImageModel.of(experiment, load_weights(experiment, None), find_model.title(config, experiment.base.source))
    done = [one for one in experiment.stages if one.done.is_file()]
    chosen = find_stage(experiment.stages, stage) if stage else (done or experiment.stages)[-1]
    return ImageModel.of(experiment, load_weights(experiment, chosen), f"{config.name}-{chosen.folder.name}")


def open_run(run: Location, dtype: str, overrides: Mapping[str, Any], base_alone: bool = False) -> Experiment:
    """A run on this machine's first device; it lies where it lies, whatever its config says. dtype, overrides: as of `load`."""
    moved = {"root": str(run.parent), "name": run.name} | ({"model.sampling_dtype": dtype} if dtype else {})
    config = changed(read_record(run / CONFIG), {**moved, **overrides})
    return open.open_experiment(config, base_alone=base_alone, device=jax.local_devices()[0])


def _model_config(path: str, words: Mapping[str, Any]) -> ConfigDict:
    """As much of a config as a model that stands alone needs."""
    own = {"original_size": (0, 0), "crop": (0, 0), "target_size": (0, 0)}
    return ConfigDict(
        {"model": {"path": path, "attention": "auto", **words}, "conditioning": own, "train": {"remat": "none"}}
    ).lock()


@contextmanager
def _python_words() -> Iterator[None]:
    """Errors that name flags of the command line name the arguments of `load` instead."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"--config\.model\.(\w+)", lambda flag: "source" if flag[1] == "path" else flag[1], str(error))
        raise type(error)(text) from None
