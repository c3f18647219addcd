"""What every verb's command line shares: --config with overrides, logging, and errors as one line with exit code 2."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from proreflow_jax.runtime.mesh import initialize_distributed

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130
MOST_HOST_DEVICES = 8
log = logging.getLogger("proreflow_jax")


def start(verb: Callable[..., None], about: str, config: str, options: Mapping[str, tuple] | None = None) -> None:
    """Parses the command line and calls `verb(config, **options)`; never returns.

    Args:
      verb: the job.
      about: the verb's docstring, shown by --help.
      config: default of --config.
      options: {name: (default, help)} of the verb's own flags, beside --config.field=value; the default's type is the flag's.

    Exit codes: 0 done (or asked to stop and resumable), 1 the run failed, 2 the user's input is wrong, 130 interrupted.
    """
    name = verb.__name__
    values = flags.FlagValues()
    options = dict(options or {})
    sys.path[:0] = _config_roots(config)
    config_flags.DEFINE_config_file("config", config, "the experiment; override any field by --config.field=value", flag_values=values)
    flags.DEFINE_bool("traceback", False, "show where an error was raised", flag_values=values)
    flags.DEFINE_bool("help", False, "show this page", short_name="h", flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for option, (default, text) in options.items():
        define[type(default)](option, default, text, flag_values=values)
    try:
        _parse(values, name, about)
        _prepare()
        verb(_resolved(values.config), **{option: getattr(values, option) for option in options})
    except KeyboardInterrupt:
        _leave(INTERRUPTED, f"{name}: interrupted; run the same command again to go on")
    except (ValueError, FileNotFoundError, flags.Error, KeyError, AttributeError, TypeError) as error:
        if _ours(error, values):
            _leave(USER_ERROR, f"{name}: {' '.join(str(error).split())}")
        raise
    except (FloatingPointError, RuntimeError, OSError) as error:
        if values.is_parsed() and values.traceback:
            raise
        _leave(FAILED, f"{name}: {' '.join(str(error).split())}")
    sys.exit(0)


def _config_roots(default: str) -> list[str]:
    """Folders above the config files named on the command line: their `configs.common` is imported from there."""
    named = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith(("--config=", "-config="))]
    return [str(Path(path).resolve().parent.parent) for path in [*named, default]]


def _parse(values: flags.FlagValues, name: str, about: str) -> None:
    if any(word in ("--help", "-h", "--helpfull", "-help") for word in sys.argv[1:]):
        print(_help(values, name, about))
        sys.exit(0)
    try:
        rest = values(sys.argv)[1:]
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError, ImportError) as error:
        raise ValueError(f"{' '.join(str(error).split())}; `{name} --help` lists the flags") from None
    if rest:
        raise ValueError(f"{rest[0]!r} is not a flag: fields are set by --config.field=value; `{name} --help` lists the flags")


def _help(values: flags.FlagValues, name: str, about: str) -> str:
    lines = [f"python -m proreflow_jax.{name}: {about.strip()}", "", "Flags:"]
    for flag in (values[key] for key in values):
        if flag.name == "help" or not flag.help or ":" in flag.name:
            continue
        lines.append(f"  --{flag.name} (default {flag.default!r}): {flag.help}" if flag.name != "config" else "")
    lines.append(f"  --config (default {values['config'].default!r}): {values['config'].help}")
    return "\n".join(line for line in lines if line or line == "") + "\n\nEvery field is explained in the config file itself."


def _ours(error: Exception, values: flags.FlagValues) -> bool:
    """A ValueError or a missing file is the user's to mend; other kinds only while the flags were read."""
    traced = values.is_parsed() and values.traceback
    return not traced and (isinstance(error, ValueError | FileNotFoundError | flags.Error) or not values.is_parsed())


def _prepare() -> None:
    """Logging to stderr, the other processes, and one host device per core where a CPU is all there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "orbax", "jax", "etils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_HOST_DEVICES)
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))  # a power of two divides most batches
    initialize_distributed()


def _resolved(config: ConfigDict) -> ConfigDict:
    config.lock()
    return config


def _leave(code: int, line: str) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


def choose(value: str, known: Sequence[str], flag: str) -> str:
    """The value itself if it is one of `known`; ValueError naming the flag otherwise."""
    if value not in known:
        raise ValueError(f"{flag}={value!r} must be one of {', '.join(known)}")
    return value
