"""Processes of one job end together: an error on one of them ends all, with that process's line.

A process that fails alone leaves the others waiting for it in a collective, for ever: its heartbeats go on. So the process says
so through jax's coordination service, where every process looks once a second. The others print the line and leave.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from jax._src import distributed

from proreflow_jax import UserError

KEY, GONE = "proreflow/end", "proreflow/gone"
LOOK_S = 1.0  # between looks at the service
GRACE_S = 4.0  # for the others to come to an end by themselves, and for a save under way
LEAVE_S = 9.0  # until a process that failed leaves, whatever holds it
USER_ERROR, FAILED = 2, 1  # exit codes; run/endings.py has all


def several() -> bool:
    """Whether this is one of several processes. Looks for no devices, unlike jax."""
    return distributed.global_state.client is not None and (distributed.global_state.num_processes or 1) > 1


def watch_others() -> None:
    """Starts looking for another process's end; for a job of one process nothing happens."""
    if several():
        watcher = _Watcher()
        watcher.start()
        atexit.register(watcher.end)  # before jax's own farewell


def announce(error: BaseException | None = None, code: int = FAILED, line: str = "") -> None:
    """Tells all processes that this one ends, by an error or by code and line; the first to speak is heard."""
    if not several():
        return
    if error is not None:
        code = USER_ERROR if isinstance(error, UserError) else FAILED
        line = f"{type(error).__name__}: {error}" if not str(error) else str(error)
    message = {"process": _own(), "code": code, "line": " ".join(line.split())}
    with suppress(Exception):  # another was first, or the service is gone
        _client().key_value_set(KEY, json.dumps(message))


def end_of_another() -> tuple[int, str] | None:
    """(exit code, line) of another process that has announced its end; None if none has."""
    message = _read() if several() else None
    if message is None or message["process"] == _own():
        return None
    return message["code"], f"process {message['process']}: {message['line']}"


def leave(code: int) -> None:
    """Ends a process of several after `announce`. Process 0, which is the service, waits until the others have gone."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    with suppress(Exception):
        _client().key_value_set(f"{GONE}/{_own()}", "")
        until = time.monotonic() + GRACE_S + 2 * LOOK_S
        while _own() == 0 and time.monotonic() < until:
            if len(_client().key_value_dir_get(GONE)) >= distributed.global_state.num_processes:
                break
            time.sleep(0.1)
    os._exit(code)


def _own() -> int:
    return distributed.global_state.process_id


def _client() -> Any:
    return distributed.global_state.client


def _read() -> dict[str, Any] | None:
    try:
        return json.loads(_client().key_value_try_get(KEY))
    except Exception:  # nobody has spoken; a lost service is jax's own affair
        return None


class _Watcher(threading.Thread):
    """Looks for the end of another process, and of this one if it does not come to its own."""

    def __init__(self) -> None:
        super().__init__(name="together", daemon=True)
        self._over = threading.Event()

    def end(self) -> None:
        """Stops looking."""
        self._over.set()
        self.join(2 * LOOK_S)

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            if (message := _read()) is None:
                continue
            mine = message["process"] == _own()
            if not self._over.wait(LEAVE_S if mine else GRACE_S):
                sys.stderr.write(f"process {message['process']}: {message['line']}\n")
                leave(message["code"])
