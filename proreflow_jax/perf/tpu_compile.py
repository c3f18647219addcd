"""Programs compiled for TPU slices without a TPU: libtpu contains XLA's TPU compiler."""

import hashlib
import importlib.util
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from proreflow_jax import UserError
from proreflow_jax.perf import chips, hlo_cost, program_text, schedule

ENVIRONMENT = {  # libtpu does not query the machine, logs nothing, and allows several processes
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
UNREAD = ".*PjRtCompiler must be constructed with a Client"  # jax keeps a program for a TPU, and needs one to read it again
_REPORT = "*after_optimizations-memory-usage-report.txt"  # which libtpu dumps long before a program is done
_SIZE = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
POLL = 0.5  # seconds between looks at the dump
_seen: dict[str, "Compiled"] = {}  # what this process has compiled: stages share their train step, which may take half an hour


class Memory(NamedTuple):
    """Bytes of one chip by the compiler's account; of a program that is too large only the temporaries are known."""

    arguments: int  # as they lie on the chip, filled up to its tiles
    temporaries: int
    outputs: int  # that do not lie where an argument lay
    code: int

    @property
    def total(self) -> int:
        """What must fit: arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs


class Compiled(NamedTuple):
    """A program as the compiler describes it."""

    memory: Memory
    cost: hlo_cost.Cost | None  # None: not known, see `no_cost`
    seconds: float  # of compilation
    no_cost: str = ""  # why the cost is not known
    too_large: bool = False  # for the chip's memory: the compiler gave up


def prepare_compiler() -> None:
    """Keeps jax from looking for a TPU; to be called before any use of devices. Raises ValueError if libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install libtpu (the extra `plan`)")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.block_until_ready(jax.numpy.ones(()) + 1)  # the CPU has read its flags
    os.environ["XLA_FLAGS"] = without_cpu(os.environ.get("XLA_FLAGS", ""))


def without_cpu(flags: str) -> str:
    """XLA's flags but those of CPUs alone: libtpu ends the process over flags that it does not know."""
    return " ".join(flag for flag in flags.split() if not flag.startswith("--xla_cpu_"))


def devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of `slices` slices such as "v5e:4x4", for a mesh. Raises ValueError if the slice is not known."""
    chips.slice_chip(name)
    several = {"num_slices": slices} if slices > 1 else {}
    with schedule.counting():
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices


def compile_for(jitted: Any, arguments: Sequence[Any], chip: chips.Chip, told: Callable[[int], None] = int) -> Compiled:
    """Compiles a jitted function for the devices that its arguments' shardings name.

    Args:
      jitted: of `jax.jit`.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      chip: of the devices.
      told: is called with the bytes of program and arguments, at most, as soon as the compiler knows them, long before its end.

    A program that is too large raises nothing; `memory.temporaries` is then the size that the compiler asked for. A program
    whose text can't be read raises nothing either: its memory is known, its cost is not. The same program is compiled once.
    """
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    places = sorted(map(str, jax.tree.leaves(arguments)[0].sharding.device_set))
    key = hashlib.sha256("\n".join([repr(chip), *places, lowered.as_text()]).encode()).hexdigest()
    if key not in _seen:
        _seen[key] = _compiled(lowered, chip, start, told)
    return _seen[key]


def _compiled(lowered: Any, chip: chips.Chip, start: float, told: Callable[[int], None]) -> Compiled:
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        meanwhile(POLL, lambda: _listen(Path(folder), told)),
    ):
        warnings.filterwarnings("ignore", message=UNREAD)
        schedule.clear()
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            needed = too_large(str(error))
            if needed is None:
                raise
            seconds = time.perf_counter() - start
            return Compiled(Memory(0, needed, 0, 0), None, seconds, "the program is too large to be compiled", too_large=True)
        seconds = time.perf_counter() - start
        return describe(program, Path(folder), chip, seconds)


@contextmanager
def meanwhile(seconds: float, look: Callable[[], Any]) -> Iterator[None]:
    """Calls `look` in a thread, every so many seconds, until the block ends or it returns something true."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds) and not look():
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _listen(folder: Path, told: Callable[[int], None]) -> bool:
    """Tells the size of a program if its dump has it."""
    size = early_size(folder)
    if size is not None:
        told(size)
    return size is not None


def early_size(folder: Path) -> int | None:
    """Bytes of a program and its arguments, at most, by a dump that is under way; None: not known yet.

    SDXL's step on v6e took 15.6 GiB in the end where this says 21.5; on v5e and v5p steps took what it says. Parts for
    SparseCores have reports of their own.
    """
    for path in folder.glob(_REPORT):
        if ".extracted." not in path.name and (match := _SIZE.search(path.read_text(errors="replace"))):
            return int(match[1])
    return None


def describe(program: Any, folder: Path, chip: chips.Chip, seconds: float) -> Compiled:
    """Memory and cost of a compiled program; memory is the compiler's own numbers and needs no text."""
    memory = memory_of(program)
    try:
        return Compiled(memory, program_text.program_cost(program, folder, chip), seconds)
    except program_text.UnknownText as error:
        return Compiled(memory, None, seconds, str(error))


def memory_of(program: Any) -> Memory:
    """The compiler's account of a compiled program, on any platform."""
    sizes = program.memory_analysis()
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


def too_large(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's message that it is too large; None for any other message."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            return int(float(match[1]) * _UNITS[match[2]])
    return None
