"""A run beside its folder, on wandb, if its config asks for it: numbers, config, pictures, under one id that the folder keeps.

Never in the way: wandb that is missing, refuses, or hangs costs one line of warning, and the run goes on without it. A call
that may speak to the network waits SECONDS at most. Keys are wandb's own business (`wandb login`, WANDB_API_KEY): none is
read here, and of wandb's errors the log names the kind alone. WANDB_MODE=offline keeps all of it on this disk.
"""

import importlib
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from proreflow_jax import MissingFile, UserError
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
RECORD = "wandb.json"  # in the run's folder: {"id": ...}
SECONDS = 60.0  # that wandb may take to begin, and to end
ID = re.compile(r"[a-z0-9]{8,64}")
INSTALL = "pip install '.[wandb]'"


class Tracker:
    """Sends numbers and pictures to a run of wandb, until a call fails. Process 0's alone."""

    def __init__(self, run: Any = None, module: Any = None) -> None:
        self._run, self._module = run, module

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step of the whole run."""
        self._send({**values, "step": step})

    def picture(self, step: int, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture of a step of the whole run."""
        if self._run is not None:
            self._try("sending a picture", lambda: self._run.log({"samples": self._module.Image(image), "step": step}))

    def close(self) -> None:
        """Ends the run there; waits SECONDS at most."""
        if self._run is not None:
            self._try("ending", lambda: _in_time(self._run.finish))
        self._run = None

    def _send(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._try("sending numbers", lambda: self._run.log(values))

    def _try(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            _warn(f"{what}: {type(error).__name__}")
            self._run = None


NOWHERE = Tracker()


def open_tracker(run: Location, project: str, entity: str, fields: Mapping[str, Any]) -> Tracker:
    """The run of wandb that belongs to a run's folder, begun or resumed; NOWHERE if it cannot be had, and one line says why.

    project, entity: of wandb; "": no run at all, the user's own entity. fields: the config.
    """
    if not project:
        return NOWHERE
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        _warn(f"it is not installed, {INSTALL}")
        return NOWHERE
    try:
        if _would_ask() and not wandb.login(prompt=False):
            _warn("no key is known, `wandb login`")
            return NOWHERE
        number = _kept_id(run)
        begin = dict(project=project, entity=entity or None, id=number, name=run.name, resume="allow", config=dict(fields))
        folder = {"dir": str(run)} if isinstance(run, Path) else {}
        settings = wandb.Settings(silent=True, console="off", init_timeout=SECONDS)
        live = _in_time(lambda: wandb.init(**begin, **folder, settings=settings))
        live.define_metric("*", step_metric="step")
    except Exception as error:  # of any kind: a library, its network, its user's key
        _warn(type(error).__name__)
        return NOWHERE
    return Tracker(live, wandb)


def _warn(reason: str) -> None:
    log.warning("wandb is not used (%s); the run goes on without it, turn it off by --config.wandb.project=", reason)


def _would_ask() -> bool:
    """Whether wandb would ask for a key on this terminal, in the middle of a run."""
    return os.environ.get("WANDB_MODE", "online") in ("", "online") and sys.stdin is not None and sys.stdin.isatty()


def _kept_id(run: Location) -> str:
    """The id under which wandb knows the run: made once, kept in the run's folder."""
    path = run / RECORD
    try:
        number = atomic.read_json(path).get("id")
        if isinstance(number, str) and ID.fullmatch(number):
            return number
    except (MissingFile, UserError):
        pass
    number = uuid.uuid4().hex[:16]
    if isinstance(run, Path):
        run.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, {"id": number})
    return number


def _in_time(call: Callable[[], Any]) -> Any:
    """What a call gives, in a thread that is left behind after SECONDS. Raises what it raises, TimeoutError if it hangs."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, name="wandb", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if "error" in outcome:
        raise outcome["error"] if isinstance(outcome["error"], Exception) else RuntimeError("wandb ended itself")
    if "value" not in outcome:
        raise TimeoutError(f"no answer in {SECONDS:g} s")
    return outcome["value"]
