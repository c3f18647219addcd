"""The command line that every verb shares: --config with overrides, logging, the compilation cache, and how a verb ends.

Exit codes: 0 done; 1 the run failed; 2 the user's input is wrong; 75 (`STOPPED`) the verb was asked to stop, saved, and goes on
when the same command runs again; 130 Ctrl-C. An error that is neither the user's, the run's, nor the environment's is a bug: it
shows its traceback, and Python exits with 1.

jax is imported once the flags are read: --help and a misspelt flag wait for nothing. For the same reason a verb's file imports
what it needs inside its function, and only light modules at its top.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from proreflow_jax import UserError
from proreflow_jax.run import command_line
from proreflow_jax.run.errors import exit_code, message
from proreflow_jax.runtime.endings import AGAIN, INTERRUPTED, USER_ERROR, leave_readers, say

__all__ = ["choose", "exit_code", "make_place", "message", "start"]


def start(
    verb: Callable[..., None], about: str, config: str, options: Mapping[str, tuple] | None = None, pod: bool = False
) -> None:
    """Parses the command line and calls `verb(config, **options)`, or `verb(**options)` without a config; never returns.

    Args:
      verb: the job.
      about: the verb's docstring, shown by --help.
      config: default of --config, a name or a file; "" for a verb that needs none, which then has no such flag.
      options: {name: (default, help)} of the verb's own flags, beside --config.field=value; the default's type is the flag's.
        A number has its range as a third entry, (lowest, highest).
      pod: whether several processes may run it as one job.

    Any error that `exit_code` does not know is a bug of the package and shows its traceback.
    """
    name = verb.__name__
    try:
        experiment, values = command_line.read(name, about, config, dict(options or {}))
        from proreflow_jax.run import process

        process.carry_out(verb, experiment, values, pod=pod, traced=command_line.traced())
    except KeyboardInterrupt:
        say(f"{name}: interrupted; {AGAIN}")
        sys.exit(INTERRUPTED)
    except UserError as error:
        if command_line.traced():
            raise
        say(f"{name}: {message(error)}")
        sys.exit(USER_ERROR)
    finally:
        leave_readers()
    sys.exit(0)


def choose(value: str, known: Sequence[str], flag: str) -> str:
    """The value itself if it is one of `known`; UserError naming the flag otherwise."""
    if value not in known:
        raise UserError(f"{flag}={value!r} must be one of {', '.join(known)}")
    return value


def make_place(file: str, flag: str) -> None:
    """Makes the folder of a file that is to be written; "" is no file. Raises UserError, one line, if it can't be made."""
    from proreflow_jax.storage import paths

    if file:
        paths.make_folder(Path(file).expanduser().parent, f"{flag}={file}")
