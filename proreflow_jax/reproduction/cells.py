"""The grid's cells: one method at one seed each, made by one process or several, kept by what they depend on."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from proreflow_jax import STOPPED, RunFailed, UserError
from proreflow_jax.evaluation import figures
from proreflow_jax.flow import windows
from proreflow_jax.jobs import score_digits
from proreflow_jax.reproduction.cell import (
    CellInputs,
    Programs,
    budget,
    cell_inputs,
    make_programs,
    measure_student,
    train_student,
)
from proreflow_jax.run import check_config
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import reopen
from proreflow_jax.storage import atomic, lock, paths

log = logging.getLogger(__name__)
TRAINING = (  # what a method's numbers depend on beside the base model; blocks, or single fields of them
    "stages", "student", "pairs", "loss", "optimizer", "train.batch", "train.ema", "reproduce.forwards", "reproduce.pair_share",
)  # fmt: skip
MEASURING = (
    "model.dtype", "model.teacher_dtype", "model.sampling_dtype", "data.kind", "data.resolution",
    "evaluate.examples", "evaluate.batch",
    "evaluate.columns", "evaluate.teacher_steps", "evaluate.study.examples", "evaluate.study.steps", "reproduce.steps",
)  # fmt: skip


class Cell(NamedTuple):
    """A method at a seed. The base model is a method without stages.

    key: a hash of everything its numbers depend on but the code: who changes that removes the folder of cells.
    """

    group: str
    method: str
    seed: int
    experiment: Experiment
    key: str

    def path(self, suffix: str) -> Path:
        """Where its result lies."""
        return _folder(self.experiment) / f"{self.method}-{self.seed}-{self.key}{suffix}"


def check_grid(experiment: Experiment, workers: int) -> None:
    """Raises ValueError, one line, for a grid that cannot be carried out, whatever its methods are."""
    r = experiment.config.reproduce
    score_digits.check_digits(experiment)
    figures.check_matplotlib()
    if experiment.stages[0].online or experiment.layout.scale:
        raise UserError("reproduce keeps pairs in memory and trains all weights: pairs.mode=stored, student.lora.rank=0")
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    if len(set(r.seeds)) < 2:
        raise UserError(f"--config.reproduce.seeds={r.seeds} must be at least two different numbers: a spread needs them")
    for count in r.steps:
        windows.check_windows(count)
    names = [name for _, name, _ in r.methods]
    for field, methods in (("references", r.references), ("effects", [name for row in r.effects for name in row[1:]])):
        if unknown := [name for name in methods if name not in names]:
            raise UserError(f"--config.reproduce.{field}: {unknown[0]!r} is none of its methods, {', '.join(names)}")


def make_cells(experiment: Experiment) -> list[Cell]:
    """All cells, a whole table of one seed after the other. Raises ValueError for a method that cannot be carried out."""
    config, base = experiment.config, experiment.unet.digest()
    rows = [("base model", "teacher", {}), *config.reproduce.methods]
    cells = []
    for seed in config.reproduce.seeds:
        for group, name, fields in rows:
            opened = reopen(experiment, changed(config, {**fields, "seed": seed}))
            for stage in opened.stages if fields else ():
                budget(opened, stage)
            cells.append(Cell(group, paths.check_name(name), seed, opened, _key(opened.config, bool(fields), base)))
    return cells


def _key(config: ConfigDict, trains: bool, base: str) -> str:
    fields = (*TRAINING, *MEASURING) if trains else MEASURING
    facts = {field: check_config.field_value(config, field) for field in fields}
    text = json.dumps([facts, config.seed, base], sort_keys=True, default=lambda block: block.to_dict())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _folder(experiment: Experiment) -> Path:
    return experiment.run / "cells"


def _work(experiment: Experiment, cells: list[Cell]) -> None:
    """Makes cells that no other process holds."""
    if not jax.config.jax_compilation_cache_dir:  # programs are compiled once for all workers, and for the next start
        jax.config.update("jax_compilation_cache_dir", str(experiment.run / "compiled"))
    programs = make_programs(experiment)
    judge = score_digits.make_digits_judge(experiment.config.data.resolution)
    measured_by: dict[int, CellInputs] = {}
    store: dict[Any, Any] = {}
    for number, cell in enumerate(cells, 1):
        try:
            with lock.lock_folder(_folder(experiment) / ".locks" / f"{cell.method}-{cell.seed}"):
                if cell.path(".json").is_file():
                    continue
                if cell.seed not in measured_by:
                    store.clear()
                    measured_by = {cell.seed: cell_inputs(cell.experiment, cell.seed, programs, judge)}
                _make(cell, programs, measured_by[cell.seed], store)
                log.info("%s, seed %d: done (%d of %d)", cell.method, cell.seed, number, len(cells))
        except lock.Locked:
            continue


def _make(cell: Cell, programs: Programs, inputs: CellInputs, store: dict[Any, Any]) -> None:
    """Trains and measures one cell, and writes its JSON last."""
    began, experiment = time.monotonic(), cell.experiment
    params, flow, spent = experiment.unet.params(), experiment.flow, []
    if cell.group != "base model":
        params, spent = train_student(experiment, programs, store)
        flow = experiment.stages[-1].student
    trained = time.monotonic() - began
    numbers, images = measure_student(experiment, params, flow, programs, inputs)
    # images of each number of steps below one another
    strip = np.concatenate([np.concatenate(list(row), axis=1) for row in images.values()])
    with cell.path(".png").open("wb") as file:
        Image.fromarray(strip).save(file, "PNG")
    about = {
        "group": cell.group, "method": cell.method, "seed": cell.seed, "stages": [cost._asdict() for cost in spent],
        "forwards": sum(cost.forwards for cost in spent), "seconds": {"training": trained, "all": time.monotonic() - began},
        "strip": cell.path(".png").name, "alpha": experiment.config.loss.alpha, "balance": experiment.config.loss.balance,
    }  # fmt: skip
    atomic.write_json(cell.path(".json"), about | numbers)


def _spawn(workers: int) -> None:
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
