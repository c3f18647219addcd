"""What a verb has to do, how far it is, how long the rest takes: its first line, its progress, progress.json.

Times come from this run's own rates: seconds a forward of the network on one image, of pairs, of training, of exports. A later
stage's pairs take other steps than the first's, so they cost another number of forwards. A rate is known after the first items,
whose compilation it leaves out; rates of an earlier start on equal devices serve until then.

progress.json, in the run's folder, replaced as a whole at every shard, checkpoint and export, is for programs that look on:
  phase     "pairs", "train" or "export"; "done" at the end
  stage     windows of the stage under way
  done, total, unit   of that part: pairs, steps or exports
  parts     every part of the verb's work: [{phase, stage, done, total, unit, cost}]; cost: forwards of the network an item
  rates     seconds a forward, by phase, as far as they are known; `items` the same as items a second of the part under way
  opening   seconds to the first item, by phase, compilation included
  seconds_left        of all parts; null while a rate is missing
  devices   how many of which kind; time   of writing, in seconds since 1970
Beside it lie what it counts: stage-N/metrics.jsonl, stage-N/samples/step-*.png, samples/samples.json. Whoever shows all that to
people is called whenever it has changed.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import record_plan, records
from proreflow_jax.models.network import Network
from proreflow_jax.run.stages import DONE, Stage, stage_folder
from proreflow_jax.runtime.processes import leads
from proreflow_jax.runtime.progress import Progress, duration
from proreflow_jax.storage import atomic, paths
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
FILE = "progress.json"
PAIRS, TRAIN, EXPORT = PHASES = ("pairs", "train", "export")
UNITS = {PAIRS: "pair", TRAIN: "step", EXPORT: "export"}
TITLES = {PAIRS: "pairs", TRAIN: "training", EXPORT: "export"}
EXPORT_SECONDS = 10.0  # of an export until one was timed: a guess
STEADY = 3  # items behind the first from which a rate is believed
BACKWARD = 3.0  # forwards that an update of one example counts: one forward, and a backward pass of two


@dataclass
class Part:
    """One phase of one stage."""

    phase: str
    stage: int
    total: int
    done: int = 0
    cost: float = 1.0  # forwards of the network an item


class Outlook:
    """The work of a verb on a run, in order.

    Args:
      config: need not be checked yet; `begin` reads it.
      phases, stages: those that the verb does; None: all stages of the config.
      show: called on process 0 whenever the run's files have changed; it may not fail.
    """

    def __init__(
        self,
        config: ConfigDict,
        phases: Sequence[str] = PHASES,
        stages: Sequence[int] | None = None,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._phases, self._stages, self._show = config, phases, stages, show
        self.parts: list[Part] = []
        self.run: Location | None = None
        self._rates: dict[str, float] = {}
        self._opening: dict[str, float] = {}
        self._now: tuple[Part, Progress | None] | None = None
        self._told = False

    def begin(self) -> None:
        """Says what will be done, and what is done already. Compiles nothing; process 0 alone looks."""
        config = self._config
        self.run = paths.parse_path(config.root) / config.name
        self.parts = plan_parts(config, self.run, self._phases, self._stages)
        if self.parts:
            self._remember()
            log.info("%s", self.first_line())

    def weigh(self, stages: Sequence[Stage]) -> None:
        """Takes the costs of an item from the opened stages."""
        for stage in stages:
            crossing = crossing_cost(stage)
            costs = {
                PAIRS: crossing,
                TRAIN: self._config.train.batch * (BACKWARD + (crossing if stage.online else 0.0)),
                EXPORT: 1.0,
            }
            for part in self.parts:
                if part.stage == stage.windows:
                    part.cost = costs[part.phase]
        if (left := self.seconds_left()) and self._rates:
            log.info("by the rates of the last start about %s are left, and compiling", duration(left))

    def first_line(self) -> str:
        """`runs/x: 3 stages of 8, 4, 2 windows, each 2048 pairs and 500 steps, 3 exports; done already: ...`."""
        counts = list(dict.fromkeys(part.stage for part in self.parts if part.phase != EXPORT))
        each = [f"{self._of(phase)[0].total} {UNITS[phase]}s" for phase in (PAIRS, TRAIN) if self._of(phase)]
        exports = self._of(EXPORT)
        todo = [
            f"{len(counts)} stage{'s' if len(counts) > 1 else ''} of {', '.join(map(str, counts))} windows" if counts else ""
        ]
        todo += [f"{'each ' if len(counts) > 1 else ''}{' and '.join(each)}" if each else ""]
        todo += [f"{len(exports)} export{'s' if len(exports) > 1 else ''}" if exports else ""]
        done = [_said(part) for part in self.parts if part.done]
        already = f"; done already: {', '.join(done)}" if done else ""
        return f"{self.run}: {', '.join(text for text in todo if text)}{already}"

    def _of(self, phase: str) -> list[Part]:
        return [part for part in self.parts if part.phase == phase]

    @contextmanager
    def part(self, phase: str, stage: int, done: int | None = None) -> Iterator[Progress]:
        """Around one part: counts its items. done: items that are there already, if that is known better than at the start."""
        part = self._find(phase, stage)
        part.done = part.done if done is None else done
        title = f"stage {stage}, {TITLES[phase]}"
        moved = lambda progress: self._moved(part, progress)
        with Progress(title, part.total, UNITS[phase], part.done, more=self._more, moved=moved) as progress:
            self._now = (part, progress)
            self.keep()
            yield progress
        self.keep()

    @contextmanager
    def export(self, stage: int) -> Iterator[None]:
        """Around one export."""
        part, began = self._find(EXPORT, stage), time.monotonic()
        there = part.done == part.total
        yield
        part.done = part.total
        if not there:
            self._now, self._rates[EXPORT] = (part, None), time.monotonic() - began
            self.keep()

    def finished(self, phase: str, stage: int) -> None:
        """A part that was there already."""
        part = self._find(phase, stage)
        part.done = part.total

    def _find(self, phase: str, stage: int) -> Part:
        return next(part for part in self.parts if (part.phase, part.stage) == (phase, stage))

    def _moved(self, part: Part, progress: Progress) -> None:
        part.done = progress.done
        if progress.opening is not None:
            self._opening.setdefault(part.phase, progress.opening)
        if progress.counted() >= STEADY and (each := progress.seconds_each()):
            self._rates[part.phase] = each / part.cost
            if not self._told and (left := self.seconds_left()) is not None and left > 0:
                self._told = True
                log.info("%s: about %s left in all%s", self.run, duration(left), self._shares())

    def _shares(self) -> str:
        sums = {phase: sum(map(self._left_of, self._of(phase))) for phase in PHASES if self._of(phase)}
        return (
            " (" + ", ".join(f"{TITLES[phase]} {duration(total)}" for phase, total in sums.items()) + ")"
            if len(sums) > 1
            else ""
        )

    def _left_of(self, part: Part) -> float:
        return (part.total - part.done) * part.cost * self._rates.get(part.phase, EXPORT_SECONDS)

    def seconds_left(self) -> float | None:
        """Of all parts; None while the rate of one that is not done is missing."""
        todo = [part for part in self.parts if part.done < part.total]
        if any(part.phase != EXPORT and part.phase not in self._rates for part in todo):
            return None
        return sum(map(self._left_of, todo))

    def _more(self) -> str:
        left = self.seconds_left()
        return f"; {duration(left)} left in all" if left is not None and len(self.parts) > 1 else ""

    def keep(self) -> None:
        """Writes progress.json, unless this start has counted nothing, and shows the run; on process 0."""
        if not leads():
            return
        if self._now is not None:
            self._write(*self._now)
        self._show()

    def _write(self, part: Part, progress: Progress | None) -> None:
        over = all(part.done >= part.total for part in self.parts)
        each = progress and progress.seconds_each()
        atomic.write_json(
            self.run / FILE,
            {
                "phase": "done" if over else part.phase,
                "stage": part.stage,
                "done": part.done,
                "total": part.total,
                "unit": f"{UNITS[part.phase]}s",
                "parts": [_plain(part) for part in self.parts],
                "rates": {**self._rates, "items": 1 / each if each else None},
                "opening": self._opening,
                "seconds_left": self.seconds_left(),
                "devices": devices(),
                "time": time.time(),
            },
        )

    def _remember(self) -> None:
        """Takes the rates of an earlier start on equal devices."""
        if not leads():
            return
        try:
            record = atomic.read_json(self.run / FILE)
        except (MissingFile, UserError):
            return
        rates = record.get("rates")
        if record.get("devices") == devices() and isinstance(rates, dict):
            self._rates = {phase: rates[phase] for phase in PHASES if isinstance(rates.get(phase), float) and rates[phase] > 0}


def plan_parts(config: ConfigDict, run: Location, phases: Sequence[str], stages: Sequence[int] | None) -> list[Part]:
    """The parts of a config's work, with what the run's folder says is done of each, on process 0."""
    parts, look = [], leads()
    for count in config.stages if stages is None else [count for count in config.stages if count in stages]:
        folder = stage_folder(run, count)
        whole = look and (folder / DONE).is_file()
        if PAIRS in phases and config.pairs.mode != "online":
            total = config.pairs.examples
            parts.append(Part(PAIRS, count, total, total if whole else _pairs_there(folder / "pairs", total) if look else 0))
        if TRAIN in phases:
            total = config.train.steps
            parts.append(Part(TRAIN, count, total, total if whole else _newest_step(folder, total) if look else 0))
    if EXPORT in phases:
        for count in config.export.stages:
            there = look and (run / "export" / f"stage-{count}" / "reflow.json").is_file()
            parts.append(Part(EXPORT, count, 1, int(there)))
    return parts


def _pairs_there(folder: Location, total: int) -> int:
    """Records in shards that are marked done."""
    try:
        plan = record_plan.read_plan(folder)
        return total - sum(len(record_plan.shard_range(plan, shard)) for shard in records.missing_shards(folder, plan))
    except (MissingFile, UserError):
        return 0


def _newest_step(folder: Location, total: int) -> int:
    place = folder / "checkpoints"
    steps = [int(path.name) for path in place.iterdir() if path.name.isdecimal()] if place.is_dir() else []
    return min(max(steps, default=0), total)


def crossing_cost(stage: Stage) -> float:
    """Forwards of the network that one pair takes."""
    recipe = stage.pairs
    windows = recipe.windows if recipe.start == "noise" else 1
    return float(windows * recipe.steps * (1 if recipe.guidance == 1 else 2))


def devices() -> str:
    """`8 x TPU v5e`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def compiling(what: str, network: Network) -> None:
    """Says, before it begins, that a program of this network is compiled, and about how long that takes."""
    parameters = sum(int(np.prod(shape.shape)) for shape in network.shapes.values())
    usual = "less than a minute" if parameters < 10**8 else "some minutes, up to half an hour on a TPU"
    log.info("compiling %s: %s; seconds where it was compiled before", what, usual)


def _said(part: Part) -> str:
    whole = part.done >= part.total
    amount = f"{TITLES[part.phase]}" if whole else f"{part.done} of {part.total} {UNITS[part.phase]}s"
    return f"stage {part.stage}'s {amount}"


def _plain(part: Part) -> dict[str, Any]:
    counts = {"done": part.done, "total": part.total, "unit": f"{UNITS[part.phase]}s"}
    return {"phase": part.phase, "stage": part.stage, **counts, "cost": part.cost}
