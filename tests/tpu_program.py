"""What the XLA:TPU compiler made of a function for a slice that nobody has rented: kernels, pads. `hlo` counts cycles."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proreflow_jax.perf import tpu_compile
from proreflow_jax.runtime.mesh import make_mesh

INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)


def slice_mesh(name: str, **axes: int) -> Mesh:
    """A (data, fsdp, tensor) mesh over a slice's devices, as in slice_mesh("v5e:2x2", fsdp=2)."""
    tpu_compile.prepare_compiler()
    return make_mesh(**axes, devices=list(tpu_compile.devices(name)))


def abstract(shape: tuple[int, ...], mesh: Mesh, *axes: Any, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is not there, spread over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def instructions(text: str) -> list[tuple[str, str, str, str]]:
    """(name, shape, operation, the rest) of each instruction; a kernel's spans several lines."""
    found = list(INSTRUCTION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(*match.groups(), text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def kernels_of(text: str) -> list[str]:
    """Names of attention's kernels in the order of the program: splash's "fwd", "dq", "dkv", ours "fwd", "bwd"."""
    found = [(name, rest) for name, _, operation, rest in instructions(text) if operation == "custom-call"]
    return [kernel[1] for name, _ in found if (kernel := re.search(r"(?:splash|narrow)_mha_([a-z]+)", name))]


def activation_pads(text: str, tokens: int) -> list[str]:
    """Pads whose result has the tokens on an axis."""
    return [f"{name} = {shape}" for name, shape, op, _ in instructions(text) if op == "pad" and str(tokens) in shape]
