"""SIGTERM and Ctrl-C at a point of our choice instead of anywhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def sigterm_event() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. With jax.distributed jax's own notice is used instead (all processes stop together)."""
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


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
