"""Writes a student: a diffusers folder, a single file, a LoRA or a delta, whole or not at all."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from proreflow_jax import UserError
from proreflow_jax.exports.card import CARD, PAGE, card_page, make_card
from proreflow_jax.exports.formats import FILES, SCHEDULER, STOCK, UNET_FILE, WINDOWED, Format, student_scheduler_config
from proreflow_jax.pretrained import lora_file, weights
from proreflow_jax.pretrained.single_file import to_original
from proreflow_jax.pretrained.sources import INDEX, ModelSource
from proreflow_jax.run.check_config import check_export
from proreflow_jax.run.experiment import Experiment, Weights, load_weights
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime.processes import first, first_says, host_arrays
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
RANKS = (1, 4, 16, 32, 64, 128, 256)  # of the energies that a LoRA's export prints


def export_stage(
    experiment: Experiment,
    stage: Stage,
    target: paths.Location,
    overwrite: bool = False,
    again: bool = True,
    export_format: Format = STOCK,
) -> None:
    """Writes the folder; with `again`, one that already holds this very student in this form is left as it is.

    Raises ValueError if the folder holds something else, or if no stock scheduler reads the student.
    """
    if export_format.scheduler == "stock":
        check_export(experiment.config)
    student = load_weights(experiment, stage)
    if student.factors:
        export_format = export_format._replace(rank=experiment.config.student.lora.rank)
    card = make_card(experiment, stage, student, export_format)
    if first_says(lambda: again and not overwrite and _holds(target, card)):
        log.info("%s: is there", target)
        return
    student = student._replace(params=host_arrays(student.params), factors=host_arrays(student.factors))
    first(lambda: _write(experiment, student, card, target, overwrite, export_format))
    log.info("%s: %d-window student as %s, num_inference_steps=%d", target, stage.windows, export_format.form, stage.windows)


def _write(
    experiment: Experiment, student: Weights, card: dict[str, Any], target: Path, overwrite: bool, export_format: Format
) -> None:
    """The folder, whole or not at all. student: arrays of this host."""
    tensors = weights.to_torch(student.params)
    with atomic.atomic_folder(target, overwrite) as draft:
        scheduler = student_scheduler_config(experiment.base.scheduler, student.flow, export_format.scheduler)
        if export_format.form == "diffusers":
            write_folder(draft, experiment.base.source, _as(tensors, export_format.dtype), scheduler)
        else:
            write_scheduler(draft, scheduler)
            single, report = _single_tensors(experiment, student, tensors, export_format)
            weights.save_tensors(draft / FILES[export_format.form], single)
            card |= report
        atomic.write_json(draft / CARD, card)
        (draft / PAGE).write_text(card_page(card), encoding="utf-8")


def _holds(target: Path, card: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very student in this form."""
    if not (target / CARD).is_file():
        return False
    present = atomic.read_json(target / CARD)
    return all(present.get(name) == value for name, value in card.items() if name != "base")


def write_folder(draft: Path, base: ModelSource, unet: Mapping[str, np.ndarray], scheduler: Mapping[str, Any]) -> None:
    """A diffusers folder: every component of `base` as it is, but this UNet (torch layout) and this scheduler.

    What else lies beside the components stays behind: folders from the hub often hold whole models as single files.
    """
    for name, kind in base.index.items():
        if isinstance(kind, list) and kind[0] is not None and name not in ("unet", "scheduler"):
            _copy_component(base.folder / name, draft / name, base)
    for path in base.folder.glob("LICENSE*"):
        shutil.copy(path, draft)
    (draft / "unet").mkdir()
    shutil.copy(base.folder / "unet" / "config.json", draft / "unet" / "config.json")
    weights.save_tensors(draft / UNET_FILE, unet)
    write_scheduler(draft, scheduler)
    kind = scheduler["_class_name"]
    entry = ["diffusers", kind] if kind == SCHEDULER["_class_name"] else [WINDOWED.stem, kind]
    atomic.write_json(draft / INDEX, {**base.index, "scheduler": entry})


def _copy_component(path: Path, target: Path, base: ModelSource) -> None:
    """One component's folder. Of a model in a single file the words are copied, and its weights are written beside them.

    Weights that exist in half precision only get the plain names, which every reader asks for first.
    """
    if base.file is not None:
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors*", *weights.PICKLES))
        if path.name in base.components:
            weights.save_tensors(target / weights.file_name(path.name), dict(base.tensors(path.name)))
        return
    shutil.copytree(path, target)
    if weights.only_half(target):
        for file in [file for file in target.iterdir() if weights.HALF.search(file.name)]:
            if file.suffix == ".json":
                file.write_text(weights.HALF.sub("", file.read_text(encoding="utf-8")), encoding="utf-8")
            file.rename(target / weights.HALF.sub("", file.name))


def write_scheduler(draft: Path, scheduler: Mapping[str, Any]) -> None:
    """scheduler/, with the code of our own scheduler beside its config."""
    (draft / "scheduler").mkdir()
    atomic.write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
    if scheduler["_class_name"] != SCHEDULER["_class_name"]:
        shutil.copy(WINDOWED, draft / "scheduler")


def _as(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value, jnp.dtype(dtype)) for name, value in tensors.items()}


def _single_tensors(
    experiment: Experiment, trained: Weights, student: dict[str, np.ndarray], export_format: Format
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The one file of a form that is no folder, and what the card says beyond."""
    base = experiment.base
    if export_format.form == "single-file":
        return _as(single_file(experiment, student), export_format.dtype), {}
    if export_format.form == "lora" and trained.factors:  # it is one already
        factors = lora_file.to_lora(trained.factors, experiment.layout.scale)
        return lora_file.to_kohya(factors, jnp.dtype(export_format.dtype)), {
            "lora": {"rank": export_format.rank, "layers": len(factors)}
        }
    change = lora_file.delta(student, base.source.tensors("unet"))
    if export_format.form == "delta":
        return _as(change, export_format.dtype), {}
    factors, report = lora_file.decompose(change, export_format.rank, sorted({*RANKS, export_format.rank}))
    for rank, energy, error in report["energies"]:
        mark = " <- written" if rank == export_format.rank else ""
        log.info("rank %3d keeps %.4f of the change's energy, relative error %.4f%s", rank, energy, error, mark)
    log.info("biases and norms, which no LoRA carries, hold %.4f of the whole change's energy", report["left_out"]["energy"])
    return lora_file.to_kohya(factors, jnp.dtype(export_format.dtype)), {"lora": report}


def single_file(experiment: Experiment, unet: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """UNet (torch layout), VAE and text encoders under the names of the original layout.

    An SDXL that predicts v gets the mark by which UIs know it; of SD 2.x they look at the weights.
    """
    base = experiment.base
    if shorter := [name for name in base.text if base.source.layers_left_out(name)]:
        raise UserError(
            f"--form=single-file: {base.source.folder / shorter[0]} uses fewer layers than it has, no single file can say so: "
            "take --form=diffusers or --form=lora"
        )
    by_mark = base.source.family == "xl" and experiment.flow.prediction == "v_prediction"
    marks = {"v_pred": np.zeros(0, np.float32)} if by_mark else {}
    parts = {"unet": unet} | {name: weights.to_torch(params) for name, params in base.params.items()}
    return marks | {
        name: tensor
        for part, tensors in parts.items()
        for name, tensor in to_original(part, tensors, base.networks[part].config, base.source.family).items()
    }
