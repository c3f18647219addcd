"""The grid's cells: one method at one seed and budget each, made by one process or several, kept by what they depend on."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from proreflow_jax import STOPPED, RunFailed, UserError
from proreflow_jax.evaluation import figures
from proreflow_jax.flow import windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Params
from proreflow_jax.reproduction.cell import Programs, Spent, budget, make_programs, train_student
from proreflow_jax.reproduction.testbed import Testbed
from proreflow_jax.run import check_config
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import reopen
from proreflow_jax.run.ranges import check_seeds
from proreflow_jax.runtime import mesh
from proreflow_jax.storage import atomic, lock, paths

log = logging.getLogger(__name__)
BASE = "teacher"  # the base model's row
HOLDER = "holder.json"  # beside a cell's lock while it is made
TRAINING = (  # what a method's numbers depend on beside the base model; blocks, or single fields of them
    "stages", "student", "pairs", "loss", "optimizer", "train.batch", "train.ema", "reproduce.pair_share",
)  # fmt: skip
MEASURING = (
    "model.dtype", "model.teacher_dtype", "model.sampling_dtype", "data.kind", "data.resolution",
    "evaluate.examples", "evaluate.batch",
    "evaluate.columns", "evaluate.teacher_steps", "evaluate.study.examples", "evaluate.study.steps", "reproduce.steps",
    "lab",  # where there is one
)  # fmt: skip


class Cell(NamedTuple):
    """A method at a seed and a budget. The base model is a method without stages.

    key: a hash of everything its numbers depend on but the code: who changes that removes the folder of cells. "" until the
      base model is open.
    """

    group: str
    method: str
    seed: int
    forwards: int  # the budget; of the base model 0
    experiment: Experiment
    key: str = ""

    @property
    def name(self) -> str:
        """What tells it from others of the grid."""
        return "-".join([self.method, *([f"{self.forwards:.3g}".replace("+", "")] if self.forwards else []), str(self.seed)])

    def path(self, suffix: str) -> Path:
        """Where its result lies."""
        return _folder(self.experiment) / f"{self.name}-{self.key}{suffix}"


def check_grid(experiment: Experiment, testbed: Testbed, workers: int) -> None:
    """Raises ValueError, one line, for a grid that cannot be carried out, whatever its methods are."""
    r = experiment.config.reproduce
    testbed.check(experiment)
    figures.check_matplotlib()
    if experiment.stages[0].online or experiment.layout.scale:
        raise UserError("reproduce keeps pairs in memory and trains all weights: pairs.mode=stored, student.lora.rank=0")
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    check_seeds(r.seeds, "--config.reproduce.seeds")
    if len(r.seeds) < 2:
        raise UserError(f"--config.reproduce.seeds={r.seeds} must be at least two different numbers: a spread needs them")
    if r.chunk > 1 and mesh.ways(experiment.mesh) > 1:
        raise UserError(f"--config.reproduce.chunk={r.chunk} must be 1 on several devices")
    for count in r.steps:
        windows.check_windows(count)
    names = [name for _, name, _ in r.methods]
    fields = {"references": r.references, "effects": [name for row in r.effects for name in row[1:]], "baseline": [r.baseline]}
    fields |= {"figures": [name for _, row in r.figures for name in row]}
    for field, methods in fields.items():
        if unknown := [name for name in methods if name not in (*names, BASE)]:
            raise UserError(f"--config.reproduce.{field}: {unknown[0]!r} is none of its methods, {', '.join(names)}")


def make_cells(experiment: Experiment) -> list[Cell]:
    """All cells, cheap budgets first. Raises UserError for a method that cannot be carried out."""
    return keyed(plan_cells(experiment), experiment)


def keyed(cells: list[Cell], experiment: Experiment) -> list[Cell]:
    """The same with their keys: opens the base model."""
    base = experiment.denoiser.digest()
    return [cell._replace(key=_key(cell.experiment.config, cell.forwards, base)) for cell in cells]


def plan_cells(experiment: Experiment) -> list[Cell]:
    """`make_cells` but for the keys."""
    config, warned, opened = experiment.config, set(), {}
    for seed in config.reproduce.seeds:
        for _, name, fields in config.reproduce.methods:
            opened[name, seed] = reopen(experiment, changed(config, {**fields, "seed": seed}))
            line = check_config.few_starts(opened[name, seed].config)
            if line and name not in warned:
                log.warning("%s: %s", name, line)
                warned.add(name)
    cells = []
    for seed in config.reproduce.seeds:
        alone = reopen(experiment, changed(config, {"seed": seed}))
        cells.append(Cell("base model", BASE, seed, 0, alone))
    for forwards in sorted({b for one in opened.values() for b in one.config.reproduce.budgets}):
        for seed in config.reproduce.seeds:
            for group, name, _ in config.reproduce.methods:
                own = opened[name, seed]
                if forwards in own.config.reproduce.budgets:
                    for stage in own.stages:
                        budget(own, stage, forwards)
                    cells.append(Cell(group, paths.check_name(name), seed, forwards, own))
    return cells


def _key(config: ConfigDict, forwards: int, base: str) -> str:
    fields = [field for field in (*TRAINING, *MEASURING) if check_config.has_field(config, field)]
    facts = {field: check_config.field_value(config, field) for field in fields if forwards or field not in TRAINING}
    text = json.dumps([facts, config.seed, forwards, base], sort_keys=True, default=lambda block: block.to_dict())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _folder(experiment: Experiment) -> Path:
    return experiment.run / "cells"


def work(experiment: Experiment, testbed: Testbed, cells: list[Cell], show: Callable[[], None]) -> None:
    """Makes cells that no other process holds.

    show: called when a cell begins, where those before are done, and at the end; it may not fail.
    """
    if not jax.config.jax_compilation_cache_dir:  # programs are compiled once for all workers, and for the next start
        jax.config.update("jax_compilation_cache_dir", str(experiment.run / "compiled"))
    programs, instruments = make_programs(experiment), testbed.instruments(experiment)
    measured_by: dict[int, Any] = {}
    store: dict[Any, Any] = {}
    last = None
    for number, cell in enumerate(cells, 1):
        try:
            with lock.lock_folder(_locks(cell)):
                if cell.path(".json").is_file():
                    continue
                with _under_way(cell):
                    show()
                    if cell.seed not in measured_by:
                        measured_by[cell.seed] = testbed.inputs(cell.experiment, cell.seed, instruments)
                    if last != (last := (cell.seed, cell.forwards)):
                        store.clear()
                    trained = _train(cell, testbed, programs, store)
                    _measure(cell, testbed, trained, instruments, measured_by[cell.seed])
                log.info("%s: done (%d of %d)", cell.name, number, len(cells))
        except lock.Locked:
            continue
    show()


def _locks(cell: Cell) -> Path:
    return _folder(cell.experiment) / ".locks" / cell.name


@contextmanager
def _under_way(cell: Cell) -> Iterator[None]:
    """Names the process that makes a cell, for those who look on; nothing depends on it."""
    mark = _locks(cell) / HOLDER
    with suppress(OSError, RunFailed):
        atomic.write_json(mark, lock.holder_record())
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def holder(cell: Cell) -> str | None:
    """The machine whose process makes a cell, "" for this one; None: none does. A dead process of another is not told apart."""
    try:
        record = atomic.read_json(_locks(cell) / HOLDER)
    except (OSError, UserError):
        return None
    runs = lock.runs_here(record)
    return None if runs is False else "" if runs else str(record.get("host", "another machine"))


class Trained(NamedTuple):
    """A student of a cell, or the base model."""

    params: Params
    flow: Parameterization
    spent: list[Spent]
    seconds: float
    cpu_seconds: float  # of all threads


def _train(cell: Cell, testbed: Testbed, programs: Programs, store: dict[Any, Any]) -> Trained:
    experiment = cell.experiment
    if not cell.forwards:
        return Trained(experiment.denoiser.params(), experiment.flow, [], 0.0, 0.0)
    began, cpu = time.monotonic(), time.process_time()
    params, spent = jax.block_until_ready(train_student(experiment, programs, testbed.rows, cell.forwards, store))
    flow = experiment.stages[-1].student
    return Trained(params, flow, spent, time.monotonic() - began, time.process_time() - cpu)


def _measure(cell: Cell, testbed: Testbed, trained: Trained, instruments: Any, inputs: Any) -> None:
    """Measures one cell, and writes its JSON last."""
    began = time.monotonic()
    numbers, images = testbed.measure(cell.experiment, trained.params, trained.flow, instruments, inputs)
    config, spent = cell.experiment.config, trained.spent
    about = {
        "group": cell.group, "method": cell.method, "seed": cell.seed, "budget": cell.forwards,
        "stages": [cost._asdict() for cost in spent],
        **{total: sum(getattr(cost, total) for cost in spent) for total in ("forwards", "updates", "examples")},
        "seconds": {"training": trained.seconds, "cpu": trained.cpu_seconds, "measuring": time.monotonic() - began},
        "alpha": config.loss.alpha, "balance": config.loss.balance,
    }  # fmt: skip
    if images:  # of each number of steps below one another
        strip = np.concatenate([np.concatenate(list(row), axis=1) for row in images.values()])
        with atomic.drafted(cell.path(".png")) as draft:
            Image.fromarray(strip).save(draft, "PNG")
        about["strip"] = cell.path(".png").name
    atomic.write_json(cell.path(".json"), about | numbers)


def spawn(workers: int) -> None:
    """This command in several processes, each on its share of the cores, until all have ended."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, "-m", "proreflow_jax.reproduce", *sys.argv[1:], "--workers=1"]  # the last flag counts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # workers must not outlive this process
    started = []
    for i in range(workers):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if len(cores) >= workers:
            os.sched_setaffinity(process.pid, cores[i::workers])
        started.append(process)
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        raise
    if any(codes) and set(codes) <= {0, STOPPED, -signal.SIGTERM}:
        sys.exit(STOPPED)
    if any(codes):
        raise RunFailed(f"a worker ended with code {codes}: its last line says why; run the same command again to go on")
