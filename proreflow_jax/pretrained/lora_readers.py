"""Which layers of a LoRA file its readers take: tools drop layers of kohya's names that they do not know, without a word.

diffusers was tried with these versions. sd-scripts and ComfyUI were tried in November 2026, in versions that nobody noted, and
read in their source at these commits (networks/lora.py, comfy/lora.py); A1111 was read in its source alone.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from proreflow_jax.pretrained.lora_file import Factors

OUTER = r"^(conv_in|conv_out|time_embedding\.linear_[12])\.weight$"
SDXL_OUTER = r"^(conv_in|conv_out|(time|add)_embedding\.linear_[12])\.weight$"
READERS = {  # reader -> the weights whose factors it drops from a file in kohya's names, by name; of SDXL, of others
    "kohya's sd-scripts 02298e3": (SDXL_OUTER, OUTER),
    "diffusers 0.36 with peft 0.18": (OUTER, OUTER),
    "A1111 1.10": (r"^up_blocks\.0\.upsamplers\.0\.conv\.weight$", ""),
    "diffusers 0.42 with peft 0.21": ("", ""),
    "ComfyUI 00728eb": ("", ""),
}


def unread(names: Iterable[str], reader: str, family: str) -> list[str]:
    """The weights, of `names`, whose factors a reader drops; family is a model's, "xl" for SDXL."""
    pattern = READERS[reader][family != "xl"]
    return [name for name in names if pattern and re.search(pattern, name)]


def lost_energy(factors: Mapping[str, Factors], family: str) -> dict[str, float]:
    """{reader: share of a LoRA's energy in layers that it drops}; energy is the sum of the squares of what is added."""
    energies = {name: _energy(layer) for name, layer in factors.items()}
    whole = sum(energies.values()) or 1.0
    return {reader: sum(energies[name] for name in unread(energies, reader, family)) / whole for reader in READERS}


def _energy(layer: Factors) -> float:
    """|alpha / r * up @ down|^2, from two small Gram matrices."""
    r = layer.down.shape[0]
    up, down = np.asarray(layer.up, np.float64).reshape(-1, r), np.asarray(layer.down, np.float64).reshape(r, -1)
    return float((layer.alpha / r) ** 2 * np.sum((up.T @ up) * (down @ down.T)))
