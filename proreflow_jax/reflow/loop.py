"""batch -> step -> metrics -> checkpoint. The device never waits for the host: step n is read after n + 1 is sent."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from proreflow_jax.runtime import stopping
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import OFF, Metrics, Trace, check_finite

COUNT = "count"
WHOLE, INPUT, DEVICE = "seconds", "wait_input", "wait_device"  # of a step, on this host; no two runs agree in them


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


class Waits:
    """How long this host stood still, in seconds a step since it was last asked; what else a step takes is its own work.

    Waiting for the input includes the way of a batch onto the devices.
    """

    def __init__(self) -> None:
        self._steps, self._began = 0, time.monotonic()
        self._sums = {INPUT: 0.0, DEVICE: 0.0}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Around a wait for INPUT or DEVICE."""
        began = time.monotonic()
        yield
        self._sums[what] += time.monotonic() - began

    def over(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The batches themselves; the time that each is waited for counts."""
        batches = iter(batches)
        while True:
            with self.on(INPUT):
                batch = next(batches, None)
            if batch is None:
                return
            self._steps += 1
            yield batch

    def means(self) -> dict[str, float]:
        """{WHOLE, INPUT, DEVICE: seconds a step}, and begins anew."""
        now, steps = time.monotonic(), max(self._steps, 1)
        means = {name: value / steps for name, value in {WHOLE: now - self._began, **self._sums}.items()}
        self._steps, self._began, self._sums = 0, now, dict.fromkeys(self._sums, 0.0)
        return means


def run_loop(
    step: Callable[[Any, Any], tuple[Any, PyTree]],
    state: Any,
    batches: Iterable[tuple[int, Any]],
    *,
    total: int,
    metrics: Metrics,
    checkpoints: Checkpoints,
    log_every: int,
    meta: Callable[[int], dict[str, Any]],
    trace: Trace = OFF,
    let_go: Callable[[Any], Any] = lambda state: state,
) -> Any:
    """Trains until `total` steps are done and saved.

    Args:
      step: (state, batch) -> (state, numbers); donates the state.
      state: after the step that the first batch follows.
      batches: yields (position, batch); position counts the steps done before it.
      total, log_every: steps of the whole run, between lines of metrics.jsonl; every step is checked for non-finite numbers.
      meta: steps done -> what is stored beside the state of that step.
      trace, let_go: records chosen steps; the state -> as it is saved.

    Returns the last state. Raises FloatingPointError naming step and window, and as `stopping.stop` once a save is committed.
    """
    waits = Waits()

    def settle(done: int, numbers: PyTree) -> None:
        with waits.on(DEVICE):
            values = host_metrics(numbers)
        check_finite(done, values)
        if done % log_every == 0 or done == total:
            metrics.write(done, values | waits.means())

    pending = None
    with stopping.saving():
        for position, batch in waits.over(batches):
            done = position + 1
            with trace.step(done):
                state, numbers = step(state, batch)
            stopping.stepped()
            trace.sent(done, numbers)
            if pending is not None:
                settle(*pending)
            pending = (done, numbers)
            requested = stopping.requested()
            if requested or checkpoints.due(done) or done == total:
                settle(*pending)
                pending = None
                metrics.publish()  # first: a run that goes on from this step has the lines up to it
                checkpoints.save(done, let_go(state), meta(done))
            checkpoints.check()
            if requested and done < total:
                checkpoints.wait()
                stopping.stop(f"step {done} is saved")
            if done == total:
                break
        checkpoints.wait()
    return state
