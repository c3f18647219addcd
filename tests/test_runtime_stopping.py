"""Ctrl-C and SIGTERM are heard at once, also in a call that Python cannot interrupt; what is unsaved is saved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from verb import CONFIG, ROOT

from proreflow_jax import STOPPED

PATIENCE = 300  # seconds, for machines that do other things too
PROGRAM = """
import ctypes, itertools, sys, threading
from proreflow_jax.reflow import loop
from proreflow_jax.run import cli
from proreflow_jax.runtime import stopping

stuck_at, waiting_at, total = (int(word) for word in sys.argv[1:4])
del sys.argv[1:4]

class Record:
    def write(self, step, values): pass
    def publish(self): pass
    def due(self, step): return False
    def preempted(self, step): return False
    def save(self, step, state, meta): print("saved", step, flush=True)
    def check(self): pass
    def wait(self): pass

def compile():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(1, print, ["begun"]).start()
    libc.pthread_mutex_lock(mutex)  # for ever, as deaf to Python's handlers as XLA

def job(config):
    def step(state, batch):
        if batch == stuck_at:
            compile()
        if batch == waiting_at:
            print("begun", flush=True)
            sys.stdin.readline()
        return state + 1, {"loss": 0.0}
    if stuck_at < 0:
        compile()
    batches = ((i, i) for i in itertools.count())
    record = Record()
    loop.run_loop(step, 0, batches, total=total, metrics=record, checkpoints=record, log_every=1, meta=lambda done: {})
    print("finished", flush=True)
    stopping.stop_if_asked()
    print("went on", flush=True)

cli.start(job, "A job.", "CONFIG")
"""
NEVER = 10**6
SAVED = "step 3 is saved; run the same command again to go on"


@contextmanager
def program(stuck_at: int, waiting_at: int, total: int, unbuffered: str = "1") -> Iterator[subprocess.Popen]:
    """The job, once it stands where it was told to."""
    words = [sys.executable, "-c", PROGRAM.replace("CONFIG", str(CONFIG)), *map(str, (stuck_at, waiting_at, total))]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout.readline() == "begun\n", process.stderr.read()
            yield process
        finally:
            process.kill()


SIGNALS = [(signal.SIGTERM, STOPPED, "asked to stop"), (signal.SIGINT, 130, "interrupted")]
HANGUP = (signal.SIGHUP, STOPPED, "asked to stop")  # the terminal is gone


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS, ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("stuck_at", [-1, 0], ids=["before the loop", "in the first step"])
def test_a_stop_in_a_compile_ends_the_job_in_seconds(number, code, word, stuck_at):
    with program(stuck_at, NEVER, 3) as process:
        process.send_signal(number)
        assert process.stderr.readline().startswith(f"{word}: nothing is unsaved")
        assert process.wait(timeout=PATIENCE) == code
        assert process.stderr.read() == f"{word}; run the same command again to go on\n"


@pytest.mark.parametrize(("number", "code", "word"), [*SIGNALS, HANGUP], ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stop_between_checkpoints_saves_the_step(number, code, word):
    with program(NEVER, 2, 9) as process:
        process.send_signal(number)
        assert process.stderr.readline().startswith(f"{word}: the step under way is saved first")
        out, errors = process.communicate("\n", timeout=PATIENCE)
        assert (process.returncode, out) == (code, "saved 3\n")
        assert SAVED in errors and "Traceback" not in errors


@pytest.mark.parametrize("total", [9, 3], ids=["stopped", "finished"])
def test_a_reader_of_the_log_that_is_gone_changes_neither_work_nor_exit_code(total):
    """As `2>&1 | tee log` is, once tee was killed."""
    with program(NEVER, 2, total, unbuffered="") as process:
        process.stderr.close()
        if total == 9:
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
        out, _ = process.communicate("\n", timeout=PATIENCE)
    assert (process.returncode, out) == ((STOPPED, "saved 3\n") if total == 9 else (0, "saved 3\nfinished\nwent on\n"))


def test_a_reader_of_the_log_that_is_gone_does_not_keep_a_compile_from_ending():
    with program(0, NEVER, 3) as process:
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == STOPPED


def test_a_second_press_ends_at_once():
    with program(2, NEVER, 9) as process:
        process.send_signal(signal.SIGINT)
        assert "is saved first; Ctrl-C again ends at once" in process.stderr.readline()
        time.sleep(1)  # two presses, not one that came by two ways
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130 and process.stderr.read() == "interrupted twice: ended at once\n"


def test_a_stop_at_the_last_step_is_heard_before_anything_else_begins():
    with program(NEVER, 2, 3) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("asked to stop")
        out, _ = process.communicate("\n", timeout=PATIENCE)
        assert (process.returncode, out) == (STOPPED, "saved 3\nfinished\n")


STILL = """
import ctypes
from proreflow_jax.runtime.stopping import alive, watching
def deadlock():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
with watching(0.2):
    pass
with watching(1):
    alive()
    deadlock()
"""


def test_a_deadlock_ends_with_its_stacks():
    ended = subprocess.run([sys.executable, "-c", STILL], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1 and "Timeout" in ended.stderr and "in deadlock" in ended.stderr
