"""How a verb ends: the user's errors are one line and 2, failures of run and machine one line and 1, bugs a traceback and 1."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from verb import CONFIG, ROOT

from proreflow_jax import STOPPED, MissingFile, RunFailed, UserError
from proreflow_jax.pretrained import hub
from proreflow_jax.run import cli, process


def end(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple:
    """(exit code, stderr) of a verb that does the work; what passes through is a traceback for the user."""

    def job(config: object) -> None:
        work()

    monkeypatch.setattr(sys, "argv", ["job.py", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(process, "_prepare", lambda *_: None)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.start(job, "A job.", str(CONFIG))
    return ended.value.code, capsys.readouterr().err


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


BUGS = {
    "ValueError": (raises(ValueError("too many values to unpack")), ValueError),
    "TypeError": (raises(TypeError("missing argument")), TypeError),
    "KeyError": (lambda: {}["x"], KeyError),
    "RuntimeError": (raises(RuntimeError("generator raised StopIteration")), RuntimeError),
    "shapes": (lambda: jnp.broadcast_to(jnp.ones(3), (2,)), ValueError),
    "XLA": (raises(jax.errors.JaxRuntimeError("INTERNAL: x")), jax.errors.JaxRuntimeError),
    "JSON": (lambda: __import__("json").loads("{"), ValueError),
    "no such file": (lambda: Path("/no/such/file").read_text(), FileNotFoundError),
    "no folder": (lambda: os.listdir(__file__), NotADirectoryError),
    "there already": (lambda: os.mkdir("/tmp"), FileExistsError),
    "another's words": (raises(OSError("image file is truncated")), OSError),
}


@pytest.mark.parametrize(("work", "kind"), BUGS.values(), ids=BUGS)
def test_a_bug_shows_its_traceback(monkeypatch, capsys, work, kind):
    with pytest.raises(kind):
        end(work, monkeypatch, capsys)


FAILURES = {
    "the run's own": (raises(RunFailed("a worker ended")), "a worker ended"),
    "diverged": (raises(FloatingPointError("step 3: loss=nan")), "loss=nan"),
    **{
        errno.errorcode[number]: (raises(OSError(number, os.strerror(number), "/runs/x")), "/runs/x")
        for number in (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EDQUOT)
    },
    "no connection": (raises(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")), "Connection refused"),
    "in our words": (lambda: hub._check_disk(1 << 70), "make room"),
}


@pytest.mark.parametrize(("work", "words"), FAILURES.values(), ids=FAILURES)
def test_a_failure_of_run_or_machine_is_one_line(monkeypatch, capsys, work, words):
    code, said = end(work, monkeypatch, capsys)
    assert code == 1 and said.startswith("job: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [UserError("--config.train.batch=3"), MissingFile("prompts.txt\nis not there")], ids=repr)
def test_the_user_s_error_is_one_line_and_2(monkeypatch, capsys, error):
    code, said = end(raises(error), monkeypatch, capsys)
    assert code == 2 and said == f"job: {' '.join(str(error).split())}\n"
    with pytest.raises(UserError):
        end(raises(error), monkeypatch, capsys, "--traceback")


def test_a_stopped_verb_and_an_interrupted_one_have_codes_of_their_own(monkeypatch, capsys):
    assert end(lambda: None, monkeypatch, capsys) == (0, "")
    assert end(raises(SystemExit(STOPPED)), monkeypatch, capsys) == (75, "")
    assert end(raises(KeyboardInterrupt()), monkeypatch, capsys)[0] == 130


PROGRAM = """
import sys
from proreflow_jax.run import cli, process
def job(config):
    import jax.numpy as jnp
    jnp.broadcast_to(jnp.ones(3), (2,))
cli.start(job, "A job.", sys.argv.pop(1))
"""


def test_a_shape_error_of_jax_ends_the_process_with_1_and_a_traceback():
    done = subprocess.run([sys.executable, "-c", PROGRAM, CONFIG], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: Incompatible types" in done.stderr, done.stderr


IMPORTS = """
import logging, sys, warnings
before = sys.unraisablehook, list(warnings.filters)
names = ("", "absl", "asyncio", "concurrent.futures", "orbax", "jax", "etils", "gcsfs", "fsspec", "google")
import jax, orbax.checkpoint
state = lambda: [(name, logging.getLogger(name).disabled, logging.getLogger(name).level) for name in names]
logs = state()
filters = list(warnings.filters)
import proreflow_jax.runtime.checkpoint, proreflow_jax.run.cli, proreflow_jax.reflow.loop
assert state() == logs, state()
assert sys.unraisablehook is before[0], sys.unraisablehook
assert not [row for row in warnings.filters if row not in filters and "coroutine" in str(row)], warnings.filters
"""


def test_importing_changes_no_logger_no_hook_and_no_filter():
    """Whoever uses the package as a library keeps the messages of the other libraries."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


QUIET = """
import logging, sys
from proreflow_jax.run.process import quiet_libraries
seen = []
sys.unraisablehook = lambda unraisable: seen.append(str(unraisable.exc_value))
quiet_libraries()
quiet_libraries()
for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).error("a traceback a leaf")
class Loud:
    def __init__(self, words): self.words = words
    def __del__(self): raise RuntimeError(self.words)
for words in ("Event loop is closed", "another"):
    Loud(words)
assert seen == ["another"], seen
"""


def test_a_verb_s_process_hears_nothing_of_a_save_that_was_given_up():
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
