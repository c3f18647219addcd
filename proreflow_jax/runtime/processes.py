"""Several processes that run one job: what process 0 does for all, and what all must know alike.

Every process runs the same verb. What computes runs on all of them together; what writes a file, or decides by looking at
a folder, is process 0's, and the others wait for its word: a folder may look different from another host. One process
alone waits for nobody.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from proreflow_jax import RunFailed, UserError
from proreflow_jax.storage.atomic import clear_drafts
from proreflow_jax.storage.lock import lock_folder
from proreflow_jax.storage.paths import Location, parse_path

T = TypeVar("T")
FINE, REFUSED, FAILED = range(3)


def leads() -> bool:
    """Whether this is process 0, which writes for all."""
    return jax.process_index() == 0


def check_alone(what: str) -> None:
    """Raises UserError, one line, in a job of several processes."""
    if jax.process_count() > 1:
        raise UserError(f"{what} runs in one process and this job has {jax.process_count()}: run it on one host")


def first(work: Callable[[], T]) -> T | None:
    """Process 0 does the work while the others wait; returns what it gave, None on the others.

    Raises what the work raised; on the others UserError for a UserError, RunFailed for anything else.
    """
    if jax.process_count() == 1:
        return work()
    done, outcome = None, FINE
    try:
        done = work() if leads() else None
    except UserError:
        outcome = REFUSED
        raise
    except BaseException:
        outcome = FAILED
        raise
    finally:
        outcome = int(broadcast(np.array(outcome)))
        if not leads() and outcome != FINE:
            raise {REFUSED: UserError, FAILED: RunFailed}[outcome]("process 0 could not go on and says why")
    return done


def first_says(question: Callable[[], bool]) -> bool:
    """Process 0's answer, on all of them. Raises as `first` does."""
    return bool(broadcast(np.array(bool(first(question)))))


def first_reads(read: Callable[[], Any]) -> Any:
    """What process 0 reads, on all of them: a value that JSON can hold. Raises as `first` does."""
    value = first(read)
    if jax.process_count() == 1:
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
    return value if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(value))


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
