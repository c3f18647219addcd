"""Compiled programs, kept for the next start: in the folder that a config or the environment names, else in the user's cache.

The user's own folder is looked after here, since jax only ever adds to it: what was not read for longest goes once it holds
more than LIMIT bytes. Whoever can write to the folder can have code run by those who read it, so it belongs to the user alone.
Programs for CPUs fit CPUs with the same instructions; homes are shared by machines, so each kind has its folder.
"""

import hashlib
import logging
import os
import platform
import stat
from contextlib import suppress
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from proreflow_jax import UserError
from proreflow_jax.storage import gcs, paths

log = logging.getLogger(__name__)
FLAG = "--config.compilation_cache"
OFF = "off"  # the value by which nothing is kept
LIMIT = 10 * 2**30  # bytes of the user's own folder
CPU = Path("/proc/cpuinfo")


def keep_programs(folder: str) -> None:
    """Programs compiled from here on are kept in `folder`, and taken from there.

    folder: local or gs://; "": the one that jax has from the environment (JAX_COMPILATION_CACHE_DIR), else the user's own;
    `OFF`: none. Raises ValueError or FileNotFoundError, one line, for a named folder that cannot be used.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder:
        _use(_named(folder))
    elif jax.config.jax_enable_compilation_cache and not jax.config.jax_compilation_cache_dir:
        if own := _own_folder():
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else its path is part of every program's key
            _use(str(own))


def _use(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # jax opens the folder once


def _named(folder: str) -> str:
    location = paths.parse_path(folder, FLAG)
    if isinstance(location, Path):
        location = location.expanduser().absolute()
        try:
            location.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{FLAG}={location} must be a folder that can be written to ({error.strerror})") from None
    else:
        paths.check_reachable(location)
        gcs.prepare_gcs()
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own part of it writes to disks alone
    return str(location)


def _own_folder() -> Path | None:
    """The user's folder for this kind of machine, not too full; None, and one line says why, where there can be none."""
    folder: Path | str = "in the user's cache folder"
    try:
        folder = paths.cache_folder() / "programs" / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if not os.access(folder, os.W_OK | os.X_OK):
            reason = "it cannot be written to"
        elif status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = "others may write to it"
        else:
            clear_old(folder)
            return folder
    except (OSError, RuntimeError) as error:  # the second: no home is known
        reason = getattr(error, "strerror", None) or str(error)
    log.warning("compiled programs are not kept: %s, %s; name a folder by %s", folder, reason, FLAG)
    return None


def clear_old(folder: Path, limit: int = LIMIT) -> None:
    """Deletes the programs that were not read for longest, until the others have `limit` bytes at most."""
    rows = []
    for path in folder.glob("*-cache"):
        with suppress(FileNotFoundError):  # another start does the same
            rows.append((max(path.stat().st_atime, path.stat().st_mtime), path.stat().st_size, path))
    total = sum(size for _, size, _ in rows)
    for _, size, path in sorted(rows):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def _machine() -> str:
    """This kind of machine, by the instructions of its CPU."""
    text = CPU.read_text(errors="replace") if CPU.is_file() else platform.processor()
    features = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), text[:200])
    return f"{platform.machine() or 'cpu'}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
