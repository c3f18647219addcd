"""The command line that every verb shares: --config with overrides, logging, and how a verb ends (run/endings.py)."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict, config_flags

from proreflow_jax import MissingFile, UserError
from proreflow_jax.run import endings
from proreflow_jax.run.ranges import check_range, check_ranges
from proreflow_jax.runtime import stopping, together
from proreflow_jax.runtime.mesh import initialize_distributed
from proreflow_jax.runtime.processes import check_alone, leads
from proreflow_jax.storage import gcs, paths

MOST_HOST_DEVICES = 8
FIELDS = "Every field is explained in the config file, for example --config.train.batch=32 --config.stages='(4, 2)'."
log = logging.getLogger("proreflow_jax")
NOISY = ("orbax", "jax", "etils")  # their warnings are for programmers, their errors are shown
SAID_BY_US = ("gcsfs", "fsspec", "google")  # their errors come back as a line of ours
ONE_A_LEAF = ("absl", "asyncio", "concurrent.futures")  # a traceback a leaf of one failed save, which is a line of ours
CACHE = "--config.compilation_cache"


def start(
    verb: Callable[..., None], about: str, config: str, options: Mapping[str, tuple] | None = None, pod: bool = False
) -> None:
    """Parses the command line and calls `verb(config, **options)`; never returns.

    Args:
      verb: the job.
      about: the verb's docstring, shown by --help.
      config: default of --config.
      options: {name: (default, help)} of the verb's own flags, beside --config.field=value; the default's type is the flag's.
        A number has its range as a third entry, (lowest, highest).
      pod: whether several processes may run it as one job.

    Exit codes: run/endings.py. Any error that endings does not name is a bug of the package and shows its traceback.
    """
    name = verb.__name__
    values = flags.FlagValues()
    options = dict(options or {})
    try:
        experiment = _read(values, name, about, config, options)
        _prepare(name, pod)
        with stopping.listening():
            keep_programs(experiment.get("compilation_cache", ""))
            verb(experiment, **{option: getattr(values, option) for option in options})
    except KeyboardInterrupt as error:
        _leave(error, endings.INTERRUPTED, f"{name}: interrupted; {stopping.AGAIN}")
    except Exception as error:
        code = endings.exit_code(error)
        if code is not None and not _traced():
            _leave(error, code, f"{name}: {endings.message(error)}")
        elif not together.several():
            raise
        _leave(error, code or endings.FAILED, traceback.format_exc().rstrip())
    sys.exit(0)


def _config_files(default: str) -> list[Path]:
    """The config files named on the command line, and the default."""
    configs = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith(("--config=", "-config="))]
    return [Path(path).resolve() for path in [*configs, default]]


def _read(values: flags.FlagValues, name: str, about: str, config: str, options: Mapping[str, tuple]) -> ConfigDict:
    """Reads the flags and returns the config, locked. Raises UserError, one line, for any error of flags or config file."""
    try:
        _define(values, config, options)
        _parse(values, name, about, config)
        check_ranges(values.config)
        for option, (_, _, *bounds) in options.items():
            if bounds:
                check_range(getattr(values, option), bounds[0], f"--{option}")
        return values.config.lock()
    except (KeyboardInterrupt, _Help):
        raise
    except BaseException as error:  # a config file may also call sys.exit
        if _traced():
            raise
        reason = endings.config_error(error, _config_files(config))
        raise UserError(f"{reason}; `{name} --help` lists the flags") from None


def _define(values: flags.FlagValues, config: str, options: Mapping[str, tuple]) -> None:
    """Defines the flags. ml_collections may read the config file already here."""
    flags.DEFINE_bool("traceback", False, "show where an error was raised", flag_values=values)
    flags.DEFINE_bool("help", False, "show this page", short_name="h", flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for option, (default, text, *_) in options.items():
        define[type(default)](option, default, text, flag_values=values)
    sys.path[:0] = [str(file.parent.parent) for file in _config_files(config)]  # `configs.common` is imported from there
    config_flags.DEFINE_config_file("config", config, "the experiment", flag_values=values)


def _parse(values: flags.FlagValues, name: str, about: str, config: str) -> None:
    if any(word in ("--help", "-h", "--helpfull", "-help") for word in sys.argv[1:]):
        sys.stdout.write(f"{_help(values, name, about, config)}\n")
        raise _Help(0)
    rest = values(sys.argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: fields are set by --config.field=value")


class _Help(SystemExit):
    """The page was shown: the end of the verb, with exit code 0."""


def _help(values: flags.FlagValues, name: str, about: str, config: str) -> str:
    own = [values[key] for key in values if key not in ("help", "h", "config") and values[key].help]
    rows = [("config", config, "the experiment, a Python file; any field is overridden by --config.field=value")]
    rows += [(flag.name, flag.default, flag.help) for flag in own if flag.name in values and ":" not in flag.name]
    lines = [f"  --{flag}={default}\n      {text}" for flag, default, text in rows]
    return "\n".join(
        [f"python -m proreflow_jax.{name}", "", about.strip(), "", "Flags and their defaults:", *lines, "", FIELDS]
    )


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
    together.watch_others()
    if not pod:
        check_alone(name)
    if not leads():
        logging.getLogger().setLevel(logging.WARNING)  # process 0 says how it goes


def _leave(error: BaseException, code: int, text: str) -> None:
    """Shows the text and ends the process, and all others of its job."""
    code, text = together.end_of_another() or (code, text)  # then this error is but what follows from that end
    sys.stderr.write(f"{text}\n")
    if together.several():
        together.announce(code=code, line=endings.message(error) or type(error).__name__)
        together.leave(code)
    sys.exit(code)


def choose(value: str, known: Sequence[str], flag: str) -> str:
    """The value itself if it is one of `known`; UserError naming the flag otherwise."""
    if value not in known:
        raise UserError(f"{flag}={value!r} must be one of {', '.join(known)}")
    return value


def check_place(file: str, flag: str) -> None:
    """Raises MissingFile, one line, if the folder of a file that is to be written is not there; "" is no file."""
    if file and not Path(file).parent.is_dir():
        raise MissingFile(f"{flag}={file}: there is no folder {Path(file).parent}")


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


def keep_programs(folder: str) -> None:
    """Programs compiled from here on are kept in `folder`, and taken from there; "" leaves all as the environment says.

    Raises ValueError or FileNotFoundError, one line, for a folder that cannot be used.
    """
    if not folder:
        return
    location = paths.parse_path(folder, CACHE)
    if isinstance(location, Path):
        location = _made(location.expanduser().absolute())
    else:
        paths.check_reachable(location)
        gcs.prepare_gcs()
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own part of it writes to disks alone
    jax.config.update("jax_compilation_cache_dir", str(location))
    compilation_cache.reset_cache()  # jax opens the folder once


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{CACHE}={folder} must be a folder that can be written to ({error.strerror})") from None
    return folder
