"""What a process says and gives back at its end. Reads no jax: a verb that is misspelt needs none."""

import os
import sys

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes beside STOPPED: the run failed; the input is wrong; Ctrl-C
AGAIN = "run the same command again to go on"


def say(line: str) -> None:
    """Writes a line to stderr. Whoever read it may be gone (a terminal, a pipe): that changes nothing."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        leave_readers()


def leave_readers() -> None:
    """Lets go of stdout and stderr where nobody reads them any more: else Python ends with 120, whatever the job's code is."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:
            pass  # closed by ourselves
