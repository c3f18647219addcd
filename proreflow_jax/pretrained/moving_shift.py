"""A rectified flow whose shift depends on the resolution, as Flux's: read at one resolution, it is one fixed shift."""

import math
from collections.abc import Mapping
from typing import Any

from proreflow_jax import UserError

_LINE = {  # diffusers' defaults where the shift depends on the resolution
    "time_shift_type": "exponential",
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def at_tokens(scheduler_config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A config whose shift depends on the resolution (`use_dynamic_shifting`, as Flux's) as one with a fixed shift.

    Diffusers' pipelines lay a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift); at this many
    image tokens its value mu is the shift itself (`time_shift_type` "linear") or the shift's logarithm ("exponential").
    Another config comes back as it is. tokens: of one image, (latent side / patch side)^2.
    Raises UserError, one line, for another time_shift_type and for two bounds at the same number of tokens.
    """
    config = dict(scheduler_config)
    if not config.get("use_dynamic_shifting"):
        return config
    line = _LINE | {name: config[name] for name in _LINE.keys() & config.keys()}
    kind, least, most, low, high = line.values()
    if kind not in ("exponential", "linear") or None in line.values() or least == most:
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in line.items())} in scheduler_config.json: must be exponential "
            "or linear, between two numbers of tokens; choose another --config.model.path"
        )
    mu = low + (high - low) * (tokens - least) / (most - least)
    return config | {"shift": math.exp(mu) if kind == "exponential" else mu, "use_dynamic_shifting": False}
