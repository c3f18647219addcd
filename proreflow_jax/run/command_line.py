"""The words behind a verb: its flags, --config with overrides, --help. Reads no jax: a misspelt flag is refused in a moment."""

import keyword
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from traceback import walk_tb
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from proreflow_jax import UserError
from proreflow_jax.run import config_files
from proreflow_jax.run.errors import message
from proreflow_jax.run.ranges import check_range, check_ranges

FIELDS = "Every field is explained in the config file, for example --config.train.batch=32 --config.stages='(4, 2)'."
CONFIG = "the experiment: {names}, or a Python file of your own; any field is overridden by --config.field=value"
TRACEBACK = "show where an error was raised"
QUOTES = "'\""
HELP = ("--help", "-h", "--helpfull", "-help")


class Help(SystemExit):
    """The page was shown: the end of the verb, with exit code 0."""


def read(name: str, about: str, config: str, options: Mapping[str, tuple]) -> tuple[ConfigDict | None, dict[str, Any]]:
    """The config, locked, None for a verb without one, and the values of the verb's own flags by its parameters' names.

    Raises UserError, one line; Help after --help.
    """
    if any(word in HELP for word in sys.argv[1:]):
        sys.stdout.write(f"{_page(name, about, config, options)}\n")
        raise Help(0)
    values, folder = flags.FlagValues(), None
    try:
        with ExitStack() as stack:
            file, words = _config_first(sys.argv[1:], config) if config else (None, sys.argv[1:])
            if file is not None:
                folder = file.parent
                stack.enter_context(config_files.importable(file))
            _parse(values, [sys.argv[0], *words], config, options)
        if config:
            check_ranges(values.config)
        for option, (_, _, *bounds) in options.items():
            if bounds:
                check_range(getattr(values, option), bounds[0], f"--{option}")
        return values.config.lock() if config else None, {_parameter(option): getattr(values, option) for option in options}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a config file may also call sys.exit
        if traced():
            raise
        raise UserError(f"{config_error(error, folder)}; `{name} --help` lists the flags") from None


def traced() -> bool:
    """Whether the user wants to see where an error was raised, also one that keeps the flags from being read."""
    return any(word in ("--traceback", "--traceback=true") for word in sys.argv[1:])


def _config_first(words: Sequence[str], default: str) -> tuple[Path, list[str]]:
    """(config file, the words with --config=FILE in front, where ml_collections wants it). The last --config counts."""
    value, rest, words = default, [], list(words)
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if flag not in ("--config", "-config"):
            rest.append(f"{flag}{equals}{text}")
        elif equals or words:
            value = text if equals else words.pop(0)
        else:
            value = ""
    value = config_files.locate(value)
    return Path(value.partition(":")[0]), [f"--config={value}", *rest]


def _parse(values: flags.FlagValues, argv: list[str], config: str, options: Mapping[str, tuple]) -> None:
    """Defines the flags and reads the words."""
    flags.DEFINE_bool("traceback", False, TRACEBACK, flag_values=values)
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for option, (default, text, *_) in options.items():
        define[type(default)](option, default, text, flag_values=values)
    if config:
        config_flags.DEFINE_config_file("config", None, "the experiment", flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag" + (": fields are set by --config.field=value" if config else ""))


def _parameter(option: str) -> str:
    """The verb's parameter for a flag: `for_` for --for, a word that Python keeps for itself."""
    return f"{option}_" if keyword.iskeyword(option) else option


def _page(name: str, about: str, config: str, options: Mapping[str, tuple]) -> str:
    """What --help shows."""
    rows = [("config", config, CONFIG.format(names=", ".join(config_files.own_names())))] if config else []
    rows += [("traceback", False, TRACEBACK), *((option, *row[:2]) for option, row in options.items())]
    lines = [f"  --{flag}={default}\n      {text}" for flag, default, text in rows]
    usage = f"proreflow {name}, or python -m proreflow_jax.{name}"
    return "\n".join([usage, "", about.strip(), "", "Flags and their defaults:", *lines, *(["", FIELDS] if config else [])])


def config_error(error: BaseException, folder: Path | None) -> str:
    """Says what is wrong with flags or config file; for an error in the code of a config file also where.

    folder: of the config file.

    ml_collections quotes an unknown field several times over, and wraps some errors of a config file in its own.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, UserError):
            return _plain(link)
        if place := _config_line(link, folder):
            return f"{place}: {type(link).__name__}: {_plain(link)}"
        link = link.__cause__ or link.__context__
    text = _plain(error)
    if isinstance(error, KeyError | AttributeError) and text[:1] in QUOTES:
        return f"no such config field: {text.strip(QUOTES).replace(QUOTES[0], ',')}"
    return text if isinstance(error, ValueError | OSError | TypeError | flags.Error) else f"{type(error).__name__}: {text}"


def _plain(error: BaseException) -> str:
    return message(error).rstrip(".").replace("\\n", " ").replace("\\", "")


def _config_line(error: BaseException, folder: Path | None) -> str:
    """`FILE, line N` of the innermost line of a config file, or one beside it, that raised the error; empty if none did."""
    if isinstance(error, SyntaxError) or folder is None:
        return ""  # the first: its message says so
    lines = [(Path(frame.f_code.co_filename).resolve(), line) for frame, line in walk_tb(error.__traceback__)]
    return next((f"{file}, line {line}" for file, line in reversed(lines) if file.parent == folder), "")
