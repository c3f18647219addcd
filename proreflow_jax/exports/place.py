"""Where an export may be written, found out before anything is read: what is not an export is never replaced."""

from pathlib import Path, PurePosixPath

from ml_collections import ConfigDict

from proreflow_jax.exports.card_pictures import FILE as PICTURES
from proreflow_jax.exports.formats import FILES, WINDOWED
from proreflow_jax.pretrained import sources
from proreflow_jax.pretrained.copying import is_licence, is_named_kind
from proreflow_jax.storage import paths, sealed
from proreflow_jax.storage.paths import Location

OUT = "--out"
BESIDE = ("README.md", sources.INDEX, *sealed.LATER, *FILES.values(), PICTURES)  # files of an export beside its components


def check_out(config: ConfigDict, target: Location, **inputs: Location) -> None:
    """Raises UserError, one line, unless an export may stand at `target`, or replace the export that stands there.

    Neither the base model, the run, the working directory and the home folder, nor a folder that holds one of them, is written
    over, whatever it looks like. inputs: further folders that the verb reads, by flag.
    """
    run = paths.parse_path(config.root) / config.name
    places = {"the working directory": Path.cwd(), "the home folder": Path.home(), "the run of this config": run}
    for flag, name in ((sources.PATH, config.model.path), (sources.LIKE, config.model.like), (sources.VAE, config.model.vae)):
        if name and not sources.is_id(name):
            places[f"what {flag} names"] = paths.parse_path(name, flag)
    sealed.check_apart(target, places | {f"what --{flag} names": place for flag, place in inputs.items()}, OUT)
    check_replaceable(target)


def check_replaceable(target: Location) -> None:
    """Raises UserError, one line, if `target` is there and is not an export alone."""
    sealed.check_own(target, _may_be_ours, OUT)


def _may_be_ours(name: str) -> bool:
    """Whether a file of this path may be an export's."""
    path = PurePosixPath(name)
    if len(path.parts) == 1:
        return name in BESIDE or is_licence(name)
    return len(path.parts) == 2 and (is_named_kind(path.name) or path.name == WINDOWED.name)
