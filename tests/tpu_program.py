"""Reading what the XLA:TPU compiler made of a function for a slice that nobody has rented: cycles by class, pads, kernels.

A Pallas kernel's own work is not in the cycles: count it apart (`splash_cycles`).
"""

import os
import re
from collections import Counter
from typing import Any

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two compilers at once fail on a lock file otherwise

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proreflow_jax.models.kernels import lanes
from proreflow_jax.runtime.mesh import make_mesh

CLOCK = {"v5e": 1.503e9, "v5p": 1.751e9, "v6e": 1.751e9}  # cycles a second
PEAK = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12}  # bfloat16 FLOP a second
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
NAME = re.compile(r'op_name="([^"]*)"')
CLASSES = (  # (class, regex found in the operation, its name and the jax operation it comes from); the first match wins
    ("splash", r"^custom-call .*splash_mha"),
    ("convolution", r"conv_general_dilated"),
    ("attention", r"BTNH|BNTS|softmax|vmap\(\)"),
    ("linear", r"dot_general"),
    ("pad", r"^pad "),
    ("copy", r"^(copy|transpose|reshape|bitcast|slice|concatenate)|/(concatenate|broadcast_in_dim|reshape|transpose)$"),
    ("other", r""),
)


def slice_mesh(name: str, **axes: int) -> Mesh:
    """A (data, fsdp, tensor) mesh over a slice's devices, as in slice_mesh("v5e:2x2", fsdp=2)."""
    return make_mesh(**axes, devices=list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices))


def abstract(shape: tuple[int, ...], mesh: Mesh, *axes: Any, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is not there, spread over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def instructions(text: str) -> list[tuple[str, str, str, str]]:
    """(name, shape, operation, the rest) of each instruction; a kernel's spans several lines."""
    found = list(INSTRUCTION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(*match.groups(), text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def cycles(text: str) -> list[tuple[int, str, str, str, str]]:
    """(cycles, class, name, shape, the jax operation it comes from), dearest first; loop bodies are counted once."""
    rows = []
    for name, shape, operation, rest in instructions(text):
        if count := CYCLES.search(rest):
            source = (NAME.search(rest) or [""] * 2)[1]
            label = f"{operation} {name} {source}"
            rows.append((int(count[1]), next(c for c, pattern in CLASSES if re.search(pattern, label)), name, shape, source))
    return sorted(rows, reverse=True)


def by_class(text: str) -> Counter:
    """{class: cycles} without the kernels, whose estimate is of their traffic only."""
    total = Counter()
    for count, kind, *_ in cycles(text):
        if kind != "splash":
            total[kind] += count
    return total


def kernels_of(text: str) -> list[str]:
    """Names of the splash kernels in the order of the program: "fwd", "dq", "dkv"."""
    found = [(name, rest) for name, _, operation, rest in instructions(text) if operation == "custom-call"]
    return [re.search(r"splash_mha_([a-z]+)", name)[1] for name, _ in found if "splash_mha" in name]


def activation_pads(text: str, tokens: int) -> list[str]:
    """Pads whose result has the tokens on an axis."""
    return [f"{name} = {shape}" for name, shape, op, _ in instructions(text) if op == "pad" and str(tokens) in shape]


def splash_cycles(chip: str, rows: int, heads: int, tokens: int, width: int) -> float:
    """A forward kernel's floor: two products of padded heads at the chip's peak."""
    return 4 * rows * heads * tokens**2 * lanes(width) / PEAK[chip] * CLOCK[chip]
