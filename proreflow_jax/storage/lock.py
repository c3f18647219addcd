"""The lock of a folder: one writer. On a disk the kernel frees it; in an object store it is a lease."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from proreflow_jax.storage import lease, paths
from proreflow_jax.storage.gcs import ObjectPath
from proreflow_jax.storage.lease import Locked


def lock_folder(folder: str | Path | ObjectPath) -> AbstractContextManager[None]:
    """Hold `folder`/.lock; the kernel frees it when the process dies, so a kill leaves nothing to clean up.

    In an object store it is a lease, which runs out. Raises Locked, a ValueError naming the folder and its holder.
    """
    folder = paths.parse_path(folder)
    return lease.hold(folder) if isinstance(folder, ObjectPath) else _flocked(folder)


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, folder)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise Locked(f"{folder} is in use by process {holder}: stop it, or choose another run folder") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
