"""Heat maps over pairs of values, and lines with error bars: PNG files by matplotlib, which the extra `demo` installs.

Colours are safe for colour-blind readers: Okabe and Ito's palette with markers for series, viridis for amounts, red-blue for
signed amounts. Figures are made without pyplot, so no window system and no global state is involved.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from proreflow_jax import UserError
from proreflow_jax.storage import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
STROKES = ("-", ":", "-.")  # one round of the colours each; levels are dashed
MAPS = {"sequential": "viridis", "diverging": "RdBu_r"}
WIDTH, HEIGHT, DPI = 9.0, 5.2, 100  # inches, and pixels of an inch


class Panel(NamedTuple):
    """One heat map: values[i, j] lies at y = axis[i], x = axis[j].

    limits: values at the ends of the colour bar; None: the least and the greatest value. A diverging map is white halfway.
    """

    title: str
    values: Float[np.ndarray, "m m"]
    colours: str = "sequential"  # of MAPS
    limits: tuple[float, float] | None = None


class Line(NamedTuple):
    """One series: y over x, with +- spread (None: no error bars)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


class Chart(NamedTuple):
    """Series in one chart, and horizontal lines by name."""

    title: str
    series: Sequence[Line]
    levels: Mapping[str, float]


def check_matplotlib() -> None:
    """Raises UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install matplotlib (the extra `demo`)")


def heat_maps(path: Path, panels: Sequence[Panel], axis: Sequence[float], label: str, title: str = "") -> "Figure":
    """Writes square maps side by side, each over (axis, axis) and with a colour bar; returns the figure.

    axis: m evenly spaced values, rising or falling; the first is at the left and at the bottom.
    Raises UserError if a panel is not (m, m) or not finite.
    """
    m = len(axis)
    for panel in panels:
        if np.shape(panel.values) != (m, m):
            raise UserError(f"panel {panel.title!r} has shape {np.shape(panel.values)}, must be ({m}, {m}), as its axis")
        _check_finite(panel.values, f"panel {panel.title!r}")
    half = (axis[-1] - axis[0]) / (2 * max(m - 1, 1)) or 0.5
    ends = (axis[0] - half, axis[-1] + half)
    figure = _figure(WIDTH / len(panels))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        low, high = panel.limits or (None, None)
        image = axes.imshow(panel.values, MAPS[panel.colours], vmin=low, vmax=high, origin="lower", extent=(*ends, *ends))
        axes.set(title=panel.title, xlabel=label, ylabel=label)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return _save(figure, path, title)


def lines(
    path: Path,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str = "",
    x_ticks: Mapping[float, str] | Mapping[int, str] | None = None,
) -> "Figure":
    """Writes one chart of all series with error bars and a legend beside it; returns the figure.

    The y axis begins at 0 unless a y is negative.

    x_ticks: labels of values of x (windows, say); None: round numbers.
    Raises UserError for a y that is not finite.
    """
    for line in series:
        _check_finite(line.y, f"the chart {title!r}")
    figure = _figure(HEIGHT)
    axes = figure.subplots()
    for i, line in enumerate(series):
        axes.errorbar(line.x, line.y, line.spread, label=line.name, capsize=4, **_style(i))
    if all(min(line.y) >= 0 for line in series):
        axes.set_ylim(bottom=0)
    if x_ticks:
        axes.set_xticks(list(x_ticks), list(x_ticks.values()))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.4)
    figure.legend(loc="outside right center")
    return _save(figure, path, title)


def _style(i: int) -> dict[str, str]:
    """Of series number i: no two of the first 21 look alike."""
    stroke = STROKES[i // len(COLOURS) % len(STROKES)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": stroke}


def curves(path: Path, charts: Sequence[Sequence[Chart]], x_label: str, title: str = "") -> "Figure":
    """Writes a grid of charts with logarithmic axes, error bars and one legend for all; returns the figure.

    Charts are rows of equal length, a series has one style in all. Raises UserError for a y that is not finite.
    """
    for line in (line for row in charts for chart in row for line in chart.series):
        _check_finite(line.y, f"the chart {title!r}")
    names = list(dict.fromkeys(line.name for row in charts for chart in row for line in chart.series))
    styles = {name: _style(i) for i, name in enumerate(names)}
    columns = max(map(len, charts))
    figure = _figure(HEIGHT * len(charts) * 0.75, WIDTH * columns / 2)
    handles = {}
    for row, axes_row in zip(charts, figure.subplots(len(charts), columns, squeeze=False), strict=True):
        for chart, axes in zip(row, axes_row, strict=True):
            for line in chart.series:
                handles[line.name] = axes.errorbar(line.x, line.y, line.spread, capsize=3, markersize=4, **styles[line.name])
            axes.set_xscale("log")
            axes.set_yscale("log")
            for name, level in chart.levels.items():
                axes.axhline(level, color="0.4", linestyle="--", linewidth=1)
                axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
            axes.set_title(chart.title, fontsize=10)
            axes.grid(alpha=0.3, which="both")
    figure.supxlabel(x_label, fontsize=10)
    figure.legend(list(handles.values()), list(handles), loc="outside right center")
    return _save(figure, path, title)


def _check_finite(values: Sequence[float] | np.ndarray, name: str) -> None:
    if not np.all(np.isfinite(values)):
        raise UserError(f"{name} can only show finite numbers")


def _figure(height: float, width: float = WIDTH) -> "Figure":
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: "Figure", path: Path, title: str) -> "Figure":
    if title:
        figure.suptitle(title)
    with atomic.drafted(path) as draft:
        figure.savefig(draft, format="png")
    return figure
