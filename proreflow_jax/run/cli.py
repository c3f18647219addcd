"""The command line that every verb shares: --config with overrides, logging, the compilation cache, and how a verb ends.

Exit codes: 0 done; 1 the run failed; 2 the user's input is wrong; 75 (`STOPPED`) the verb was asked to stop, saved, and goes on
when the same command runs again; 130 Ctrl-C. An error that is neither the user's, the run's, nor the environment's is a bug: it
shows its traceback, and Python exits with 1.
"""

import errno
import keyword
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from proreflow_jax import RunFailed, UserError
from proreflow_jax.run.check_config import check_range, check_ranges
from proreflow_jax.runtime import processes, stopping
from proreflow_jax.runtime.mesh import initialize_distributed, keep_programs
from proreflow_jax.runtime.processes import FAILED, INTERRUPTED, USER_ERROR, check_alone, leads
from proreflow_jax.storage import gcs, paths

MOST_HOST_DEVICES = 8
FIELDS = "Every field is explained in the config file, for example --config.train.batch=32 --config.stages='(4, 2)'."
log = logging.getLogger("proreflow_jax")
NOISY = ("orbax", "jax", "etils")  # their warnings are for programmers, their errors are shown
SAID_BY_US = ("gcsfs", "fsspec", "google")  # their errors come back as a line of ours
ONE_A_LEAF = ("absl", "asyncio", "concurrent.futures")  # a traceback a leaf of one failed save, which is a line of ours
QUOTES = "'\""
NAMES = (  # of the errors by which an operating system speaks of disk, network, limits and rights, not of our code
    "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "ENOLCK", "EBUSY",
    "ENXIO", "ENODEV", "EREMOTEIO", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH",
    "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "ESHUTDOWN", "EADDRINUSE", "EADDRNOTAVAIL", "EPIPE",
)  # fmt: skip
ENVIRONMENT = frozenset(getattr(errno, name) for name in NAMES if hasattr(errno, name))


def start(
    verb: Callable[..., None], about: str, config: str, options: Mapping[str, tuple] | None = None, pod: bool = False
) -> None:
    """Parses the command line and calls `verb(config, **options)`, or `verb(**options)` without a config; never returns.

    Args:
      verb: the job.
      about: the verb's docstring, shown by --help.
      config: default of --config; "" for a verb that needs none, which then has no such flag.
      options: {name: (default, help)} of the verb's own flags, beside --config.field=value; the default's type is the flag's.
        A number has its range as a third entry, (lowest, highest).
      pod: whether several processes may run it as one job.

    Any error that `exit_code` does not know is a bug of the package and shows its traceback.
    """
    name = verb.__name__
    values = flags.FlagValues()
    options = dict(options or {})
    try:
        experiment = _read(values, name, about, config, options)
        _prepare(name, pod)
        with stopping.listening():
            for one in experiment:
                keep_programs(one.get("compilation_cache", ""))
            verb(*experiment, **{_parameter(option): getattr(values, option) for option in options})
    except KeyboardInterrupt as error:
        _leave(error, INTERRUPTED, f"{name}: interrupted; {stopping.AGAIN}")
    except Exception as error:
        code = exit_code(error)
        if code is not None and not _traced():
            _leave(error, code, f"{name}: {message(error)}")
        elif not processes.several():
            raise
        _leave(error, code or FAILED, traceback.format_exc().rstrip())
    finally:
        stopping.leave_readers()
    sys.exit(0)


def _config_files(default: str) -> list[Path]:
    """The config files named on the command line, and the default."""
    configs = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith(("--config=", "-config="))]
    return [Path(path).resolve() for path in [*configs, default] if path]


def _read(values: flags.FlagValues, name: str, about: str, config: str, options: Mapping[str, tuple]) -> list[ConfigDict]:
    """Reads the flags; the config, locked, in a list, empty for a verb without one. Raises UserError, one line."""
    sys.argv[1:] = [_expanded(word) for word in sys.argv[1:]]
    try:
        _define(values, config, options)
        _parse(values, name, about, config)
        if config:
            check_ranges(values.config)
        for option, (_, _, *bounds) in options.items():
            if bounds:
                check_range(getattr(values, option), bounds[0], f"--{option}")
        return [values.config.lock()] if config else []
    except (KeyboardInterrupt, _Help):
        raise
    except BaseException as error:  # a config file may also call sys.exit
        if _traced():
            raise
        reason = config_error(error, _config_files(config))
        raise UserError(f"{reason}; `{name} --help` lists the flags") from None


