"""The source of a model's components: a diffusers folder, or one file of the original layout with a folder beside it.

A single file holds weights only. Sizes, tokenizer and noise schedule come from a diffusers folder of the same family, as in
diffusers' own `from_single_file`. Most runs read a folder: the modules for other forms are imported when one is opened.

A VAE may come from elsewhere (`OwnVae`), and the last layers of the text encoder may be left out (`clip_skip`).
"""

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from proreflow_jax import MissingFile, UserError
from proreflow_jax.pretrained import config_fields, weights
from proreflow_jax.pretrained.chosen import Chosen
from proreflow_jax.pretrained.config_fields import CLASSES, KNOWN
from proreflow_jax.storage import sealed
from proreflow_jax.storage.paths import check_name

INDEX = "model_index.json"
STUDENT = "_student_windows"  # of a schedule's config, and of a single file's metadata: of how many windows, by export
PATH, LIKE, VAE = "--config.model.path", "--config.model.like", "--config.model.vae"
CLIP_SKIP = "--config.model.clip_skip"
TO_FOLDER = 'python -c "from diffusers import {0} as P; P.from_single_file({1!r}).save_pretrained({2!r})"'
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")  # names of the component that is distilled
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
FILES = (".safetensors", ".ckpt")  # endings of a single file: a missing one looks like an id


class OwnVae(NamedTuple):
    """An autoencoder that takes the place of the model's own."""

    origin: Path  # the path that the user named
    config: dict  # its config.json, in the words of the model's own where both mean the same
    stated: dict  # its config.json as it is; of a file the model's own
    folder: Path | None = None  # with its files; None of a file
    root: Path | None = None  # the model that the folder is of, or the folder; no link leads out of it
    stored: Mapping[str, np.ndarray] | None = None  # of a file, in diffusers' names

    def tensors(self) -> Mapping[str, np.ndarray]:
        """Its weights in diffusers' names and torch's layout, read on access."""
        return weights.read_tensors(self.folder) if self.stored is None else self.stored


class ModelSource(NamedTuple):
    """A model on disk. `file` is None where the folder holds the weights too."""

    folder: Path
    index: dict  # model_index.json
    family: str  # "v1" (SD 1.x), "v2" (SD 2.x), "xl" (SDXL) or "sd3" (SD 3 and 3.5)
    file: Path | None = None
    stored: weights.Tensors | None = None  # of the file
    student: dict = {}  # reflow.json, of an export of ours: how its denoiser is read; {} of a diffusion model
    vae: OwnVae | None = None  # in the place of the model's own
    beside: frozenset[str] = frozenset()  # text encoders that the file lacks, and the folder has
    clip_skip: int = 0  # layers at the text encoder's end that are left out, of those that its config.json counts

    @property
    def components(self) -> list[str]:
        """Names of the networks, the denoiser first."""
        return [self.denoiser_name, "vae", *text_encoders(self.index)]

    @property
    def denoiser_name(self) -> str:
        """The component that is distilled."""
        return _denoiser(self.index)

    @property
    def origin(self) -> Path:
        """The path that the user named."""
        return self.file or self.folder

    @property
    def whole(self) -> "ModelSource":
        """The same with all layers of its text encoder."""
        return self._replace(clip_skip=0)

    @property
    def cut(self) -> list[str]:
        """The text encoders whose last layers are left out by `clip_skip`."""
        return text_encoders(self.index) if self.clip_skip else []

    def place(self, component: str) -> Path:
        """Where a component comes from, for errors."""
        if component == "vae" and self.vae:
            return self.vae.origin
        return (self.folder if component in self.beside else self.origin) / component

    def config(self, component: str) -> dict:
        """config.json of a component; the scheduler's includes what a single file says of itself.

        Raises FileNotFoundError or ValueError, one line, if it is not there or not that of such a component.
        """
        if component == "vae" and self.vae:
            return self.vae.config
        config = config_fields.read_config(self.folder / component, component)
        if component == "vae" and self.denoiser_name == "unet":
            config_fields.check_unshifted(config, self.folder / component / config_fields.CONFIG_NAMES[0])
        if component == "scheduler" and self.stored is not None:
            config.pop(STUDENT, None)  # of the folder beside the file
            config |= import_form("file_words").stated(self.stored, self.file)
        if component in TEXT_ENCODERS and self.clip_skip:
            config["num_hidden_layers"] -= self.clip_skip
        return config

    def tensors(self, component: str) -> Mapping[str, np.ndarray]:
        """Weights of a component in diffusers' names and torch's layout, read on access.

        Raises FileNotFoundError or ValueError, one line.
        """
        if component == "vae" and self.vae:
            return self.vae.tensors()
        if component in TEXT_ENCODERS and self.clip_skip:
            return self._without_last_layers(component)
        if self.stored is None or component in self.beside:
            return weights.read_tensors(self.folder / component)
        try:
            return import_form("single_file").from_original(component, self.stored, self.config(component), self.family)
        except UserError as error:
            raise UserError(f"{self.file}: {error}: name another {PATH}") from None

    def _without_last_layers(self, component: str) -> Mapping[str, np.ndarray]:
        """A text encoder up to the layer whose states are read; with one more than its config.json counts, that goes too."""
        stored, last = self.whole.tensors(component), self.config(component)["num_hidden_layers"]
        behind = range(last + 1, last + self.clip_skip + 2)
        return Chosen(stored, {name: name for name in stored if config_fields.text_layers([name]) not in behind})

    def layers_left_out(self, component: str) -> int:
        """How many layers of a text encoder lie behind those that its config.json counts, without SD 2.x's unused last one."""
        if component == TEXT_ENCODERS[2]:  # T5's layers are all read
            return 0
        if self.stored is None or component in self.beside:
            stored = config_fields.text_layers(self.whole.tensors(component))
        else:
            stored = import_form("file_words").count_layers(self.stored, self.family, component) - (self.family == "v2")
        return max(stored - self.whole.config(component)["num_hidden_layers"], 0)

    def noise_levels(self) -> np.ndarray | None:
        """The table of a single file, (1000,) alphas_cumprod, where it has one."""
        return None if self.stored is None else import_form("file_words").table(self.stored, self.file)


