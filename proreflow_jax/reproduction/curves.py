"""Figures of a grid: quality over cost, and over alpha."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from proreflow_jax.evaluation import figures
from proreflow_jax.reproduction.claims import AT, Cells, values


def draw_curves(
    path: Path, budgets: Mapping[int, Cells], methods: Sequence[str], measures: Mapping[str, str], teacher: str
) -> None:
    """Each measure in a column, 2 and 4 steps in rows: the mean over seeds over the budget, the teacher's as a dashed line."""
    charts = []
    for steps in AT:
        row = []
        for measure, title in measures.items():
            series = [line for method in methods if (line := _line(budgets, method, measure, steps))]
            first = next(iter(budgets.values()))[teacher]
            levels = {f"teacher, {n}": float(np.mean(values(first, measure, n))) for n in (steps, 2 * steps)}
            levels |= {f"teacher, {max(map(int, first[0]['steps']))}": values_at_most(first, measure)}
            levels = {name: level for name, level in levels.items() if level > 0}
            row.append(figures.Chart(f"{title}, {steps} steps", series, levels))
        charts.append(row)
    seeds = len(next(iter(next(iter(budgets.values())).values())))
    figures.curves(path, charts, "forwards of the network in training, pairs included", f"{seeds} seeds; bars: one spread")


def values_at_most(cells: Sequence[Mapping], measure: str) -> float:
    """The mean at the most steps."""
    return float(np.mean(values(cells, measure, max(map(int, cells[0]["steps"])))))


def _line(budgets: Mapping[int, Cells], method: str, measure: str, steps: int) -> figures.Line | None:
    at = {budget: values(cells[method], measure, steps) for budget, cells in budgets.items() if method in cells}
    spread = [float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0 for numbers in at.values()]
    return figures.Line(method, list(at), [float(np.mean(numbers)) for numbers in at.values()], spread) if at else None


def draw_alphas(run: Path, cells: Cells, measures: Mapping[str, str]) -> None:
    """distance-alpha.png and frechet-alpha.png: ProReflow-II over alpha, the automatic one last; none without such rows."""
    fixed = {
        group[0]["alpha"]: group
        for method, group in cells.items()
        if method.startswith("ProReflow-II") and group[0]["group"] in ("alpha", "ProReflow") and group[0]["balance"] == "fixed"
    }
    automatic = [group for group in cells.values() if group[0]["group"] == "alpha" and group[0]["balance"] == "auto"]
    if len(fixed) < 2 or not automatic:
        return
    swept = [fixed[alpha] for alpha in sorted(fixed)] + automatic
    ticks = dict(enumerate([f"{alpha:g}" for alpha in sorted(fixed)] + ["auto"]))
    for name, measure in (("distance", "distance"), ("frechet", "frechet_teacher")):
        series = [
            figures.Line(
                f"{s} steps",
                list(ticks),
                [float(np.mean(values(group, measure, s))) for group in swept],
                [float(np.std(values(group, measure, s), ddof=1)) if len(group) > 1 else 0.0 for group in swept],
            )
            for s in AT
            if str(s) in swept[0][0]["steps"]
        ]
        title = f"ProReflow-II over alpha, {len(swept[0])} seeds"
        figures.lines(run / f"{name}-alpha.png", series, "alpha", measures[measure], title, x_ticks=ticks)
