"""Which file --config names, and what that file may import.

A word is the name of a config that comes with the package; whatever holds a slash or ends in .py is a path. The package's own
files lie in `configs/`, beside the package in a checkout and inside it in a wheel. Every config file finds them as
`configs.NAME`, and its own neighbours by their names; sys.path is as before once the file has been read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from proreflow_jax import MissingFile, UserError

PACKAGE = Path(__file__).resolve().parent.parent
NAME = "configs"
NO_EXPERIMENTS = ("__init__", "common")


def own_folder() -> Path:
    """The folder of the configs that come with the package."""
    inside = PACKAGE / NAME
    return inside if inside.is_dir() else PACKAGE.parent / NAME


def own_names() -> list[str]:
    """The names that --config takes."""
    return sorted(path.stem for path in own_folder().glob("*.py") if path.stem not in NO_EXPERIMENTS)


def locate(value: str, flag: str = "--config") -> str:
    """--config's value with the file's whole path: digits, reproduce:quick, ~/mine.py. Raises UserError, one line.

    What stands behind a colon is for the config file itself.
    """
    name, colon, choice = value.partition(":")
    if not name:
        raise UserError(f"{flag} is empty: name one of {', '.join(own_names())}, or a file of your own")
    path = Path(name).expanduser()
    if "/" not in name and name in own_names():
        return f"{own_folder() / name}.py{colon}{choice}"
    if path.is_file():
        return f"{path.resolve()}{colon}{choice}"
    if "/" not in name and not name.endswith(".py"):
        raise UserError(f"{flag}={name} must be one of {', '.join(own_names())}, or the path of a file of your own")
    beside = f"; {flag}={path.stem} is the package's own" if path.parent.name == NAME and path.stem in own_names() else ""
    raise MissingFile(f"{flag}={name} is not there{beside}")


@contextmanager
def importable(file: Path) -> Iterator[None]:
    """What the config file imports is found: files beside it first, then `configs`, of which a folder of that name is part."""
    beside = [str(file.parent)]
    ours = [str(own_folder())]
    _provide(ours if beside == ours or file.parent.name != NAME else beside + ours)
    before = list(sys.path)
    if beside != ours:
        sys.path[:0] = beside
    try:
        yield
    finally:
        sys.path[:] = before


def _provide(folders: list[str]) -> None:
    """Makes `configs` the package of these folders, the first of which is looked at first."""
    if list(getattr(sys.modules.get(NAME), "__path__", ())) == folders:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    spec = spec_from_file_location(NAME, own_folder() / "__init__.py", submodule_search_locations=folders)
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
