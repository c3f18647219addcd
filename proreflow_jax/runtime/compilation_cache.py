"""Compiled programs that outlive their process: jax's persistent compilation cache, in a folder or an object store.

Compiling is minutes of a start, and the same at every start. Process 0 writes, all read. A program is kept if compiling took
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS (1). The same code, jax, flags and devices find it again. Whoever can write to the
folder can have code run here, and XLA's programs for a CPU fit CPUs of one kind: see docs/storage.md.
"""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from proreflow_jax import UserError
from proreflow_jax.storage import gcs, paths

FIELD = "--config.compilation_cache"


def keep_programs(folder: str) -> None:
    """Programs compiled from here on are kept in `folder`, and taken from there; "" leaves all as the environment says.

    Raises ValueError or FileNotFoundError, one line, for a folder that cannot be used.
    """
    if not folder:
        return
    location = paths.parse_path(folder, FIELD)
    if isinstance(location, Path):
        location = _made(location.expanduser().absolute())
    else:
        paths.check_reachable(location)
        gcs.prepare_gcs()
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own part of it writes to disks alone
    jax.config.update("jax_compilation_cache_dir", str(location))
    compilation_cache.reset_cache()  # jax opens the folder once


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{FIELD}={folder} must be a folder that can be written to ({error.strerror})") from None
    return folder
