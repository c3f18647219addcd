"""Several processes that run one job: what process 0 does for all, and what all must know alike.

Every process runs the same verb. What computes runs on all of them together; what writes a file, or decides by looking at
a folder, is process 0's, and the others wait for its word: a folder may look different from another host. One process
alone waits for nobody.

All end together. A process that fails alone leaves the others waiting for it in a collective, for ever: its heartbeats go on.
So the process says so through jax's coordination service, where every process looks once a second. The others print the line
and leave.
"""

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from proreflow_jax import RunFailed, UserError
from proreflow_jax.runtime.endings import FAILED, USER_ERROR
from proreflow_jax.storage.atomic import clear_drafts
from proreflow_jax.storage.lock import lock_folder
from proreflow_jax.storage.paths import Location, parse_path

T = TypeVar("T")
FINE, REFUSED, BROKEN = range(3)  # how process 0's work went
KEY, GONE = "proreflow/end", "proreflow/gone"
LOOK_S = 1.0  # between looks at the service
GRACE_S = 4.0  # for the others to come to an end by themselves, and for a save under way
LEAVE_S = 9.0  # until a process that failed leaves, whatever holds it
_work = threading.local()  # under_way: this thread of process 0 is at the work of `first`


def leads() -> bool:
    """Whether this is process 0, which writes for all."""
    return jax.process_index() == 0


def check_alone(what: str) -> None:
    """Raises UserError, one line, in a job of several processes."""
    if jax.process_count() > 1:
        raise UserError(f"{what} runs in one process and this job has {jax.process_count()}: run it on one host")


def _speaks_alone() -> bool:
    """Whether nobody listens: the only process, or process 0 at the work of `first`."""
    return jax.process_count() == 1 or getattr(_work, "under_way", False)


@contextmanager
def _working() -> Iterator[None]:
    _work.under_way = True
    try:
        yield
    finally:
        _work.under_way = False


def first(work: Callable[[], T]) -> T | None:
    """Process 0 does the work while the others wait; returns what it gave, None on the others.

    The work may ask `first`, `first_says`, `first_reads` again: process 0 answers itself, for the others do not ask.
    Raises what the work raised; on the others UserError for a UserError, RunFailed for anything else.
    """
    if _speaks_alone():
        return work()
    done, outcome = None, FINE
    try:
        if leads():
            with _working():
                done = work()
    except UserError:
        outcome = REFUSED
        raise
    except BaseException:
        outcome = BROKEN
        raise
    finally:
        outcome = int(broadcast(np.array(outcome)))
        if not leads() and outcome != FINE:
            raise {REFUSED: UserError, BROKEN: RunFailed}[outcome]("process 0 could not go on and says why")
    return done


def first_says(question: Callable[[], bool]) -> bool:
    """Process 0's answer, on all of them. Raises as `first` does."""
    return bool(broadcast(np.array(bool(first(question)))))


def first_reads(read: Callable[[], Any]) -> Any:
    """What process 0 reads, on all of them: a value that JSON can hold. Raises as `first` does."""
    value = first(read)
    if _speaks_alone():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast(np.array(text.size)))
    return json.loads(broadcast(text if leads() else np.zeros(size, np.uint8)).tobytes())


@contextmanager
def job_lock(folder: str | Location) -> Iterator[None]:
    """This job alone writes to `folder`; process 0 holds it for all. Two writers would lose each other's saves in silence.

    Drafts that killed writers left there are removed. Raises UserError naming folder and holder.
    """

    def enter() -> None:
        stack.enter_context(lock_folder(folder))
        clear_drafts(parse_path(folder))

    with ExitStack() as stack:
        first(enter)
        yield


def broadcast(value: np.ndarray) -> np.ndarray:
    """Process 0's value, on all of them; it has one shape and dtype everywhere."""
    return value if _speaks_alone() else np.asarray(multihost_utils.broadcast_one_to_all(value))


def all_arrived() -> None:
    """Waits until every process has come here."""
    broadcast(np.array(0))


def host_arrays(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """Device arrays as whole numpy arrays on every process, one after the other; all processes must ask for them."""
    return jax.tree.map(_host_array, tree)


def _host_array(value: Array) -> np.ndarray:
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(jax.device_get(value))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: a save cut in two leaves orbax's threads waiting for the other half."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    notices: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *notice: notices.append(notice))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if notices:
        before(*notices[0])


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
        super().__init__(name="ends of others", daemon=True)
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
