"""A grid as the value that its page is made from: its cells' files as far as they are, and which cells are under way.

What is missing, half-written or damaged is left out: the page shows what there is.
"""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from PIL import UnidentifiedImageError

from proreflow_jax import UserError
from proreflow_jax.evaluation import figures
from proreflow_jax.evaluation.page import embed
from proreflow_jax.evaluation.page.facts import Box, Panel, Run, Series, Table
from proreflow_jax.evaluation.page.markup import large, span
from proreflow_jax.jobs import run_facts
from proreflow_jax.reproduction import claims, curves, report
from proreflow_jax.reproduction.cells import BASE, Cell, holder
from proreflow_jax.reproduction.claims import Cells
from proreflow_jax.reproduction.testbed import Testbed
from proreflow_jax.run import outlook
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

NEEDED = {  # of a cell
    "method", "group", "seed", "budget", "stages", "steps", "forwards", "examples", "updates", "seconds", "alpha", "balance"
}  # fmt: skip
MOST_TICKS = 6  # budgets named below a chart
DISK = ("cells", "compiled")  # folders that are counted apart
Result = Mapping[str, Any]  # a cell's file


class Grid(NamedTuple):
    """What a page is of."""

    experiment: Experiment
    testbed: Testbed
    cells: Sequence[Cell]  # without keys until the base model is open


def read_grid(folder: Location, fields: Mapping[str, Any], grid: Grid) -> Run:
    """All that the page shows. fields: of the config, by dotted names."""
    config, testbed = grid.experiment.config, grid.testbed
    results = {cell.name: result for cell in grid.cells if (result := _result(cell, grid))}
    budgets = report.by_budget(list(results.values()))
    sizes = run_facts.file_sizes(folder)
    return Run(
        **run_facts.heading(folder, fields),
        progress=_progress(grid.cells, results),
        tables=[*_tables(budgets, grid), *_samples(folder, config.reproduce.steps, sizes), *_accounts(budgets, grid)],
        disk=run_facts.disk(sizes, DISK),
        panels=_panels(budgets, testbed, config.reproduce.figures) if budgets else (),
        boxes=_boxes(grid, len(results)),
        counted=_counted(list(results.values())),
    )


def _result(cell: Cell, grid: Grid) -> Result:
    """A cell's file, if it has what the page shows; {}: it is not there or damaged."""
    try:
        record = atomic.read_json(cell.path(".json")) if cell.key else {}
        steps = [record["steps"][str(s)] for s in grid.experiment.config.reproduce.steps] if record else []
        measured = all(math.isfinite(scores[measure]) for scores in steps for measure in grid.testbed.measures)
    except (UserError, OSError, KeyError, TypeError):
        return {}
    return record if measured and set(record) >= NEEDED else {}


def _progress(cells: Sequence[Cell], results: Mapping[str, Result]) -> dict[str, Any]:
    """In the words of progress.json."""
    now = {cell.name: host for cell in cells if cell.name not in results and (host := holder(cell)) is not None}
    todo = [cell for cell in cells if cell.name not in results]
    parts = [_part(cells, results, forwards) for forwards in dict.fromkeys(cell.forwards for cell in cells)]
    record = {"phase": "grid", "stage": 0, "title": "grid", "done": len(results), "total": len(cells), "unit": "cells"}
    record |= {"parts": parts, "time": time.time(), "devices": outlook.devices(), "seconds_left_of_part": None}
    record |= {"under_way": [f"{name} on {host}" if host else name for name, host in now.items()]}
    record |= {"seconds_left": seconds_left(todo, list(results.values()), max(len(now), 1))}
    return record if todo else record | {"phase": "done"}


def _part(cells: Sequence[Cell], results: Mapping[str, Result], forwards: int) -> dict[str, Any]:
    of = [cell for cell in cells if cell.forwards == forwards]
    title = f"{large(forwards)} forwards" if forwards else "base model"
    return {"phase": "grid", "stage": 0, "title": title, "unit": "cells", "total": len(of)} | {
        "done": len([cell for cell in of if cell.name in results])
    }


def seconds_left(todo: Sequence[Cell], results: Sequence[Result], workers: int) -> float | None:
    """By the rate of the cells with the largest budget that is done; None while there is none."""
    largest = max((result["forwards"] for result in results), default=0)
    rates = [_seconds(result, "training") / largest for result in results if result["forwards"] == largest and largest]
    if not rates:
        return None if todo else 0.0
    measuring = median(_seconds(result, "measuring") for result in results)
    return sum(cell.forwards * median(rates) + measuring for cell in todo) / workers


def _seconds(result: Result, what: str) -> float:
    seconds = result["seconds"].get(what)  # of an older cell: not there
    return seconds if isinstance(seconds, float | int) else 0.0


