"""The one door to the text in which libtpu describes a compiled program: text -> cost, or an error that says why not.

The format is private to libtpu and may change with any version. Only time is read from the text, never memory.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from proreflow_jax import UserError
from proreflow_jax.perf import hlo_cost, schedule
from proreflow_jax.perf.chips import Chip

LIBTPU = f"libtpu=={schedule.VERSION}"  # whose text is known


class UnknownText(UserError):
    """The text of a program is in a format that this package does not know: one line that names the libtpu."""


def program_cost(program: Any, folder: Path, chip: Chip) -> hlo_cost.Cost:
    """The cost of a compiled program on one chip; `folder` is where libtpu dumped the program while compiling.

    Its last schedule is counted where libtpu was loaded with `schedule.counting` and `schedule.clear` was called before.

    Raises UnknownText if there is no text or its format is not known.
    """
    try:
        return read_cost(_program_text(program, folder), chip, schedule.bundles(schedule.folder()))
    except jax.errors.JaxRuntimeError as error:
        raise UnknownText(_unknown(f"no text: {str(error).splitlines()[0]}")) from error


def read_cost(text: str, chip: Chip, bundles: Mapping[str, int] | None = None) -> hlo_cost.Cost:
    """The cost of a program by its text and the bundles of its operations. Raises UnknownText if the format is not known."""
    try:
        return hlo_cost.cost(text, chip, bundles)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnknownText(_unknown(f"{type(error).__name__}: {error}")) from error


def _program_text(program: Any, folder: Path) -> str:
    """The text as libtpu dumped it; jaxlib's where there is no dump: it prints a trace where it can't read a newer libtpu's."""
    dumps = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    return dumps[-1].read_text() if dumps else program.as_text()


def _unknown(reason: str) -> str:
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    return f"the program text of libtpu {version} is in a format that is not known here, only that of {LIBTPU} is ({reason})"
