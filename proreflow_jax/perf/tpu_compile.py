"""Programs compiled for TPU slices that are not here: XLA's real TPU compiler comes with libtpu and needs no chip."""

import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from proreflow_jax import UserError
from proreflow_jax.perf import chips, hlo_cost

LIBTPU = "libtpu==0.0.51"
ENVIRONMENT = {  # libtpu asks nobody which machine this is, says nothing, and lets another process compile too
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_NUMBER = r"([\d.]+)([KMGT]?)i?B?"
_TOO_LARGE = (  # of the compiler's message: (needs, has)
    re.compile(rf"\({_NUMBER}\) exceeds available HBM \({_NUMBER}\)"),
    re.compile(rf"Used {_NUMBER} of {_NUMBER} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one chip, by the compiler's account; 0 for what it did not get to say of a program that is too large."""

    arguments: int  # as they lie on the chip, filled up to its tiles
    temporaries: int
    outputs: int  # that do not lie where an argument lay
    code: int

    @property
    def total(self) -> int:
        """What must fit: arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs


class Compiled(NamedTuple):
    """What is known of a program without running it."""

    memory: Memory
    cost: hlo_cost.Cost | None  # None: too large, the compiler gave up
    seconds: float  # that compiling took


def prepare_compiler() -> None:
    """Keeps jax from looking for a TPU here, before it looks for any device. Raises ValueError if there is no TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the TPU compiler is not installed: pip install {LIBTPU} (the extra `plan`)")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices such as "v5e:4x4", for a mesh. Raises ValueError for a slice that is not known."""
    chips.slice_chip(name)
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices


def compile_for(jitted: Any, arguments: Sequence[Any], chip: chips.Chip) -> Compiled:
    """Compiles a jitted function for the devices that its arguments' shardings name.

    Args:
      jitted: of `jax.jit`.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      chip: what the devices are.

    A program that does not fit is no error: its `cost` is None and `memory.temporaries` is what the compiler asked for.
    """
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            needs = too_large(str(error))
            if needs is None:
                raise
            return Compiled(Memory(0, needs, 0, 0), None, time.perf_counter() - start)
        return Compiled(memory_of(program), hlo_cost.cost(text_of(program, Path(folder)), chip), time.perf_counter() - start)


def text_of(program: Any, folder: Path) -> str:
    """A compiled program's text. jaxlib cannot read back all that a libtpu newer than it says (SDXL's step on v6e): then what
    libtpu itself wrote into `folder`.
    """
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        written = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        if not written:
            raise
        return written[-1].read_text()


def memory_of(program: Any) -> Memory:
    """The compiler's account of a compiled program, on any platform."""
    found = program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def too_large(message: str) -> int | None:
    """Bytes that a program would need, from the compiler's message that they are too many; None for any other message."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def held(tree: Any) -> int:
    """Bytes that one device holds of arrays (or shapes with shardings), before they are filled up to tiles."""
    return sum(_held(leaf) for leaf in jax.tree.leaves(tree))


def _held(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8  # a threefry key's two words
    size = leaf.dtype.itemsize
    for length in shape:
        size *= length
    return size
