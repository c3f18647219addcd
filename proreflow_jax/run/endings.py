"""How a verb ends: exit codes, and which errors are one line for people instead of a traceback.

0 done; 1 the run failed; 2 the user's input is wrong; 75 (`STOPPED`) the verb was asked to stop, saved, and goes on when the
same command runs again; 130 Ctrl-C. An error that is neither the user's, nor the run's, nor the environment's is a bug: it
shows its traceback, and Python exits with 1.
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb

from absl import flags

from proreflow_jax import RunFailed, UserError
from proreflow_jax.storage.gcs import is_trouble

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130
QUOTES = "'\""
NAMES = (  # of the errors by which an operating system speaks of disk, network, limits and rights, not of our code
    "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "ENOLCK", "EBUSY",
    "ENXIO", "ENODEV", "EREMOTEIO", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH",
    "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "ESHUTDOWN", "EADDRINUSE", "EADDRNOTAVAIL",
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
        return error.errno in ENVIRONMENT or (error.errno is None and (_is_ours(error) or is_trouble(error)))
    return is_trouble(error)


def _is_ours(error: Exception) -> bool:
    """Whether this package itself raised the error, and so chose its words."""
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").partition(".")[0] == "proreflow_jax"


def message(error: BaseException) -> str:
    """An error's message on one line; a KeyError's without the quotes Python puts around it."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def config_error(error: BaseException, configs: Sequence[Path]) -> str:
    """Says what is wrong with flags or config file; for an error in the code of one of the `configs` also where.

    ml_collections quotes an unknown field several times over, and wraps some errors of a config file in its own.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, UserError):
            return _plain(link)
        if place := _config_line(link, configs):
            return f"{place}: {type(link).__name__}: {_plain(link)}"
        link = link.__cause__ or link.__context__
    text = _plain(error)
    if isinstance(error, KeyError | AttributeError) and text[:1] in QUOTES:
        return f"no such config field: {text.strip(QUOTES).replace(QUOTES[0], ',')}"
    return text if isinstance(error, ValueError | OSError | TypeError | flags.Error) else f"{type(error).__name__}: {text}"


def _plain(error: BaseException) -> str:
    return message(error).rstrip(".").replace("\\n", " ").replace("\\", "")


def _config_line(error: BaseException, configs: Sequence[Path]) -> str:
    """`FILE, line N` of the innermost line of a config file, or one beside it, that raised the error; empty if none did."""
    if isinstance(error, SyntaxError):
        return ""  # its message says so
    folders = [config.parent for config in configs]
    lines = [(Path(frame.f_code.co_filename).resolve(), line) for frame, line in walk_tb(error.__traceback__)]
    return next((f"{file}, line {line}" for file, line in reversed(lines) if file.parent in folders), "")
