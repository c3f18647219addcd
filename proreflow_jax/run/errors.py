"""Errors as a verb shows them: whose fault, in which exit code, in which words. Reads no jax."""

import errno
from traceback import walk_tb

from proreflow_jax import RunFailed, UserError
from proreflow_jax.runtime.endings import FAILED, USER_ERROR
from proreflow_jax.storage import gcs

NAMES = (  # of the errors by which an operating system speaks of disk, network, limits and rights, not of our code
    "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "ENOLCK", "EBUSY",
    "ENXIO", "ENODEV", "EREMOTEIO", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH",
    "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "ESHUTDOWN", "EADDRINUSE", "EADDRNOTAVAIL", "EPIPE",
)  # fmt: skip
ENVIRONMENT = frozenset(getattr(errno, name) for name in NAMES if hasattr(errno, name))


def exit_code(error: Exception) -> int | None:
    """USER_ERROR or FAILED, for an error that is shown as one line; None for a bug, which shows its traceback."""
    if isinstance(error, UserError):
        return USER_ERROR
    return FAILED if isinstance(error, RunFailed | FloatingPointError) or _of_environment(error) else None


def _of_environment(error: Exception) -> bool:
    """Whether disk, network, limits or rights are at fault: by its number, or in words of our own."""
    if isinstance(error, OSError):
        return error.errno in ENVIRONMENT or (error.errno is None and (_is_ours(error) or gcs.is_trouble(error)))
    return gcs.is_trouble(error)


def _is_ours(error: Exception) -> bool:
    """Whether this package itself raised the error, and so chose its words."""
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").partition(".")[0] == "proreflow_jax"


def message(error: BaseException) -> str:
    """An error's message on one line; a KeyError's without the quotes Python puts around it."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
