"""Figures of a grid: quality over cost, and over alpha."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proreflow_jax.evaluation import figures
from proreflow_jax.reproduction.claims import AT, Cells, values

ZERO = 1e-6  # of the largest level: below that it is rounding, of the teacher's distance to itself


def draw_curves(
    path: Path, budgets: Mapping[int, Cells], methods: Sequence[str], measures: Mapping[str, str], teacher: str
) -> None:
    """`curve_charts` as a picture: measures in columns, steps in rows; none if neither 2 nor 4 steps were measured."""
    charts = curve_charts(budgets, methods, measures, teacher)
    if charts:
        figures.curves(path, charts, "forwards of the network in training, pairs included", spread_said(budgets))


def spread_said(budgets: Mapping[int, Cells]) -> str:
    """What the bars are."""
    seeds = len(next(iter(next(iter(budgets.values())).values())))
    return f"{seeds} seeds; bars: one spread"


def curve_charts(
    budgets: Mapping[int, Cells], methods: Sequence[str], measures: Mapping[str, str], teacher: str
) -> list[list[figures.Chart]]:
    """At 2 and 4 steps, of each measure: the mean over seeds over the budget, and the teacher's levels."""
    first = next(iter(budgets.values()))[teacher]
    measured = set(map(int, first[0]["steps"]))
    charts = []
    for steps in [s for s in AT if s in measured]:
        row = []
        for measure, title in measures.items():
            series = [line for method in methods if (line := _line(budgets, method, measure, steps))]
            levels = {f"teacher, {n}": float(np.mean(values(first, measure, n))) for n in (steps, 2 * steps) if n in measured}
            levels |= {f"teacher, {max(map(int, first[0]['steps']))}": values_at_most(first, measure)}
            levels = {name: level for name, level in levels.items() if level > ZERO * max(levels.values())}
            row.append(figures.Chart(f"{title}, {steps} steps", series, levels))
        charts.append(row)
    return charts


def values_at_most(cells: Sequence[Mapping], measure: str) -> float:
    """The mean at the most steps."""
    return float(np.mean(values(cells, measure, max(map(int, cells[0]["steps"])))))


def _line(budgets: Mapping[int, Cells], method: str, measure: str, steps: int) -> figures.Line | None:
    at = {budget: values(cells[method], measure, steps) for budget, cells in budgets.items() if method in cells}
    spread = [float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0 for numbers in at.values()]
    return figures.Line(method, list(at), [float(np.mean(numbers)) for numbers in at.values()], spread) if at else None


class Alphas(NamedTuple):
    """ProReflow-II over alpha."""

    title: str
    ticks: dict[int, str]  # place -> alpha, the automatic one last
    series: dict[str, list[figures.Line]]  # file name -> a line for each number of steps


SHOWN = {"distance": "distance", "frechet": "frechet_teacher"}  # of a sweep over alpha: file name -> measure


def draw_alphas(run: Path, cells: Cells, measures: Mapping[str, str]) -> None:
    """distance-alpha.png and frechet-alpha.png: ProReflow-II over alpha, the automatic one last; none without such rows."""
    if alphas := alpha_series(cells):
        for name, series in alphas.series.items():
            path, label = run / f"{name}-alpha.png", measures[SHOWN[name]]
            figures.lines(path, series, "alpha", label, alphas.title, x_ticks=alphas.ticks)


def alpha_series(cells: Cells) -> Alphas | None:
    """Means and spreads over alpha; None without such rows."""
    fixed = {
        group[0]["alpha"]: group
        for method, group in cells.items()
        if method.startswith("ProReflow-II") and group[0]["group"] in ("alpha", "ProReflow") and group[0]["balance"] == "fixed"
    }
    automatic = [group for group in cells.values() if group[0]["group"] == "alpha" and group[0]["balance"] == "auto"]
    if len(fixed) < 2 or not automatic:
        return None
    swept = [fixed[alpha] for alpha in sorted(fixed)] + automatic
    ticks = dict(enumerate([f"{alpha:g}" for alpha in sorted(fixed)] + ["auto"]))
    lines = {
        name: [
            figures.Line(
                f"{s} steps",
                list(ticks),
                [float(np.mean(values(group, measure, s))) for group in swept],
                [float(np.std(values(group, measure, s), ddof=1)) if len(group) > 1 else 0.0 for group in swept],
            )
            for s in AT
            if str(s) in swept[0][0]["steps"]
        ]
        for name, measure in SHOWN.items()
    }
    return Alphas(f"ProReflow-II over alpha, {len(swept[0])} seeds", ticks, lines)