def _counted(results: Sequence[Result]) -> list[tuple[str, str]]:
    total = lambda what: sum(_seconds(result, what) for result in results)
    if not results:
        return []
    forwards = f"{large(sum(result['forwards'] for result in results))} on one example, an update as three for each of its own"
    return [
        ("forwards of the network", forwards),
        ("training, of all cells", span(total("training"))),
        ("its CPU time", span(total("cpu"))),
        ("measuring, of all cells", span(total("measuring"))),
    ]


def _tables(budgets: Mapping[int, Cells], grid: Grid) -> list[Table]:
    """Those of table.md, measure by measure."""
    steps = grid.experiment.config.reproduce.steps
    rows = [
        table._replace(title=f"{title}, {table.title}" if table.title else title)
        for measure, title in grid.testbed.measures.items()
        for table in (report.measure_tables(budgets, measure, steps) if budgets else ())
    ]
    if rows:
        rows[0] = rows[0]._replace(notes=[*report.make_notes(grid.experiment.config, grid.testbed, 0, 0), "Less is better."])
    return rows


def _samples(folder: Location, steps: Sequence[int], sizes: run_facts.Sizes) -> list[Table]:
    """The pictures that the end of the command before has left."""
    out = []
    for s in steps:
        name = f"samples-{s}.png"
        try:
            picture = embed.whole(folder / name, sizes[name], wide=True) if name in sizes else ""
        except (UnidentifiedImageError, OSError):
            continue
        if picture:
            out.append(Table(f"Samples in {s} step{'s' if s > 1 else ''}", [], [], [], [], picture=picture))
    return out


def _accounts(budgets: Mapping[int, Cells], grid: Grid) -> list[Table]:
    """The gate, and what each row costs."""
    if not budgets:
        return []
    baseline = grid.experiment.config.reproduce.baseline
    gate = claims.make_gate(budgets, BASE, baseline, grid.testbed.real)
    return [report.gate_table(gate, budgets, grid.testbed, baseline), report.cost_table(budgets)]


def _panels(budgets: Mapping[int, Cells], testbed: Testbed, shown: Sequence[tuple[str, Sequence[str]]]) -> list[Panel]:
    """The figures of the grid: over budgets where there are several, and over alpha."""
    panels, note = [], curves.spread_said(budgets)
    for file, methods in shown if len(budgets) > 1 else ():
        before = f"{file.removesuffix('.png')}: " if len(shown) > 1 else ""
        charts = [chart for row in curves.curve_charts(budgets, methods, testbed.short, BASE) for chart in row]
        panels += [_over_budgets(chart._replace(title=f"{before}{chart.title}"), list(budgets), methods) for chart in charts]
    panels = [panel._replace(note=f"x: forwards of the network in training, pairs included; {note}") for panel in panels]
    if alphas := curves.alpha_series(budgets[max(budgets)]):
        rows = {name: [_series(line, i) for i, line in enumerate(lines)] for name, lines in alphas.series.items()}
        titles = {name: f"{alphas.title}: {testbed.short[curves.SHOWN[name]]}" for name in rows}
        panels += [Panel(titles[name], rows[name], alphas.ticks, "x: alpha; bars: one spread") for name in rows]
    panels = [panel._replace(series=[one for one in panel.series if one.points]) for panel in panels]
    return [panel for panel in panels if panel.series]


def _over_budgets(chart: figures.Chart, budgets: Sequence[int], methods: Sequence[str]) -> Panel:
    """The axis of budgets is logarithmic."""
    place = {budget: math.log(budget / budgets[0]) for budget in budgets}
    rows = [_series(line._replace(x=[place[x] for x in line.x]), methods.index(line.name)) for line in chart.series]
    rows += [Series(name, [(x, level) for x in (0.0, place[budgets[-1]])], -1) for name, level in chart.levels.items()]
    ticks = {place[budget]: large(budget) for budget in run_facts.chosen(list(budgets), MOST_TICKS)}
    return Panel(chart.title, rows, ticks)


def _series(line: figures.Line, colour: int) -> Series:
    """The points that a logarithmic axis can show."""
    rows = [row for row in zip(line.x, line.y, line.spread, strict=True) if row[1] > 0]
    return Series(line.name, [(x, y) for x, y, _ in rows], colour, [spread for *_, spread in rows])


def _boxes(grid: Grid, done: int) -> list[Box]:
    """Base model, cells, table."""
    config, experiment = grid.experiment.config, grid.experiment
    r, opened = config.reproduce, bool(grid.cells and grid.cells[0].key)
    model = str(config.model.path).rstrip("/").rpartition("/")[2] or "trained by the lab"
    whole = done == len(grid.cells)
    words = f"{len(r.methods)} methods, seeds {', '.join(map(str, r.seeds))}: each cell trains a student of its own"
    table = "written" if whole else "written at the end of the command"
    return [
        Box("base model", model, experiment.denoiser.digest() if opened else "", kind="done" if opened else "begun"),
        Box(f"{len(grid.cells)} cells", words, kind="done" if whole else "begun" if done else "waiting"),
        Box("table.md", table, kind="done" if whole else "waiting"),
    ]
