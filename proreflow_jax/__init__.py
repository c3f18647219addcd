"""Progressive reflow: a Stable Diffusion model that draws in 4 or 2 steps.

For Python: `load`, `distill`, `read_config`, `save_pictures` (docs/python.md). Each brings jax and is imported on first use.
The rest of this file is what every room may raise.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proreflow_jax.distill import distill as distill
    from proreflow_jax.run.load import load as load
    from proreflow_jax.run.pictures import save_pictures as save_pictures
    from proreflow_jax.run.read_config import read_config as read_config

__version__ = "0.1.0"

STOPPED = 75  # exit code (EX_TEMPFAIL) of a verb that was asked to stop and saved: the same command goes on
PUBLIC = {  # name -> its module
    "distill": "distill",
    "load": "run.load",
    "read_config": "run.read_config",
    "save_pictures": "run.pictures",
}


class UserError(ValueError):
    """The user's input is wrong: one line that names the value, the rule and the flag that mends it. Verbs exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or that another job has to write first, is not there."""


class RunFailed(RuntimeError):
    """The run can't go on, through no fault of input or code: one line that says what to do. Verbs exit with 1."""


class _Package(ModuleType):
    """This package. Python sets a module as an attribute when the module is imported: `distill` stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in PUBLIC:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{PUBLIC[name]}"), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *PUBLIC})


sys.modules[__name__].__class__ = _Package