def denoiser_name(components: Iterable[str]) -> str:
    """The component, of these, that is distilled; a model has one."""
    return next(name for name in components if name in DENOISERS)


def text_encoders(index: Mapping[str, Any]) -> list[str]:
    """The text encoders that a model_index.json names."""
    return [name for name in TEXT_ENCODERS if _class(index, name) is not None]


def _class(index: Mapping[str, Any], component: str) -> str | None:
    """The class of a component in a model_index.json, which says [library, class]."""
    entry = index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def open_folder(folder: str | Path, flag: str = PATH, with_weights: bool = True) -> ModelSource:
    """A diffusers folder; `flag` named it, for errors. Files that this package wrote are compared with the folder's record.

    With with_weights=False files of weights need not be there, and are not compared.

    Raises FileNotFoundError (no such folder, no model_index.json) or ValueError (not a Stable Diffusion, damaged), one line.
    """
    folder = Path(folder)
    rule = f"{flag} must name a diffusers folder, {'a single .safetensors file ' if flag == PATH else ''}or a hub id"
    if not folder.is_dir():
        raise MissingFile(f"{folder} {'is a file' if folder.is_file() else 'does not exist'}: {rule}")
    record = sealed.read_record(folder)
    if not (folder / INDEX).is_file():
        form = record.get(sealed.FORMAT, {}).get("form")
        kind = f", it is a student's {form} that export wrote" if form else ""
        raise MissingFile(f"{folder} holds no {INDEX}{kind}: {rule}")
    sealed.check_undamaged(folder, record, config_fields.DAMAGED, lambda name: not is_read(folder, name, with_weights))
    index = config_fields.check_fields("model_index", config_fields.read_object(folder / INDEX, rule), folder / INDEX)
    _check_components(folder, index)
    for component, (known, needed) in _parts(index).items():
        class_name = _class(index, component)
        if class_name not in known and (class_name or needed):
            is_of = f"{folder / INDEX} is of a {index.get('_class_name')}"
            what = f"its {component} is a {class_name}" if class_name else f"it has no {component}"
            raise UserError(f"{is_of}, {what}: {KNOWN}: name another {flag}")
    left_out = [name for name, entry in index.items() if isinstance(entry, list) and not (folder / name).is_dir()]
    index |= {name: [None, None] for name in left_out if name not in CLASSES}
    return ModelSource(folder, index, _family(folder, index), student=record if "flow" in record else {})


def _family(folder: Path, index: Mapping[str, Any]) -> str:
    if _denoiser(index) == "transformer":
        return "sd3"
    linear = config_fields.read_config(folder / "unet", "unet").get("use_linear_projection")
    return "xl" if "text_encoder_2" in text_encoders(index) else "v2" if linear else "v1"


def _denoiser(index: Mapping[str, Any]) -> str:
    """The component of a model_index.json that is distilled; "unet" where it names none that is known."""
    return "transformer" if _class(index, "transformer") in CLASSES["transformer"] else "unet"


