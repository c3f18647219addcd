"""batch -> step -> metrics -> checkpoint. The device never waits for the host: step n is read after n + 1 is sent."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import Metrics, check_finite

log = logging.getLogger(__name__)
COUNT = "count"


def host_metrics(numbers: PyTree) -> dict[str, float]:
    """Device metrics -> {name: float}. A "window" entry holds per-window sums and their counts, (n,) each.

    Windows that no example of the batch fell into are left out.
    """
    numbers = dict(jax.device_get(numbers))
    windows = numbers.pop("window", {})
    counts = np.asarray(windows.get(COUNT, ()))
    flat = {name: float(value) for name, value in numbers.items()}
    for name, sums in windows.items():
        if name != COUNT:
            flat |= {f"window/{k}/{name}": float(sums[k] / counts[k]) for k in np.flatnonzero(counts)}
    return flat


def run(
    step: Callable[[Any, Any], tuple[Any, PyTree]],
    state: Any,
    batches: Iterable[tuple[int, Any]],
    *,
    total: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    log_every: int,
    meta: Callable[[int], dict[str, Any]],
) -> Any:
    """Trains until `total` steps are done and saved.

    Args:
      step: (state, batch) -> (state, numbers); donates the state.
      state: after the step that the first batch follows.
      batches: yields (position, batch); position counts the steps done before it.
      total: steps of the whole run.
      log_every: steps between lines of metrics.jsonl; every step is checked for non-finite numbers.
      meta: steps done -> what is stored beside the state of that step.

    Returns the last state. Raises FloatingPointError naming step and window; SystemExit(0) after a SIGTERM, once the step
    is committed.
    """

    def settle(done: int, numbers: PyTree) -> None:
        values = host_metrics(numbers)
        check_finite(done, values)
        if done % log_every == 0 or done == total:
            metrics.write(done, values)

    pending = None
    with _sigterm() as asked:
        for position, batch in batches:
            state, numbers = step(state, batch)
            if pending is not None:
                settle(*pending)
            done = position + 1
            pending = (done, numbers)
            stopping = asked.is_set() or checkpoints.preempted(done)
            if stopping or checkpoints.due(done) or done == total:
                settle(*pending)
                pending = None
                metrics.publish()  # first: a run that goes on from this step has the lines up to it
                checkpoints.save(done, state, meta(done))
            checkpoints.check()
            if stopping and done < total:
                checkpoints.wait()
                log.warning("asked to stop: step %d is saved; run the same command again to go on", done)
                raise SystemExit(0)
            if done == total:
                break
    checkpoints.wait()
    return state


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. With jax.distributed its own notice is used instead (all processes stop together)."""
    asked = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
