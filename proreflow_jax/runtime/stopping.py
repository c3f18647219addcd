"""How a job is asked to stop: Ctrl-C, SIGTERM, a terminal that closes; heard at once, also while XLA compiles.

The interpreter's own handler writes the signal's number to a socket, wherever the main thread is; a thread reads it and says
what will happen. A training loop asks at every step (`requested`), saves, and ends. Everywhere else nothing is unsaved, since
files are whole or absent: the main thread is interrupted, and ended from outside if it does not answer within GRACE_S.
In a job of several processes jax's notice of SIGTERM is used: all stop at the same step.

A job that stands still ends too (`watching`): the stacks of all threads are printed, and the process exits with 1. A deadlock
is no lost process: heartbeats go on. The timer is C's (faulthandler), so that it needs no Python thread to be alive.
"""

import ctypes
import faulthandler
import itertools
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental import multihost_utils

from proreflow_jax import STOPPED
from proreflow_jax.runtime import processes
from proreflow_jax.runtime.endings import AGAIN, INTERRUPTED, say

log = logging.getLogger(__name__)
GRACE_S = 4.0  # seconds for a main thread with nothing unsaved
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_PRESS_S = 0.5  # a terminal and a script may pass on one Ctrl-C each


class _State:
    """What the process was asked for, and whether it has something to save."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal; 0: none
        self.listening = False
        self.polled = False  # a loop asks for the signal
        self.unsaved = False  # the loop has made steps that are in no checkpoint
        self.reached = False  # all processes have agreed to stop


_state = _State()
_limits: list[float] = []  # seconds, of the watches under way
_calls = itertools.count(1)  # of jax's sync points, which all processes pass in one order


def stepped() -> None:
    """A step was made inside `saving`: from here on a stop waits for the next save, and the watchdog begins anew."""
    _state.unsaved = True
    alive()


@contextmanager
def saving() -> Iterator[None]:
    """Around a loop that looks at `requested` and then saves. Outside a verb SIGTERM is caught here alone, and given back."""
    main = threading.current_thread() is threading.main_thread()
    own = main and not _state.listening and not processes.several()
    before = signal.signal(signal.SIGTERM, _note) if own else None
    if main:
        _state.polled, _state.unsaved = True, False
    try:
        yield
    finally:
        if main:
            _state.polled = _state.unsaved = False
        if own:
            signal.signal(signal.SIGTERM, before)
            _state.number = 0


def requested() -> bool:
    """Whether to stop. In a job of several processes all must call it equally often; the answer is the same on all."""
    if not processes.several():
        return threading.current_thread() is threading.main_thread() and _state.number != 0
    _state.reached = _state.reached or multihost_utils.reached_preemption_sync_point(next(_calls))
    return _state.reached


def stop(saved: str) -> None:
    """Ends a job that was asked to stop: KeyboardInterrupt after Ctrl-C, else SystemExit(STOPPED).

    saved: what of the work is saved, for people.
    """
    log.warning("asked to stop: %s; %s", saved, AGAIN)
    raise KeyboardInterrupt if _state.number == signal.SIGINT else SystemExit(STOPPED)


def stop_if_asked() -> None:
    """Ends the job where nothing is unsaved, if it was asked to stop; called as `requested` is."""
    if requested():
        stop("nothing is unsaved")


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Ends the process if `alive` is not called for so long inside the block; 0: never."""
    _limits.append(seconds)
    alive()
    try:
        yield
    finally:
        _limits.pop()
        faulthandler.cancel_dump_traceback_later()
        alive()


def alive() -> None:
    """Something was done: a step, a batch."""
    if _limits and _limits[-1]:
        faulthandler.dump_traceback_later(_limits[-1], exit=True, file=sys.__stderr__)


@contextmanager
def listening() -> Iterator[None]:
    """For the whole of a verb, in the main thread: the signals of STOPS are ours, unless they are ignored (nohup)."""
    numbers = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or _state.listening:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    notify = _handler_of(signal.SIGTERM) if processes.several() else lambda: None
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _state.__init__()
    _state.listening = True
    threading.Thread(target=_listen, args=(reader, notify), name="stopping", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _state.__init__()
        writer.close()


def _handler_of(number: int) -> Callable[[], Any]:
    """Calls the handler that a library in C++ has installed: jax's notice of SIGTERM."""
    action = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).sigaction(number, None, action)
    (address,) = struct.unpack_from("P", action)
    if address in (int(signal.SIG_DFL), int(signal.SIG_IGN)):
        return lambda: None
    return lambda: ctypes.CFUNCTYPE(None, ctypes.c_int)(address)(number)


def _note(number: int, frame: object = None) -> None:
    _state.number = _state.number or number


def _interrupt(number: int, frame: object) -> None:
    """In the main thread, as soon as Python runs there."""
    _note(number)
    if not _state.polled and not processes.several():
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STOPPED)


def _listen(reader: socket.socket, notify: Callable[[], Any]) -> None:
    """In a thread: every signal, when it comes."""
    last, ending = 0.0, None
    while data := reader.recv(1):
        number, now = data[0], time.monotonic()
        if number not in STOPS:
            continue
        if ending is None:
            _note(number)
            _say(number)
            notify()
            ending = threading.Thread(target=_end_in_time, name="ending", daemon=True)
            ending.start()
        elif number == signal.SIGINT and now - last > ONE_PRESS_S:
            _end(INTERRUPTED, "interrupted twice: ended at once")
        last = now
    reader.close()


def _say(number: int) -> None:
    word = "interrupted" if number == signal.SIGINT else "asked to stop"
    what = "the step under way is saved first" if _state.unsaved else "nothing is unsaved"
    say(f"{word}: {what}; Ctrl-C {'again ' if number == signal.SIGINT else ''}ends at once")


def _end_in_time() -> None:
    """Ends the process once it has had nothing unsaved for GRACE_S: the main thread is in a compile, say."""
    since = time.monotonic()
    while time.monotonic() - since < GRACE_S:
        time.sleep(0.1)
        if not _state.listening:
            return  # the verb has come to its end
        if _state.unsaved:
            since = time.monotonic()
    code, word = (INTERRUPTED, "interrupted") if _state.number == signal.SIGINT else (STOPPED, "asked to stop")
    _end(code, f"{word}; {AGAIN}")


def _end(code: int, line: str) -> None:
    say(line)
    if processes.several():
        processes.announce(code=code, line=line)
        processes.leave(code)
    os._exit(code)
