"""study.json as curves and tables of a run's page. What is missing or of another version is left out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from proreflow_jax.evaluation.page.facts import Panel, Series, Study, Table
from proreflow_jax.evaluation.page.markup import number

NUMBERS = "study.json"
PICTURE = "discrepancy.png"
WAY = {0.0: "noise", 0.5: "half way", 1.0: "data"}  # below a chart: how far a window's middle is
MOST_DIGITS = 6  # behind the point
FEW = 6  # columns of a table of many times
Numbers = Mapping[str, Any]  # {"mean": numbers, "spread": numbers}


def read_study(record: Mapping[str, Any], picture: str = "") -> Study | None:
    """The parts of the page; None if the record is none of ours.

    record: of study.json. picture: the map of velocities, as data:; "": none.
    """
    try:
        windows = sorted(map(int, record["velocity_error"]), reverse=True)
        panels = [panel for n in windows for panel in (_bends(record, n), _errors(record, n))]
        tables = [_bend_table(record), *(_error_table(record, n) for n in windows), _perturbation_table(record)]
        tables += [_discrepancy_table(record, picture)]
        return Study([*panels, _perturbation(record)], tables, [_settings(record["settings"])])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _settings(s: Mapping[str, Any]) -> str:
    return (
        f"{s['examples']} prompts of the run; mean ± {s['spread']} ({s['seeds']} seeds of the noise); paths of "
        f"{s['steps']} steps, perturbed samples of {s['perturbed_steps']} {s.get('step', 'DDIM')} steps; computed in "
        f"{s['dtype']}. Lines at the points are the spread, numbers beside the names are those of the last point. Windows go "
        "from noise to data."
    )


def _series(name: str, colour: int, at: Sequence[float], values: Numbers) -> Series:
    """The points that a logarithmic axis can show."""
    rows = [row for row in zip(at, values["mean"], values["spread"], strict=True) if row[1] > 0]
    return Series(name, [(x, y) for x, y, _ in rows], colour, [spread for *_, spread in rows])


def _middles(n: int) -> list[float]:
    return [(k + 0.5) / n for k in range(n)]


def _panel(title: str, series: Sequence[Series], ticks: Mapping[float, str], note: str = "") -> Panel:
    return Panel(title, [one for one in series if one.points], ticks, note)


def _bends(record: Mapping[str, Any], n: int) -> Panel:
    rows = sorted(((name, row) for name, row in record["straightness"].items() if name.endswith(f", {n} windows")), key=_order)
    series = [_series(name.partition(",")[0], i, _middles(n), row) for i, (name, row) in enumerate(rows)]
    return _panel(f"relative bend of the path, {n} windows", series, WAY, "of each window; 0: straight")


def _order(row: tuple[str, Numbers]) -> tuple[bool, str]:
    """The base model goes first."""
    return not row[0].startswith("base"), row[0]


def _errors(record: Mapping[str, Any], n: int) -> Panel:
    rows = record["velocity_error"][str(n)]
    series = [_series(name, i, _middles(n), rows[name]["relative"]) for i, name in enumerate(sorted(rows))]
    note = "relative, to the base model's chord; starts: exactly where windows begin, uniform: at times all over them"
    return _panel(f"velocity error, {n} windows", series, WAY, note)


def _perturbation(record: Mapping[str, Any]) -> Panel:
    study = record["perturbation"]
    sizes = study["sizes"]
    shown = [size for size in sizes if size >= max(sizes) / 5]
    ticks = {0.0: "0 %"} | {size: _percent(size) for size in shown}
    series = [_series(_kind(name), i, sizes, study[name]["rms"]) for i, name in enumerate(_kinds(study))]
    note = "x: relative error of each step's velocity; y: distance to the sample without errors, RMS"
    return _panel("direction against magnitude", series, ticks, note)


def _kinds(study: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in study if name != "sizes")


def _kind(name: str) -> str:
    return name.replace("_", ", ")


def _percent(size: float) -> str:
    return f"{number(100 * size)} %"


def said(mean: float, spread: float) -> str:
    """Three digits of the mean, more if the spread has its first digit behind them: "0.0681 ± 0.0009"."""
    if not spread:
        return number(mean)
    places = [2 - math.floor(math.log10(abs(mean))) if mean else 0, -math.floor(math.log10(spread))]
    digits = min(max(0, *places), MOST_DIGITS)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _cells(name: str, values: Numbers, columns: int) -> list[str]:
    cells = [said(*pair) for pair in zip(values["mean"], values["spread"], strict=True)]
    return [name, *cells, *[""] * (columns - len(cells))]


def _plain(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], picture: str = "") -> Table:
    """A table without marks."""
    return Table(title, heads, [""] * len(heads), cells, [], picture=picture)


def _window_heads(n: int) -> list[str]:
    return ["window", *(str(k + 1) for k in range(n))]


def _bend_table(record: Mapping[str, Any]) -> Table:
    rows = record["straightness"]
    most = max(len(row["mean"]) for row in rows.values())
    order = sorted(rows, key=lambda name: (len(rows[name]["mean"]), name), reverse=True)
    return _plain("Relative bend of the paths", _window_heads(most), [_cells(name, rows[name], most) for name in order])


def _error_table(record: Mapping[str, Any], n: int) -> Table:
    rows = record["velocity_error"][str(n)]
    cells = [
        _cells(f"{title}: {name}", rows[name][key], n)
        for title, key in (("error", "relative"), ("cosine", "cosine"))
        for name in sorted(rows)
    ]
    return _plain(f"Velocity against the base model's chords, {n} windows", _window_heads(n), cells)


def _perturbation_table(record: Mapping[str, Any]) -> Table:
    study = record["perturbation"]
    heads = ["each step's error", *map(_percent, study["sizes"])]
    cells = [
        _cells(f"{_kind(name)}: {key}", study[name][key], len(study["sizes"]))
        for name in _kinds(study)
        for key in ("rms", "median")
    ]
    return _plain("Distance to the sample without errors, by the relative error of each step", heads, cells)


def _discrepancy_table(record: Mapping[str, Any], picture: str) -> Table:
    """The map's first row at a few times; the picture has all of it."""
    study = record["discrepancy"]
    count = len(study["times"])
    shown = sorted({round(i * (count - 1) / (FEW - 1)) for i in range(FEW)})
    first = lambda key: {part: [study[key][part][0][i] for i in shown] for part in ("mean", "spread")}
    cells = [_cells(title, first(key), len(shown)) for title, key in (("L2 distance, RMS", "distance"), ("cosine", "cosine"))]
    heads = ["t", *(f"{study['times'][i]:.2f}" for i in shown)]
    return _plain("Velocities of the base model at time t against that at t = 1", heads, cells, picture)
