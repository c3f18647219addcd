"""Writes a student: a diffusers folder, a single file, a LoRA or a delta, whole or not at all."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from proreflow_jax import UserError
from proreflow_jax.exports.card import add_to_card, make_card, write_card
from proreflow_jax.exports.card_numbers import carries_numbers, measured_numbers
from proreflow_jax.exports.card_pictures import copy_pictures
from proreflow_jax.exports.formats import (
    FILES,
    OURS,
    STOCK,
    WINDOWED,
    Format,
    check_scheduler,
    denoiser_file,
    is_flow,
    student_scheduler_config,
)
from proreflow_jax.exports.place import check_replaceable
from proreflow_jax.flow.parameterization import JUMPS
from proreflow_jax.pretrained import copying, lora_file, lora_readers, weights
from proreflow_jax.pretrained.single_file import to_original
from proreflow_jax.pretrained.sources import INDEX, STUDENT, ModelSource
from proreflow_jax.run.check_config import check_export
from proreflow_jax.run.experiment import Experiment, Weights, load_weights
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime.processes import first, first_says, host_arrays
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic, paths, sealed
from proreflow_jax.storage.gcs import WRITING

log = logging.getLogger(__name__)
OPTIONAL = ("clip_skip",)  # fields that a card has or has not
SAID = ("base", "about", "numbers")  # fields of the page, which make no other student
RANKS = (1, 4, 16, 32, 64, 128, 256)  # of the energies that a LoRA's export prints


def export_stage(
    experiment: Experiment, stage: Stage, target: paths.Location, overwrite: bool = False, export_format: Format = STOCK
) -> None:
    """Writes the folder; one that already holds this very student in this form is left as it is, or mended.

    Raises UserError, one line, if the folder holds something else, or if no stock scheduler reads the student.
    """
    if experiment.base.denoiser_name == "transformer":  # of which every reader takes diffusers' names
        export_format = export_format._replace(names="diffusers")
    check_scheduler(experiment.base.scheduler, export_format.scheduler)
    if export_format.scheduler == "stock":
        check_export(experiment.config, is_flow(experiment.base.scheduler))
    first(lambda: check_replaceable(target))
    student = load_weights(experiment, stage)
    if student.factors:
        export_format = export_format._replace(rank=experiment.config.student.lora.rank)
    card = make_card(experiment, stage, student, export_format)
    if carries_numbers(export_format, bool(student.factors)):
        numbers = measured_numbers(experiment.run, student.digest)
        card |= {"numbers": numbers} if numbers else {}
    if first_says(lambda: not overwrite and holds(target, card)):
        log.info("%s: is there", target)
        first(lambda: _renew_numbers(target, card))
        return
    size = sum(value.nbytes for value in student.params.values()) / 2**30
    log.info(
        "%s: writing the %d-window student, %.2g GiB of %s in float32, as %s",
        *(target, stage.windows, size, experiment.base.denoiser_word, export_format.form),
    )
    student = student._replace(params=host_arrays(student.params), factors=host_arrays(student.factors))
    first(lambda: _write(experiment, stage, student, card, target))
    log.info("%s: %d-window student as %s, num_inference_steps=%d", target, stage.windows, export_format.form, stage.windows)


def _renew_numbers(target: paths.Location, card: Mapping[str, Any]) -> None:
    """Puts the numbers that were measured since onto the card of an export that is there."""
    numbers = card.get("numbers")
    if numbers and numbers != sealed.read_record(target).get("numbers"):
        add_to_card(target, numbers=numbers)
        log.info("%s: its card has the numbers of the run's tables now", target)


def _write(experiment: Experiment, stage: Stage, student: Weights, card: dict[str, Any], target: Path) -> None:
    """The folder, whole or not at all. student: arrays of this host."""
    tensors, export_format = weights.to_torch(student.params), Format(**card["format"])
    with atomic.atomic_folder(target, overwrite=True) as draft:  # an export, or nothing: see `check_replaceable`
        scheduler = student_scheduler_config(experiment.base.scheduler, student.flow, export_format.scheduler)
        if export_format.form == "diffusers":
            write_folder(draft, experiment.base.source, _as(tensors, export_format.dtype), scheduler)
        else:
            write_scheduler(draft, scheduler)
            single, report = _single_tensors(experiment, student, tensors, export_format)
            weights.save_tensors(draft / FILES[export_format.form], single, {STUDENT: str(student.flow.windows)})
            card |= report
        if record := copy_pictures(stage, draft):
            card["about"] = card["about"] | {"pictures": record}
        write_card(draft, card)


def holds(target: paths.Location, card: Mapping[str, Any]) -> bool:
    """Whether the folder holds the very export of this card, every file as it was written. False if it is to be written.

    Raises UserError, one line, if it holds another export.
    """
    if not target.exists() or (target / WRITING).is_file():  # the mark: its writer was stopped
        return False
    try:
        present = sealed.read_record(target)
    except UserError as error:
        log.warning("%s: written anew", error)
        return False
    if not present:  # an empty folder
        return False
    compared = [name for name in (*card, *OPTIONAL) if name not in SAID]
    if differs := [name for name in compared if present.get(name) != card.get(name)]:
        raise UserError(f"{target} holds another export (of another {differs[0]}): choose another --out, or pass --overwrite")
    if wrong := sealed.damage(target, present):
        log.warning("%s: %s: written anew", target, wrong)
    return not wrong


def write_folder(draft: Path, base: ModelSource, denoiser: Mapping[str, np.ndarray], scheduler: Mapping[str, Any]) -> None:
    """A diffusers folder: the files of every component of `base` (`copying`), but this denoiser (torch layout), this scheduler.

    What else lies beside the components stays behind: folders from the hub often hold whole models as single files.
    """
    index = dict(base.index)
    for name in _handed_on(base):
        if name == "vae" and base.vae or name in base.cut:
            _write_component(draft, name, base)
            continue
        if base.file is None and copying.only_pickles(base.folder / name):
            log.warning("%s: left out, its weights are a pickle, which may run code", name)
            index[name] = [None, None]
            continue
        in_folder = base.file is None or name in base.beside
        copying.copy_component(base.folder, name, draft, with_weights=in_folder)
        if not in_folder and name in base.components:
            weights.save_tensors(draft / name / weights.file_name(name), dict(base.tensors(name)))
    for path in copying.licences(base.folder):
        shutil.copyfile(path, draft / path.name)
    (draft / base.denoiser_name).mkdir()
    config = base.folder / base.denoiser_name / "config.json"
    copying.check_inside(base.folder, config)
    shutil.copyfile(config, draft / base.denoiser_name / "config.json")
    weights.save_tensors(draft / denoiser_file(base.denoiser_name), denoiser)
    write_scheduler(draft, scheduler)
    kind = scheduler["_class_name"]
    entry = [WINDOWED.stem, kind] if kind == OURS else ["diffusers", kind]
    atomic.write_json(draft / INDEX, {**index, "scheduler": entry})


def _write_component(draft: Path, name: str, base: ModelSource) -> None:
    """A network that is not as it lies in the base model's folder: another VAE, a text encoder without its last layers."""
    (draft / name).mkdir()
    config = base.vae.stated if name == "vae" else base.config(name)
    atomic.write_json(draft / name / "config.json", config)
    weights.save_tensors(draft / name / weights.file_name(name), dict(base.tensors(name)))