def _parts(index: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """component -> (its classes, whether a model has to have it)."""
    if _denoiser(index) == "unet":
        return {name: (CLASSES[name], name != "text_encoder_2") for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    parts = {name: (CLASSES[name], name != "text_encoder_3") for name in ("transformer", "vae", *TEXT_ENCODERS)}
    return parts | {"text_encoder": parts["text_encoder_2"]}  # both CLIPs give a pooled state


def is_read(folder: Path, name: str, with_weights: bool) -> bool:
    """Whether a file of this path is read from a folder of ours. A snapshot of the hub holds one form of the weights alone."""
    if "/" not in name:
        return name == INDEX
    is_weights, fetched = name.endswith(".safetensors"), folder.parent.name == "snapshots"
    return name.endswith((".json", ".txt")) or is_weights and with_weights and (not fetched or (folder / name).exists())


def _check_components(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises UserError, one line, for a component whose name is no plain folder name: files are read and copied by it."""
    for name in [name for name, entry in index.items() if isinstance(entry, list)]:
        try:
            if "." in check_name(name):
                raise UserError(f"name {name!r} has a dot: components are named as Python names are")
        except UserError as error:
            raise UserError(f"{folder / INDEX} has a component whose {error}; or name another {PATH}") from None


def file_family(path: Path) -> str:
    """ "v1", "v2", "xl" or "sd3" of a single file. Raises ValueError, one line, for any other; pickles are never opened."""
    if path.suffix.lower() != ".safetensors":
        how = TO_FOLDER.format("StableDiffusionPipeline", path.name, path.stem)
        raise UserError(f"{PATH}={path} is no .safetensors file; a pickle may run code, convert it where you trust it: {how}")
    stored = weights.Tensors([path])
    try:
        return import_form("single_file").family(stored)
    except UserError as error:
        raise UserError(f"{PATH}={path}: {error}: name a file with UNet, VAE and text encoders in it") from None


def open_file(path: Path, like: Path, with_vae: bool = True) -> ModelSource:
    """A single file of the original layout, with the configs, tokenizer and schedule of the diffusers folder `like`.

    With with_vae=False it may lack its VAE, in whose place another stands.

    Raises FileNotFoundError or ValueError, one line; so if the two are not of one family.
    """
    family, beside = file_family(path), open_folder(like, LIKE, with_weights=False)
    if beside.family != family:
        raise UserError(f"{path} is a file of family {family}, {like} a folder of {beside.family}: change {LIKE}")
    stored, words = weights.Tensors([path]), import_form("file_words")
    words.check_layout(stored, family, path, with_vae)
    words.log_left_out(stored, family, path)
    index = {name: [None, None] if name in ("safety_checker", "image_encoder") else kind for name, kind in beside.index.items()}
    beside_file: frozenset[str] = frozenset()
    if family == "sd3":
        joint = import_form("joint_file")
        joint.check_transformer(stored, config_fields.read_config(like / "transformer", "transformer"), path, like)
        index, beside_file = joint.text_encoders_beside(stored, index, path)
    record = sealed.read_record(path.parent)
    own = path.name in record.get(sealed.FILES, {})
    sealed.check_undamaged(path.parent, record, config_fields.DAMAGED, lambda name: name != path.name)
    return ModelSource(like, index, family, path, stored, record if own and "flow" in record else {}, beside=beside_file)


def encoders_beside(path: Path) -> list[str]:
    """The text encoders that a single file of SD 3 leaves to the folder beside it: all, or none."""
    stored = weights.Tensors([path])
    joint = import_form("joint_file") if import_form("single_file").family(stored) == "sd3" else None
    missing = joint.missing_encoders(stored) if joint else []
    return missing if len(missing) == len(TEXT_ENCODERS) else []


def skip_layers(source: ModelSource, count: int) -> ModelSource:
    """A model that reads its text encoder's states `count` layers before the last. Raises UserError, one line."""
    flag = f"{CLIP_SKIP}={count}"
    if count and source.family in ("xl", "sd3"):
        name = "SDXL" if source.family == "xl" else "SD 3"
        what = f"{name} reads the states before the last layer already, which UIs call clip skip 2"
        raise UserError(f"{flag}: {what}: leave {CLIP_SKIP} out")
    layers = source.whole.config(TEXT_ENCODERS[0])["num_hidden_layers"]
    if count >= layers:
        raise UserError(f"{flag} must be below {layers}, the layers of {source.folder / TEXT_ENCODERS[0]}")
    return source._replace(clip_skip=count)


def is_id(path: str) -> bool:
    """Whether `path` reads owner/name in plain characters and nothing of that name lies here."""
    return bool(ID.fullmatch(path)) and not path.lower().endswith(FILES) and not Path(path).exists()


def import_form(name: str) -> ModuleType:
    """The module for a form beside the folder: "single_file", "joint_file", "file_words", "own_vae" or "hub"."""
    return import_module(f"proreflow_jax.pretrained.{name}")
