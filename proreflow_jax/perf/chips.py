"""Chips and slices: memory, speed and topologies.

Memory is the limit that XLA's TPU compiler sets for a program (from its error message), a little less than the marketed 16, 95
and 32 GB. FLOP/s, memory bandwidth and links (all links of a chip together) are published numbers. Clocks turn the compiler's
cycles into seconds.

`narrow` and `joint` are cycles of models/narrow_kernel.py for a million scores of one head, forward and backward, read from its
last schedule by libtpu 0.0.51 at 4,096 tokens; a v5p has two cores that share the heads. `narrow`, by the width of a head, is a
UNet's self-attention, forward with a running maximum: small scores take 17 to 35 % less. `cross` is its attention to a text of
80 tokens: of 4,096 queries 40 wide, of 1,024 of 80, of 64 of either, whichever is more. `joint` is an image and 128 tokens of
text, biases and norms inside, heads of 64, small scores.
"""

from collections.abc import Mapping
from typing import NamedTuple

from proreflow_jax import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator."""

    memory: int  # bytes that a program may use
    peak: float  # FLOP/s in bfloat16
    bandwidth: float  # bytes/s of its memory
    clock: float = 0.0  # Hz of the compiler's cycles; 0: not a TPU
    links: float = 0.0  # bytes/s to the other chips of a slice
    lanes: int = 128  # a matrix unit's side, to which a head's width is filled up
    narrow: Mapping[int, tuple[float, float]] = {}
    cross: Mapping[int, tuple[float, float]] = {}
    joint: tuple[float, float] = (0.0, 0.0)


NARROW = {
    "v5e": {40: (3110, 6120), 64: (3570, 6515), 80: (3675, 7145)},
    "v5p": {40: (1595, 3085), 64: (1775, 3365), 80: (1915, 3680)},
    "v6e": {40: (2280, 3750), 64: (2350, 3895), 80: (2410, 4030)},
}
CROSS = {
    "v5e": {40: (4974, 10956), 64: (6201, 13296), 80: (6494, 13403)},
    "v5p": {40: (2487, 5487), 64: (3052, 6659), 80: (3235, 6665)},
    "v6e": {40: (4285, 7391), 64: (5859, 9656), 80: (6104, 10498)},
}
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 1.503e9, 200e9, narrow=NARROW["v5e"], cross=CROSS["v5e"], joint=(3015, 6920)),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2765e9, 1.751e9, 600e9, narrow=NARROW["v5p"], cross=CROSS["v5p"], joint=(1415, 3460)),
    "v6e": Chip(
        int(31.24 * GIB),
        918e12,
        1638e9,
        1.751e9,
        448e9,
        lanes=256,
        narrow=NARROW["v6e"],
        cross=CROSS["v6e"],
        joint=(1765, 4235),
    ),
}
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16"),
}
LARGE = {"v5e": ("16x16",), "v5p": ("4x8x8", "8x8x8", "8x8x16"), "v6e": ("16x16",)}  # told by shapes, not compiled
KINDS = {  # jax's device_kind, from its beginning -> the chip at hand
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H200": Chip(141 * 10**9, 989e12, 4800e9),
    "NVIDIA H100": Chip(80 * 10**9, 989e12, 3350e9),
    "NVIDIA A100": Chip(80 * 10**9, 312e12, 2039e9),
}


def slice_chip(name: str) -> Chip:
    """The chip of a slice such as "v5e:4x4". Raises ValueError, one line, that lists the known slices."""
    family, _, shape = name.partition(":")
    if shape not in (*SLICES.get(family, ()), *LARGE.get(family, ())):
        known = "; ".join(f"{chip}: {', '.join((*shapes, *LARGE[chip]))}" for chip, shapes in SLICES.items())
        raise UserError(f"--slice={name} is not a slice that is known, as in --slice=v5e:4x4 ({known})")
    return CHIPS[family]


def is_large(name: str) -> bool:
    """Whether a slice is told by shapes alone: no program of a whole model was compiled for one of its size."""
    family, _, shape = name.partition(":")
    return shape in LARGE.get(family, ())


def chip_count(name: str) -> int:
    """Chips of a slice by its name."""
    slice_chip(name)
    count = 1
    for side in name.partition(":")[2].split("x"):
        count *= int(side)
    return count


def chip_of(kind: str) -> Chip | None:
    """The chip by jax's `device_kind`; None if it is not known."""
    return next((chip for start, chip in KINDS.items() if kind.startswith(start)), None)