def _handed_on(base: ModelSource) -> list[str]:
    """The components that an export takes over from the base model."""
    listed = [name for name, kind in base.index.items() if isinstance(kind, list) and kind[0] is not None]
    return [name for name in listed if name not in (base.denoiser_name, "scheduler")]


def check_copies(base: ModelSource) -> None:
    """Raises UserError, one line, if a file that an export or its card takes over lies outside of the base model's folder."""
    for name in _handed_on(base):
        if not (name == "vae" and base.vae):
            copying.component_files(base.folder, name)
        elif base.vae.folder:
            copying.component_files(base.vae.root, str(base.vae.folder.relative_to(base.vae.root)))
    copying.licences(base.folder)
    copying.page(base.folder)
    copying.check_inside(base.folder, base.folder / base.denoiser_name / "config.json")


def write_scheduler(draft: Path, scheduler: Mapping[str, Any]) -> None:
    """scheduler/, with the code of our own scheduler beside its config."""
    (draft / "scheduler").mkdir()
    atomic.write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
    if scheduler["_class_name"] == OURS:
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
        return _lora(factors, {"rank": export_format.rank, "layers": len(factors)}, export_format, base.source)
    change = lora_file.delta(student, base.source.tensors(base.denoiser_name))
    if export_format.form == "delta":
        return _as(change, export_format.dtype), {}
    with Progress("low-rank factors", len(lora_file.changed_layers(change)), "layer") as progress:
        ranks = sorted({*RANKS, export_format.rank})
        factors, report = lora_file.decompose(change, export_format.rank, ranks, told=progress.advance)
    for rank, energy, error in report["energies"]:
        mark = " <- written" if rank == export_format.rank else ""
        log.info("rank %3d keeps %.4f of the change's energy, relative error %.4f%s", rank, energy, error, mark)
    log.info("biases and norms, which no LoRA carries, hold %.4f of the whole change's energy", report["left_out"]["energy"])
    return _lora(factors, report, export_format, base.source)


def _lora(
    factors: Mapping[str, lora_file.Factors], report: Mapping[str, Any], export_format: Format, base: ModelSource
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A LoRA's tensors under the names that are asked for, and its report, with what each reader drops."""
    if export_format.names == "diffusers":
        return lora_file.to_peft(factors, jnp.dtype(export_format.dtype), base.denoiser_name), {"lora": dict(report)}
    lost = lora_readers.lost_energy(factors, base.family)
    for reader, share in lost.items():
        if share:
            log.info("%s does not take layers that hold %.4f of the LoRA's energy", reader, share)
    return lora_file.to_kohya(factors, jnp.dtype(export_format.dtype)), {"lora": {**report, "lost": lost}}


def single_file(experiment: Experiment, denoiser: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Denoiser (torch layout), VAE and text encoders under the names of the original layout.

    An SDXL that predicts v gets the mark by which UIs know it; of SD 2.x they look at the weights.
    """
    base = experiment.base
    if shorter := [name for name in base.text if base.source.layers_left_out(name)]:
        raise UserError(
            f"--form=single-file: {base.source.folder / shorter[0]} uses fewer layers than it has, no single file can say so: "
            "take --form=diffusers or --form=lora"
        )
    if base.source.file is None and base.source.student.get("clip_skip"):
        raise UserError(
            f"--form=single-file: {base.source.folder} is a student whose text encoder was cut by clip_skip, tools that read a "
            "single file expect it whole: take --form=diffusers or --form=lora"
        )
    kind = experiment.flow.prediction
    by_mark = base.source.family == "xl" and JUMPS.get(kind, kind) == "v_prediction"
    marks = {"v_pred": np.zeros(0, np.float32)} if by_mark else {}
    parts = {base.denoiser_name: denoiser} | {name: weights.to_torch(params) for name, params in base.params.items()}
    parts |= {name: dict(base.source.whole.tensors(name)) for name in base.source.cut}  # whoever reads the file leaves them out
    return marks | {
        name: tensor
        for part, tensors in parts.items()
        for name, tensor in to_original(part, tensors, base.source.whole.config(part), base.source.family).items()
    }
