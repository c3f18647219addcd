"""The process of a verb whose flags are read: logging, the other processes, signals, and how it ends."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from proreflow_jax.run.errors import exit_code, message
from proreflow_jax.run.nearest_config import check_whole
from proreflow_jax.runtime import processes, stopping
from proreflow_jax.runtime.endings import AGAIN, FAILED, INTERRUPTED, say
from proreflow_jax.runtime.mesh import initialize_distributed
from proreflow_jax.runtime.processes import check_alone, leads
from proreflow_jax.runtime.programs import keep_programs

MOST_HOST_DEVICES = 8
NOISY = ("orbax", "jax", "etils")  # their warnings are for programmers, their errors are shown
SAID_BY_US = ("gcsfs", "fsspec", "google")  # their errors come back as a line of ours
ONE_A_LEAF = ("absl", "asyncio", "concurrent.futures")  # a traceback a leaf of one failed save, which is a line of ours


def carry_out(verb: Callable[..., None], config: ConfigDict | None, values: dict[str, Any], *, pod: bool, traced: bool) -> None:
    """Calls the verb, with the config if there is one. Comes back where the verb does.

    Any error that `exit_code` does not know is a bug of the package and shows its traceback; so does every error if `traced`.
    """
    name = verb.__name__
    try:
        _prepare(name, pod)
        with stopping.listening():
            if config is None:
                verb(**values)
            else:
                check_whole(config)
                keep_programs(config.get("compilation_cache", ""))
                verb(config, **values)
    except KeyboardInterrupt as error:
        _leave(error, INTERRUPTED, f"{name}: interrupted; {AGAIN}")
    except Exception as error:
        code = exit_code(error)
        if code is not None and not traced:
            _leave(error, code, f"{name}: {message(error)}")
        elif not processes.several():
            raise
        _leave(error, code or FAILED, traceback.format_exc().rstrip())


def _prepare(name: str, pod: bool) -> None:
    """Logging to stderr, the other processes, and one host device per core where a CPU is all there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    quiet_libraries()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_HOST_DEVICES
        )
        jax.config.update("jax_num_cpu_devices", 1 << (cores.bit_length() - 1))  # a power of two divides most batches
    if not initialize_distributed():
        return
    processes.watch_others()
    if not pod:
        check_alone(name)
    if not leads():
        logging.getLogger().setLevel(logging.WARNING)  # process 0 says how it goes


def _leave(error: BaseException, code: int, text: str) -> None:
    """Shows the text and ends the process, and all others of its job."""
    code, text = processes.end_of_another() or (code, text)  # then this error is but what follows from that end
    say(text)
    if processes.several():
        processes.announce(code=code, line=message(error) or type(error).__name__)
        processes.leave(code)
    sys.exit(code)


def quiet_libraries() -> None:
    """For the whole process: a verb's. Log records of the levels that matter still come through."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in (*SAID_BY_US, *ONE_A_LEAF):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    """An unraisablehook without the errors of a save that was given up: its coroutines find their event loop closed."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)
