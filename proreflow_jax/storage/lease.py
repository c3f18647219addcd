"""The lock of a folder in an object store: an object that only one process can make, and that its holder renews.

Every renewal is a new generation of the object. Who wants the lock and finds it taken looks whether it is renewed: if it is,
the folder is in use; if not for EXPIRY_S, its holder is no more and the lock is taken over, by a write that succeeds for one
contender only. No clock of two machines is compared. On the holder's own machine its process is looked at, so that a run that
was killed goes on at once. A holder that finds its lock taken (it was frozen for long) ends itself before it writes more.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proreflow_jax.storage.gcs import ObjectPath

log = logging.getLogger(__name__)
BEAT_S, EXPIRY_S, LOOK_S = 10.0, 30.0, 1.0
LOCK = ".lock"
LOST = 1  # exit status of a holder that is none any more


class Locked(ValueError):
    """Another process holds the folder."""


@contextmanager
def hold(folder: ObjectPath) -> Iterator[None]:
    """Hold `folder`/.lock until the block ends. Raises Locked, one line; ValueError if the folder cannot be written."""
    mark, record = folder / LOCK, _record()
    try:
        generation = _take(mark, record, folder)
    except PermissionError as error:
        raise ValueError(str(error)) from None
    beating = _Beat(mark, record, generation)
    beating.start()
    try:
        yield
    finally:
        beating.end()


def _take(mark: ObjectPath, record: dict[str, Any], folder: ObjectPath) -> int:
    """Makes the lock, or takes over that of a holder who is no more; its generation."""
    data, told = json.dumps(record).encode(), False
    seen = 0
    while True:
        try:
            return mark.put(data, generation=seen)
        except FileExistsError:
            seen, holder = _look(mark)
        if holder.get("token") == record["token"]:  # the answer to a put that succeeded was lost
            return seen
        alive = _runs_here(holder) if seen else False
        if alive is None:
            if not told:
                log.info("%s: locked by %s; waiting up to %.0f s to see whether it lives", folder, _name(holder), EXPIRY_S)
            told, alive = True, _is_renewed(mark, seen)
        if alive:
            raise Locked(f"{folder} is in use by {_name(holder)}: stop it, or choose another run folder")


def _look(mark: ObjectPath) -> tuple[int, dict[str, Any]]:
    """(generation, record) of the lock; (0, {}) if it is gone."""
    try:
        data, generation = mark.read()
        held = json.loads(data)
    except FileNotFoundError:
        return 0, {}
    except ValueError:
        return generation, {}
    return generation, held if isinstance(held, dict) else {}


def _is_renewed(mark: ObjectPath, generation: int) -> bool:
    """Whether the lock becomes a new generation within EXPIRY_S; False too if it goes away."""
    deadline = time.monotonic() + EXPIRY_S
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        if (now := _look(mark)[0]) != generation:
            return now != 0
    return False


class _Beat(threading.Thread):
    """Renews the lock until it is ended, then deletes it."""

    def __init__(self, mark: ObjectPath, record: dict[str, Any], generation: int) -> None:
        super().__init__(name="lease", daemon=True)
        self._mark, self._data, self._generation = mark, json.dumps(record).encode(), generation
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._generation = self._mark.put(self._data, generation=self._generation, quick=True)
            except (FileExistsError, FileNotFoundError):
                self._after_refusal()
            except OSError as error:
                log.warning("%s", error)

    def _after_refusal(self) -> None:
        """Ends the process unless the refused renewal is our own whose answer was lost."""
        try:
            data, generation = self._mark.read()
        except FileNotFoundError:
            data = generation = None
        except OSError as error:
            log.warning("%s", error)
            return
        if data == self._data:
            self._generation = generation
            return
        log.critical("%s was taken over by another process: this one ends before it writes more", self._mark)
        logging.shutdown()
        os._exit(LOST)

    def end(self) -> None:
        self._over.set()
        self.join()
        try:
            self._mark.unlink(missing_ok=True, generation=self._generation)
        except OSError as error:
            log.warning("%s stays behind (%s): the next run takes it over", self._mark, error)


def _record() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _machine() -> str:
    """One start of one machine, and its view of process numbers; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: object) -> str:
    """When a process began, in ticks of its machine; empty if it does not run, or is dead and only not yet buried."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if told[0] in "ZX" else told[19]


def _runs_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder, if it is of this machine, still runs; None for another machine's."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return None
    return bool(holder.get("started")) and _started(holder.get("process")) == holder["started"]
