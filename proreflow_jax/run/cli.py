"""What every verb's command line shares: --config with overrides, logging, and errors as one line with exit code 2."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from proreflow_jax import MissingFile, UserError
from proreflow_jax.runtime import compilation_cache
from proreflow_jax.runtime.mesh import initialize_distributed
from proreflow_jax.runtime.processes import check_alone, leads
from proreflow_jax.storage.gcs import is_trouble

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130
MOST_HOST_DEVICES = 8
FIELDS = "Every field is explained in the config file, for example --config.train.batch=32 --config.stages='(4, 2)'."
QUOTES = "'\""
log = logging.getLogger("proreflow_jax")


def start(
    verb: Callable[..., None], about: str, config: str, options: Mapping[str, tuple] | None = None, pod: bool = False
) -> None:
    """Parses the command line and calls `verb(config, **options)`; never returns.

    Args:
      verb: the job.
      about: the verb's docstring, shown by --help.
      config: default of --config.
      options: {name: (default, help)} of the verb's own flags, beside --config.field=value; the default's type is the flag's.
      pod: whether several processes may run it as one job.

    Exit codes: 0 done (or asked to stop and resumable), 1 the run failed, 2 the user's input is wrong, 130 interrupted.
    """
    name = verb.__name__
    values = flags.FlagValues()
    options = dict(options or {})
    try:
        experiment = _read(values, name, about, config, options)
        _prepare(name, pod)
        compilation_cache.keep_programs(experiment.get("compilation_cache", ""))
        verb(experiment, **{option: getattr(values, option) for option in options})
    except KeyboardInterrupt:
        _leave(INTERRUPTED, f"{name}: interrupted; run the same command again to go on")
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError, OSError) as error:
        if _traced():
            raise
        mendable = isinstance(error, ValueError | FileNotFoundError)
        _leave(USER_ERROR if mendable else FAILED, f"{name}: {_said(error)}")
    except Exception as error:
        if _traced() or not is_trouble(error):
            raise
        _leave(FAILED, f"{name}: {experiment.get('root')} cannot be reached: {_said(error)}; run the same command again")
    sys.exit(0)


def _config_roots(default: str) -> list[str]:
    """Folders above the config files named on the command line: their `configs.common` is imported from there."""
    named = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith(("--config=", "-config="))]
    return [str(Path(path).resolve().parent.parent) for path in [*named, default]]


def _read(values: flags.FlagValues, name: str, about: str, config: str, options: Mapping[str, tuple]) -> ConfigDict:
    """Reads the flags and returns the config, locked. Whatever either of them raises becomes a ValueError of one line."""
    try:
        _define(values, config, options)
        _parse(values, name, about, config)
        return values.config.lock()
    except Exception as error:
        if _traced():
            raise
        raise UserError(f"{_reason(error)}; `{name} --help` lists the flags") from None


def _reason(error: Exception) -> str:
    """What is wrong with the flags or the config file, in words. ml_collections quotes an unknown field several times over."""
    said = _said(error).rstrip(".").replace("\\n", " ").replace("\\", "")
    if isinstance(error, KeyError | AttributeError) and said[:1] in QUOTES:
        return f"no such config field: {said.strip(QUOTES).replace(QUOTES[0], ',')}"
    return said if isinstance(error, ValueError | OSError | TypeError | flags.Error) else f"{type(error).__name__}: {said}"


def _define(values: flags.FlagValues, config: str, options: Mapping[str, tuple]) -> None:
    """Defines the flags. ml_collections may read the config file already here."""
    flags.DEFINE_bool("traceback", False, "show where an error was raised", flag_values=values)
    flags.DEFINE_bool("help", False, "show this page", short_name="h", flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for option, (default, text) in options.items():
        define[type(default)](option, default, text, flag_values=values)
    sys.path[:0] = _config_roots(config)
    config_flags.DEFINE_config_file("config", config, "the experiment", flag_values=values)


def _parse(values: flags.FlagValues, name: str, about: str, config: str) -> None:
    if any(word in ("--help", "-h", "--helpfull", "-help") for word in sys.argv[1:]):
        sys.stdout.write(f"{_help(values, name, about, config)}\n")
        sys.exit(0)
    rest = values(sys.argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: fields are set by --config.field=value")


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


def _said(error: Exception) -> str:
    """An error's message on one line; a KeyError's without the quotes Python puts around it."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def _prepare(name: str, pod: bool) -> None:
    """Logging to stderr, the other processes, and one host device per core where a CPU is all there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "orbax", "jax", "etils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for told_by_us in ("gcsfs", "fsspec", "google"):
        logging.getLogger(told_by_us).setLevel(logging.CRITICAL)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_HOST_DEVICES
        )
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))  # a power of two divides most batches
    if not initialize_distributed():
        return
    if not pod:
        check_alone(name)
    if not leads():
        logging.getLogger().setLevel(logging.WARNING)  # process 0 says how it goes


def _leave(code: int, line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


def choose(value: str, known: Sequence[str], flag: str) -> str:
    """The value itself if it is one of `known`; ValueError naming the flag otherwise."""
    if value not in known:
        raise UserError(f"{flag}={value!r} must be one of {', '.join(known)}")
    return value


def check_place(file: str, flag: str) -> None:
    """Raises FileNotFoundError, one line, if the folder of a file that is to be written is not there; "" is no file."""
    if file and not Path(file).parent.is_dir():
        raise MissingFile(f"{flag}={file}: there is no folder {Path(file).parent}")