def _expanded(word: str) -> str:
    """--config=~/mine.py with the home in it: a shell expands `~` at the beginning of a word only."""
    flag, equals, path = word.partition("=")
    return f"{flag}={os.path.expanduser(path)}" if equals and flag.lstrip("-") == "config" else word


def _define(values: flags.FlagValues, config: str, options: Mapping[str, tuple]) -> None:
    """Defines the flags. ml_collections may read the config file already here."""
    flags.DEFINE_bool("traceback", False, "show where an error was raised", flag_values=values)
    flags.DEFINE_bool("help", False, "show this page", short_name="h", flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for option, (default, text, *_) in options.items():
        define[type(default)](option, default, text, flag_values=values)
    if not config:
        return
    sys.path[:0] = [str(file.parent.parent) for file in _config_files(config)]  # `configs.common` is imported from there
    config_flags.DEFINE_config_file("config", config, "the experiment", flag_values=values)


def _parameter(option: str) -> str:
    """The verb's parameter for a flag: `for_` for --for, a word that Python keeps for itself."""
    return f"{option}_" if keyword.iskeyword(option) else option


def _parse(values: flags.FlagValues, name: str, about: str, config: str) -> None:
    if any(word in ("--help", "-h", "--helpfull", "-help") for word in sys.argv[1:]):
        sys.stdout.write(f"{_help(values, name, about, config)}\n")
        raise _Help(0)
    rest = values(sys.argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag" + (": fields are set by --config.field=value" if config else ""))


class _Help(SystemExit):
    """The page was shown: the end of the verb, with exit code 0."""


def _help(values: flags.FlagValues, name: str, about: str, config: str) -> str:
    own = [values[key] for key in values if key not in ("help", "h", "config") and values[key].help]
    about_config = ("config", config, "the experiment, a Python file; any field is overridden by --config.field=value")
    rows = [about_config] if config else []
    rows += [(flag.name, flag.default, flag.help) for flag in own if flag.name in values and ":" not in flag.name]
    lines = [f"  --{flag}={default}\n      {text}" for flag, default, text in rows]
    fields = ["", FIELDS] if config else []
    return "\n".join([f"python -m proreflow_jax.{name}", "", about.strip(), "", "Flags and their defaults:", *lines, *fields])


def _traced() -> bool:
    """Whether the user wants to see where an error was raised, also one that keeps the flags from being read."""
    return any(word in ("--traceback", "--traceback=true") for word in sys.argv[1:])


def _prepare(name: str, pod: bool) -> None:
    """Logging to stderr, the other processes, and one host device per core where a CPU is all there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    quiet_libraries()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_HOST_DEVICES
        )
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))  # a power of two divides most batches
    if not initialize_distributed():
        return
    processes.watch_others()
    if not pod:
        check_alone(name)
    if not leads():
        logging.getLogger().setLevel(logging.WARNING)  # process 0 says how it goes


def _leave(error: BaseException, code: int, text: str) -> None:
    """Shows the text and ends the process, and all others of its job."""
    code, text = processes.end_of_another() or (code, text)  # then this error is but what follows from that end
    stopping.say(text)
    if processes.several():
        processes.announce(code=code, line=message(error) or type(error).__name__)
        processes.leave(code)
    sys.exit(code)


def choose(value: str, known: Sequence[str], flag: str) -> str:
    """The value itself if it is one of `known`; UserError naming the flag otherwise."""
    if value not in known:
        raise UserError(f"{flag}={value!r} must be one of {', '.join(known)}")
    return value


def make_place(file: str, flag: str) -> None:
    """Makes the folder of a file that is to be written; "" is no file. Raises UserError, one line, if it can't be made."""
    if file:
        paths.make_folder(Path(file).expanduser().parent, f"{flag}={file}")


def quiet_libraries() -> None:
    """For the whole process: a verb's. Log records of the levels that matter still come through."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in (*SAID_BY_US, *ONE_A_LEAF):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """An unraisablehook without the errors of a save that was given up: its coroutines find their event loop closed."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)


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


def config_error(error: Exception, configs: Sequence[Path]) -> str:
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
