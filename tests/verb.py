"""Runs a verb as `python -m proreflow_jax.<verb>` would, inside the test's process: a start costs seconds of imports."""

import ast
import io
import json
import logging
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.digits import get_config
from proreflow_jax.models.layers import Compute
from proreflow_jax.models.network import Network
from proreflow_jax.pretrained import pipeline
from proreflow_jax.run import check_config, process
from proreflow_jax.runtime import mesh

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 2  # that verbs run on, unless a test says otherwise: several; each costs copies of a thousand arrays
CONFIG = ROOT / "configs" / "digits.py"
PROMPTS = ("a handwritten zero", "a handwritten one", "the number two", "a three", "a photo of the digit four", "five")
TINY = {  # two stages of a few steps, for the model of tiny.write_model on DEVICES, or on eight
    "name": "tiny",
    "stages": "(4, 2)",
    "export.stages": "(4, 2)",
    "data.kind": "prompts",
    "data.resolution": 8,
    "pairs.steps": 1,
    "pairs.substeps": 1,
    "pairs.examples": 32,
    "pairs.shard_size": 16,
    "pairs.batch": 16,
    "train.steps": 6,
    "train.batch": 16,
    "train.log_every": 2,
    "optimizer.warmup_steps": 2,
    "checkpoint.every": 2,
    "samples.prompts": "()",
    "evaluate.examples": 16,
    "evaluate.batch": 16,
    "evaluate.teacher_steps": "(8, 4)",
    "evaluate.student_steps": "((4, 4), (2, 2))",
    "evaluate.columns": 4,
}


class Ended(NamedTuple):
    """How a verb ended."""

    code: int
    out: str
    err: str


def tiny_flags(folder: Path, model: Path, **fields: object) -> list[str]:
    """--config and its overrides for the tiny chain in folder/runs; a field's dots are written as two underscores.

    Prompts lie where folder/prompts.at says, of a run that was copied, else in folder/prompts.txt, which is written if it is
    not there.
    """
    elsewhere = folder / "prompts.at"
    prompts = Path(elsewhere.read_text()) if elsewhere.exists() else folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    values = TINY | {"root": folder / "runs", "model.path": model, "data.path": prompts}
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    return [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in values.items())]


def tiny_config(tmp_path: Path, model: Path, **fields: object) -> ConfigDict:
    """The same chain as a config."""
    read = lambda value: ast.literal_eval(value) if isinstance(value, str) and value[0] == "(" else value
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    paths = {"root": str(tmp_path / "runs"), "model.path": str(model), "data.path": str(prompts)}
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return check_config.changed(get_config(), {name: read(value) for name, value in TINY.items()} | paths | named)


def keep_networks(patch: pytest.MonkeyPatch) -> None:
    """Draws each network once per config.json and way of computing: drawing is tracing, most of what a tiny model costs."""
    drawn = {}

    def once(name: str, make: Callable[..., Network]) -> Callable[..., Network]:
        def made(config: dict, *compute: Compute) -> Network:
            key = (name, json.dumps(config, sort_keys=True), compute)
            if key not in drawn:
                drawn[key] = make(config, *compute)
            return drawn[key]

        return made

    for name, make in list(pipeline.MAKERS.items()):
        patch.setitem(pipeline.MAKERS, name, once(name, make))


def few_devices(patch: pytest.MonkeyPatch) -> None:
    """A mesh whose size is left to the machine (an axis of -1) fills DEVICES of the devices that are there."""
    make = mesh.make_mesh

    def made(
        data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, slices: int = 1
    ) -> Mesh:
        if devices is None and -1 in (data, fsdp, tensor):
            devices = jax.devices()[:DEVICES]
        return make(data, fsdp, tensor, devices, slices)

    patch.setattr(mesh, "make_mesh", made)


@contextmanager
def quickly(programs: Path) -> Iterator[pytest.MonkeyPatch]:
    """Verbs draw each network once, use few devices, and compile no program anew that lies in the folder."""
    with pytest.MonkeyPatch.context() as patch, kept_programs(programs):
        keep_networks(patch)
        few_devices(patch)
        yield patch


def program_settings(folder: Path) -> dict[str, object]:
    """Of jax: compile quickly, keep every program in a folder."""
    return {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_enable_xla_caches": "none",  # else the folder's name is in the name of every program
    }


@contextmanager
def kept_programs(folder: Path) -> Iterator[None]:
    """XLA programs are compiled quickly, and once per folder, here and (by `environment`) in processes started from here."""
    wanted = program_settings(folder)
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def environment(cache: Path, devices: int = DEVICES) -> dict[str, str]:
    """Of a verb's own process: some CPU devices, and the very programs that `kept_programs` keeps in a folder."""
    flags = re.sub(r"(--xla_force_host_platform_device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    names = {name.upper(): str(value) for name, value in program_settings(cache).items()}
    return {**os.environ, "XLA_FLAGS": flags, **names}


def run(verb: str, *words: str) -> Ended:
    """The verb's exit code and output. Whatever else it raises is a traceback for the user, and so it is here."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, list(sys.path))
    root = logging.getLogger()
    names = ("", *process.NOISY, *process.SAID_BY_US, *process.ONE_A_LEAF)
    loggers, hook = {name: logging.getLogger(name).level for name in names}, sys.unraisablehook
    handlers = list(root.handlers)
    sys.argv = [f"proreflow_jax/{verb}.py", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, about modules that are imported already
            runpy.run_module(f"proreflow_jax.{verb}", run_name="__main__")
    except SystemExit as end:
        return Ended(end.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv, sys.path[:] = before
        root.handlers[:] = handlers
        sys.modules.pop("config_config", None)  # ml_collections would merge the next config file into it
        sys.unraisablehook = hook
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
    raise AssertionError(f"{verb} came back without an exit code")
