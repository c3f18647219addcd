"""Files of a model folder that are handed on: named kinds of plain files, and nothing that a link brings in from elsewhere.

A folder may come from a stranger. Its links may point at anything that this user can read, and what is copied may be uploaded.
"""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from proreflow_jax import UserError
from proreflow_jax.pretrained import weights

log = logging.getLogger(__name__)
PAGE = "README.md"  # of a model's folder; its licence is handed on
KIND = re.compile(
    r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.(json|safetensors)|merges\.txt|vocab\.txt|spiece\.model"
)  # in a component's folder
LICENCE = re.compile(r"LICENSE[A-Za-z0-9._-]*")  # beside the components
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of the hub's cache: a snapshot's files are links to blobs


def is_named_kind(name: str) -> bool:
    """Whether a component's file of this name is handed on."""
    return bool(KIND.fullmatch(name))


def is_licence(name: str) -> bool:
    """Whether a file of this name beside the components is handed on."""
    return bool(LICENCE.fullmatch(name))


def component_files(root: Path, component: str) -> list[Path]:
    """The files of a component that are handed on, sorted. Raises UserError as `check_inside`."""
    return _inside(root, root / component, is_named_kind)


def licences(root: Path) -> list[Path]:
    """The licences of a model folder, sorted. Raises UserError as `check_inside`."""
    return _inside(root, root, is_licence)


def page(root: Path) -> Path | None:
    """The page of a model folder, None if there is none. Raises UserError as `check_inside`."""
    path = root / PAGE
    if not path.is_file():
        return None
    check_inside(root, path)
    return path


def _inside(root: Path, folder: Path, handed_on: Callable[[str], bool]) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if handed_on(path.name))
    for path in files:
        check_inside(root, path)
    return files


def check_inside(root: Path, path: Path) -> None:
    """Raises UserError, one line, unless a path ends at a plain file inside a model's folder, links followed.

    Of a snapshot in the hub's cache also at a blob beside the snapshots.
    """
    try:
        real, home = path.resolve(strict=True), root.resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{path} is a link to nothing: copy the model's folder again, with its files") from None
    cache = home.parent.parent / BLOBS if home.parent.name == SNAPSHOTS else None
    if not (real.is_relative_to(home) or cache and real.is_relative_to(cache)):
        raise UserError(f"{path} leads out of the model's folder, to {real}: it is not followed; put the file itself there")
    if not real.is_file():
        raise UserError(f"{path} is not a plain file: it is not copied; name another --config.model.path")


def only_half(folder: Path) -> bool:
    """Whether the weights in a component's folder exist in half precision only."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return bool(names) and all(weights.HALF.search(name) for name in names)


def only_pickles(folder: Path) -> bool:
    """Whether the weights in a component's folder exist as pickles only."""
    return not any(folder.glob("*.safetensors")) and any(path for pattern in weights.PICKLES for path in folder.glob(pattern))


def copy_component(root: Path, component: str, target: Path, with_weights: bool = True) -> None:
    """Copies a component's files to target/component. Weights that exist in half precision only get the plain names."""
    (target / component).mkdir(parents=True, exist_ok=True)
    half = with_weights and only_half(root / component)
    for path in component_files(root, component):
        if ".safetensors" in path.name and not with_weights:
            continue
        copy = target / component / (weights.HALF.sub("", path.name) if half else path.name)
        shutil.copyfile(path, copy)
        if half and ".safetensors.index" in path.name:
            copy.write_text(weights.HALF.sub("", copy.read_text(encoding="utf-8")), encoding="utf-8")
    if left_out := sorted(path.name for path in (root / component).iterdir() if not is_named_kind(path.name)):
        log.info("%s: not copied: %s", component, ", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else ""))
