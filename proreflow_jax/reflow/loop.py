"""batch -> step -> metrics -> checkpoint. The device never waits for the host: step n is read after n + 1 is sent."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from proreflow_jax.runtime import stopping
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import OFF, Metrics, Trace, check_finite

COUNT = "count"
SUMS = "sums"  # beside the state of a step between two lines: what the next line's means are made of
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


class Means:
    """Means of the numbers of the steps since the last line; of a window over its examples.

    Between two lines `stored` goes with the checkpoint, so a run that goes on from there writes the line of one never stopped.
    """

    def __init__(self, stored: Mapping[str, Any] | None = None) -> None:
        stored = stored or {}
        self._steps: int = stored.get("steps", 0)
        self._sums: dict[str, float] = dict(stored.get("numbers", {}))
        self._windows: dict[str, list[float]] = {name: list(values) for name, values in stored.get("windows", {}).items()}

    def add(self, numbers: PyTree) -> None:
        """The numbers of one step, on the host, as `host_metrics` takes them."""
        self._steps += 1
        for name, value in numbers.items():
            if name != "window":
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        for name, sums in numbers.get("window", {}).items():
            before = self._windows.get(name, [0.0] * len(sums))
            pairs = zip_longest(before, sums, fillvalue=0.0)  # older checkpoints have the stage's windows alone
            self._windows[name] = [old + float(new) for old, new in pairs]

    def stored(self) -> dict[str, Any]:
        """As JSON, a copy, for the save goes on in the background; {} right after a line."""
        return {"steps": self._steps, "numbers": dict(self._sums), "windows": dict(self._windows)} if self._steps else {}

    def take(self) -> dict[str, float]:
        """The means, and begins anew."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        windows = {name: np.array(sums) for name, sums in self._windows.items()}
        self.__init__()
        return means | host_metrics({"window": windows} if windows else {})


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


class Onlookers(NamedTuple):
    """Who looks on while a loop runs, and changes none of its numbers."""

    beside: Callable[[int], Mapping[str, float]] = lambda done: {}  # steps done -> other numbers of a line
    stepped: Callable[[int, Mapping[str, float]], None] = lambda done, values: None  # a step that the device has done
    pictured: Callable[[int, Any], None] = lambda done, state: None  # the state of a planned save, before the save
    saved: Callable[[int], None] = lambda done: None  # a save is on its way


ALONE = Onlookers()


class _Books:
    """What is written of the steps that are done: lines of metrics, checkpoints."""

    def __init__(
        self, metrics: Metrics, checkpoints: Checkpoints, onlookers: Onlookers, sums: Mapping[str, Any] | None
    ) -> None:
        self._metrics, self._checkpoints, self._onlookers = metrics, checkpoints, onlookers
        self.waits, self._means = Waits(), Means(sums)

    def settle(self, done: int, numbers: PyTree, line: bool) -> None:
        """Reads a step's numbers, which waits for the device; raises FloatingPointError for one that is none."""
        with self.waits.on(DEVICE):
            numbers = dict(jax.device_get(numbers))
            values = host_metrics(numbers)
        check_finite(done, values)
        self._means.add(numbers)
        self._onlookers.stepped(done, values)
        if line:
            self._metrics.write(done, self._means.take() | self._onlookers.beside(done) | self.waits.means())

    def save(self, done: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves the state of a settled step."""
        self._metrics.publish()  # first: a run that goes on from this step has the lines up to it
        rest = self._means.stored()
        self._checkpoints.save(done, state, meta | ({SUMS: rest} if rest else {}))
        self._onlookers.saved(done)


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
    sums: Mapping[str, Any] | None = None,
    onlookers: Onlookers = ALONE,
) -> Any:
    """Trains until `total` steps are done and saved.

    Args:
      step: (state, batch) -> (state, numbers); donates the state.
      state: after the step that the first batch follows.
      batches: yields (position, batch); position counts the steps done before it.
      total, log_every: steps of the whole run, between lines of metrics.jsonl; every step is checked for non-finite numbers.
      meta: steps done -> what is stored beside the state of that step.
      trace, let_go: records chosen steps; the state -> as it is saved.
      sums: what a checkpoint's meta has under SUMS, of the step that the first batch follows.
      onlookers: whoever looks on.

    Returns the last state. Raises FloatingPointError naming step and window, and as `stopping.stop` once a save is committed.
    """
    books = _Books(metrics, checkpoints, onlookers, sums)
    line = lambda done: done % log_every == 0 or done == total
    pending = None
    with stopping.saving():
        for position, batch in books.waits.over(batches):
            done = position + 1
            with trace.step(done):
                state, numbers = step(state, batch)
            stopping.stepped()
            trace.sent(done, numbers)
            if pending is not None:
                books.settle(*pending)
            pending = (done, numbers, line(done))
            requested = stopping.requested()
            planned = checkpoints.due(done) or done == total
            if planned or requested:
                books.settle(*pending)
                pending = None
                if planned and not requested:  # whoever asked to stop waits for the save alone
                    onlookers.pictured(done, state)
                books.save(done, let_go(state), meta(done))
            checkpoints.check()
            if requested and done < total:
                checkpoints.wait()
                stopping.stop(f"step {done} is saved")
            if done == total:
                break
        checkpoints.wait()
    return state
