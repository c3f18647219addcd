"""Put a student's delta onto another fine-tune of the same base: --config.model.path + --delta -> a diffusers folder.

The delta is a folder that `export --form=delta` wrote. Nothing is trained; how well it serves depends on how far the
fine-tune has gone from the base, so look at its pictures.
"""

import logging
import math

from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.run import cli
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)


def merge(config: ConfigDict, delta: str, out: str, scale: float, overwrite: bool) -> None:
    """The verb. Raises ValueError or FileNotFoundError, one line, if the two are not of the same network or schedule."""
    from proreflow_jax.exports.formats import FILES
    from proreflow_jax.exports.place import OUT, check_out
    from proreflow_jax.exports.write_merge import write_merge

    if not delta or not out:
        raise UserError("--delta (a folder that export --form=delta wrote) and --out (the folder to write) must both be given")
    if not math.isfinite(scale):
        raise UserError(f"--scale={scale} must be a number")
    target, source = paths.parse_path(out, OUT), paths.parse_path(delta, "--delta")
    check_out(config, target, delta=source)
    source = paths.local_copy(source, "--delta")
    if not (source / FILES["delta"]).is_file():
        raise MissingFile(f"--delta={delta} holds no {FILES['delta']}: write it by export --form=delta")
    log.info("%s", write_merge(config, source, target, scale, overwrite))


if __name__ == "__main__":
    options = {
        "delta": ("", "folder that export --form=delta wrote"),
        "out": ("", "folder to write"),
        "scale": (1.0, "factor of the delta", (-100, 100)),
        "overwrite": (False, "replace an export that stands there; anything else is never replaced"),
    }
    cli.start(merge, __doc__, "finetune", options)
