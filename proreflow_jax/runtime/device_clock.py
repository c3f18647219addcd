"""How long the devices wait for the host between the first and the last of their programs."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class DeviceClock:
    """Adds up the time in which no timed program is on this process's devices. A context manager; its end waits for the last.

    The first program, which is compiled, is in no number. Programs must be sent in the order in which they run.
    """

    def __init__(self) -> None:
        self.idle = 0.0  # seconds in which nothing was sent that was not ready
        self.seconds = 0.0  # since the first program was ready
        self._began: float | None = None
        self._free = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="device clock")

    def timed(self, send: Callable[[], Any]) -> Any:
        """Sends a program by a call that comes back with its arrays, ready or not; returns them."""
        sent = time.perf_counter()
        arrays = send()
        self._pool.submit(self._note, sent, arrays)
        return arrays

    def _note(self, sent: float, arrays: Any) -> None:
        """In a thread, program by program."""
        jax.block_until_ready(arrays)
        ready = time.perf_counter()
        if self._began is None:
            self._began = ready
        else:
            self.idle += max(0.0, sent - self._free)
            self.seconds = ready - self._began
        self._free = ready

    def line(self) -> str:
        """`the devices waited 0.12 of 35.1 s for this host (0.3 %)`."""
        share = 100 * self.idle / self.seconds if self.seconds else 0.0
        return f"the devices waited {self.idle:.2f} of {self.seconds:.1f} s for this host ({share:.1f} %)"

    def __enter__(self) -> "DeviceClock":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
