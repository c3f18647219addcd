"""Damaged, or only not readable now? A file is damaged if its bytes were read and are wrong, or if it is not there.

A disk, a mount, a network or a limit of the machine that fails says nothing about the bytes. Such a failure ends the job; the
same command goes on later. Libraries hide the failure: in another error's cause, in a text, or as "no such file".
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from proreflow_jax import RunFailed, UserError
from proreflow_jax.storage.gcs import SCHEME, is_trouble

PASS_ON = (MemoryError, jax.errors.JaxRuntimeError)  # of this machine's memory or devices, or of the other processes
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # the system did look: no such file
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]|\[Errno (\d+)\]")  # as tensorstore and Python write it
UNDECIDED = ("UNKNOWN:", "CANCELLED:")  # tensorstore's, where it does not say more
READABLE, DAMAGED, UNREADABLE = range(3)
BLOCK = 1 << 24  # bytes read at once
COMMITTED = "commit_success.txt"  # orbax writes it last


class Damaged(UserError):
    """Bytes of the run were read and are wrong."""


def could_not_read(error: BaseException) -> bool:
    """Whether an error, or one that it hides, says that bytes could not be read: nothing about the bytes."""
    return any(_is_failure(link) for link in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    visited: set[int] = set()
    links = [error]
    while links:
        link = links.pop()
        if link is not None and id(link) not in visited:
            visited.add(id(link))
            yield link
            links += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]


def _is_failure(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in ABSENT
    numbers = [int(first or second) for first, second in SYSTEM_ERROR.findall(str(error))]
    if numbers:
        return any(number not in ABSENT for number in numbers)
    return is_trouble(error) or str(error).startswith(UNDECIDED)


def everywhere(read: Callable[[], Any], folder: epath.Path, place: str) -> tuple[Any, str]:
    """(value, "") if `read` works on every process, else (None, why): all processes take the same branch.

    `folder` is what `read` reads. Raises RunFailed on all processes, naming `place`, if one of them could not read.
    """
    value, reason, outcome = None, "", READABLE
    try:
        value = read()
    except PASS_ON:
        raise
    except Exception as error:
        reason, outcome = line(error), UNREADABLE if could_not_read(error) else DAMAGED
    if outcome == DAMAGED and (failure := _unreadable_file(folder)):
        reason, outcome = failure, UNREADABLE
    if jax.process_count() > 1:
        outcomes = multihost_utils.process_allgather(np.array(outcome))
        if (worst := int(outcomes.max())) > outcome:
            outcome, reason = worst, f"process {int(np.argmax(outcomes))} could not read it"
    if outcome == UNREADABLE:
        raise unreadable(place, reason)
    return (None, reason) if outcome else (value, "")


def _unreadable_file(folder: epath.Path) -> str:
    """Reads every file below a folder to its end; why one cannot be read, or "" if all can."""
    try:
        for entry in folder.iterdir():
            if entry.is_dir():
                if reason := _unreadable_file(entry):
                    return reason
                continue
            with entry.open("rb") as file:
                while file.read(BLOCK):
                    pass
    except Exception as error:
        return f"{folder}: {line(error)}" if could_not_read(error) else ""
    return ""


def is_folder(folder: epath.Path) -> bool:
    """Whether the folder is there. Raises RunFailed if the system cannot say: pathlib and etils take that for a no."""
    if folder.is_dir():
        return True
    if not str(folder).startswith(SCHEME):
        try:
            os.stat(folder)
        except OSError as error:
            if error.errno not in ABSENT:
                raise unreadable(str(folder), line(error)) from error
    return False


def unseen_steps(folder: epath.Path, steps: Sequence[int]) -> list[int]:
    """The committed steps in a folder that are not among `steps`: orbax takes a folder that it cannot list for an empty one.

    Raises OSError if the folder cannot be listed.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    others = [int(name) for name in names if name.isdigit() and int(name) not in steps]
    return sorted(step for step in others if _is_committed(folder / str(step)))


def _is_committed(step: epath.Path) -> bool:
    try:
        (step / COMMITTED).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def unreadable(place: str, reason: str) -> RunFailed:
    """The error for something that may be good and could not be read."""
    return RunFailed(f"{place} could not be read: {reason}; nothing was changed: run the same command again")


def line(error: BaseException) -> str:
    """An error's class and text on one line, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
