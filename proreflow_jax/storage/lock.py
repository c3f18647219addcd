"""The lock of a folder: one writer. On a disk the kernel frees it; in an object store it is a lease."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.storage import paths
from proreflow_jax.storage.gcs import LOCK, ObjectPath


def lock_folder(folder: str | Path | ObjectPath) -> AbstractContextManager[None]:
    """Hold `folder`/.lock; the kernel frees it when the process dies, so a kill leaves nothing to clean up.

    In an object store it is a lease, which runs out. Raises Locked, a ValueError naming the folder and its holder.
    """
    folder = paths.parse_path(folder)
    return hold_lease(folder) if isinstance(folder, ObjectPath) else _flocked(folder)


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # less the user's umask
    try:
        _take_flock(handle, folder)
        yield
    finally:
        os.close(handle)


def _take_flock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise Locked(f"{folder} is in use by process {holder}: stop it, or choose another run folder") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)


log = logging.getLogger(__name__)
BEAT_S, EXPIRY_S, LOOK_S = 10.0, 30.0, 1.0
LOST = 1  # exit status of a holder that is none any more


class Locked(UserError):
    """Another process holds the folder."""


@contextmanager
def hold_lease(folder: ObjectPath) -> Iterator[None]:
    """Hold `folder`/.lock until the block ends. Raises Locked, one line; ValueError if the folder cannot be written."""
    mark, record = folder / LOCK, holder_record()
    try:
        generation = _take_lease(mark, record, folder)
    except PermissionError as error:
        raise UserError(str(error)) from None
    beating = _Beat(mark, record, generation)
    beating.start()
    try:
        yield
    finally:
        beating.end()


def _take_lease(mark: ObjectPath, record: dict[str, Any], folder: ObjectPath) -> int:
    """Makes the lock, or takes over the lock of a dead holder. Returns its generation."""
    data, announced = json.dumps(record).encode(), False
    generation = 0
    while True:
        try:
            return mark.put(data, generation=generation)
        except FileExistsError:
            generation, holder = _look(mark)
        if holder.get("token") == record["token"]:  # the answer to a put that succeeded was lost
            return generation
        alive = runs_here(holder) if generation else False
        if alive is None:
            if not announced:
                log.info("%s: locked by %s; waiting up to %.0f s to see whether it lives", folder, _name(holder), EXPIRY_S)
            announced, alive = True, _is_renewed(mark, generation)
        if alive:
            raise Locked(f"{folder} is in use by {_name(holder)}: stop it, or choose another run folder")


def _look(mark: ObjectPath) -> tuple[int, dict[str, Any]]:
    """(generation, record) of the lock; (0, {}) if it is gone."""
    try:
        data, generation = mark.read()
        record = json.loads(data)
    except FileNotFoundError:
        return 0, {}
    except ValueError:
        return generation, {}
    return generation, record if isinstance(record, dict) else {}


def _is_renewed(mark: ObjectPath, generation: int) -> bool:
    """Whether the holder renews the lock within EXPIRY_S; False too if the lock is deleted."""
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
        """Ends the process, unless the lock holds our own record: a renewal that succeeded and whose answer was lost."""
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


def holder_record() -> dict[str, Any]:
    """This process, as others recognise it: for `runs_here`."""
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
    """The machine's boot and its view of process numbers; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: object) -> str:
    """When a process began, in ticks of its machine; empty if the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def runs_here(holder: dict[str, Any]) -> bool | None:
    """Whether a holder on this machine still runs; None for a holder on another machine."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return None
    return bool(holder.get("started")) and _started(holder.get("process")) == holder["started"]
