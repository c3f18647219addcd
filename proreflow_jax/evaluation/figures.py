"""Pictures of numbers, by Pillow alone: heat maps over pairs of values, and lines with error bars, as PNG.

A figure is drawn FINE times as large and averaged down, which smooths its lines. The built-in font knows Latin letters,
digits and ASCII signs; labels must keep to those. Colours are told apart by people who are colour-blind: series by Okabe and
Ito's palette and by their markers, amounts by viridis, signed amounts by blue-white-red.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from proreflow_jax import UserError

FINE = 3
INK, FAINT, PAPER = (30, 30, 30), (218, 218, 218), (255, 255, 255)
SERIES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0))
MARKERS = ("disc", "square", "up", "diamond", "down")
MAPS = {
    "sequential": ("440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6dcd59", "b4de2c", "fde725"),
    "diverging": ("2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b"),
}
TITLE, LABEL, TICK = 19, 16, 14  # heights of the letters, in pixels of the finished picture


class Panel(NamedTuple):
    """One heat map: values[i, j] is drawn at y[i], x[j] of the same falling or rising axis values.

    limits: values of the colour bar's ends; None takes those of the values. A diverging map is white in their middle.
    """

    title: str
    values: Float[np.ndarray, "m m"]
    colours: str = "sequential"
    limits: tuple[float, float] | None = None


class Line(NamedTuple):
    """One series: y over x, with +- spread (None: no error bars)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


class Axes(NamedTuple):
    """A rectangle of the picture (left, top, right, bottom, in its pixels) and the values at its sides."""

    box: tuple[int, int, int, int]
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        left, top, right, bottom = self.box
        f = math.log10 if self.log else float
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (f(y) - f(self.y[0])) / (f(self.y[1]) - f(self.y[0]))
        return left + across * (right - left), bottom - up * (bottom - top)


class Canvas:
    """A picture that is drawn FINE times as large as the numbers say."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * FINE, height * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int, anchor: str = "mm", up: bool = False) -> None:
        """Words at a point; `up` writes them from bottom to top, centred."""
        font = ImageFont.load_default(size * FINE)
        if not up:
            self.draw.text((x * FINE, y * FINE), text, INK, font, anchor)
            return
        width, height = math.ceil(font.getlength(text)) + 2 * FINE, 3 * size * FINE // 2
        turned = Image.new("RGB", (width, height), PAPER)
        ImageDraw.Draw(turned).text((width / 2, height / 2), text, INK, font, "mm")
        turned = turned.rotate(90, expand=True)
        self.image.paste(turned, (round(x * FINE - height / 2), round(y * FINE - width / 2)))

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float = 1) -> None:
        """A line through the points."""
        fine = [(x * FINE, y * FINE) for x, y in points]
        self.draw.line(fine, colour, max(round(width * FINE), 1), joint="curve")

    def frame(self, box: tuple[int, int, int, int]) -> None:
        """The sides of a rectangle."""
        left, top, right, bottom = box
        self.line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], INK)

    def marker(self, kind: str, x: float, y: float, colour: tuple[int, int, int], r: float = 4.5) -> None:
        """A filled mark of radius r."""
        x, y, r = x * FINE, y * FINE, r * FINE
        if kind == "disc":
            self.draw.ellipse((x - r, y - r, x + r, y + r), colour)
            return
        shapes = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "up": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
            "down": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
            "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        }
        self.draw.polygon([(x + a * r, y + b * r) for a, b in shapes[kind]], colour)

    def save(self, path: Path) -> None:
        """Averages down and writes a PNG."""
        with path.open("wb") as file:
            self.image.reduce(FINE).save(file, "PNG")


def ticks(low: float, high: float, log: bool = False, most: int = 6) -> list[float]:
    """Round numbers in [low, high], rising, about `most` of them; for log powers of ten, where few also 2 and 5 times those."""
    if high <= low:
        return [low]
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        within = lambda steps: [v for p in powers for v in (s * 10.0**p for s in steps) if low <= v * (1 + 1e-9) and v <= high]
        few, many = within((1,)), within((1, 2, 5))
        if len(many) > 1:
            return few if len(few) >= 4 else many
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def colour_of(values: Float[np.ndarray, "*n"], limits: tuple[float, float], colours: str) -> Float[np.ndarray, "*n 3"]:
    """Colours, 0 to 255, of values between the limits; those outside take the end's."""
    stops = np.asarray([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in MAPS[colours]], float)
    place = np.clip((values - limits[0]) / (limits[1] - limits[0]), 0, 1) * (len(stops) - 1)
    return np.stack([np.interp(place, np.arange(len(stops)), stops[:, i]) for i in range(3)], axis=-1)


def heat_maps(
    path: Path, panels: Sequence[Panel], axis: Sequence[float], label: str, title: str = "", width: int = 900
) -> list[Axes]:
    """Writes panels side by side, each a square map over (axis, axis) with ticks and a colour bar; where each map lies.

    axis: m evenly spaced values, drawn from left to right and from bottom to top in the order given. Every value has a cell.
    Raises ValueError if a panel is not (m, m) or not finite.
    """
    m, share = len(axis), width // len(panels)
    left, bar, top = 62, 78, (76 if title else 46)
    side = share - left - bar
    canvas, maps = Canvas(width, top + side + 58), []
    if title:
        canvas.text(width / 2, 22, title, TITLE)
    half = (axis[-1] - axis[0]) / (2 * max(m - 1, 1)) or 0.5
    ends = (axis[0] - half, axis[-1] + half)
    for i, panel in enumerate(panels):
        if np.shape(panel.values) != (m, m):
            raise UserError(f"panel {panel.title!r} has shape {np.shape(panel.values)}, must be ({m}, {m}), as its axis")
        if not np.all(np.isfinite(panel.values)):
            raise UserError(f"panel {panel.title!r} can only draw finite numbers")
        x = i * share + left
        axes = Axes((x, top, x + side, top + side), ends, ends)
        _heat_map(canvas, axes, panel)
        _sides(canvas, axes, label, label, _inside(axis), _inside(axis))
        maps.append(axes)
    canvas.save(path)
    return maps


def _inside(axis: Sequence[float]) -> list[float]:
    return ticks(min(axis), max(axis), most=5)


def _heat_map(canvas: Canvas, axes: Axes, panel: Panel) -> None:
    """The cells, from the bottom up, the panel's title and its colour bar."""
    left, top, right, bottom = axes.box
    values = np.asarray(panel.values, float)
    low, high = panel.limits or (float(values.min()), float(values.max()))
    high = high if high > low else low + 1.0
    _paste(canvas, colour_of(values[::-1], (low, high), panel.colours), axes.box)
    canvas.text((left + right) / 2, top - 16, panel.title, LABEL)
    bar = Axes((right + 14, top, right + 30, bottom), (0.0, 1.0), (low, high))
    _paste(canvas, colour_of(np.linspace(high, low, 256)[:, None], (low, high), panel.colours), bar.box)
    canvas.frame(bar.box)
    for value in ticks(low, high):
        _, y = bar.at(0, value)
        canvas.line([(bar.box[2], y), (bar.box[2] + 4, y)], INK)
        canvas.text(bar.box[2] + 8, y, f"{value:.4g}", TICK, "lm")


def _paste(canvas: Canvas, colours: Float[np.ndarray, "h w 3"], box: tuple[int, int, int, int]) -> None:
    size = ((box[2] - box[0]) * FINE, (box[3] - box[1]) * FINE)
    cells = Image.fromarray(np.round(colours).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    canvas.image.paste(cells, (box[0] * FINE, box[1] * FINE))


def _sides(
    canvas: Canvas,
    axes: Axes,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | Mapping[float, str],
    y_ticks: Sequence[float],
    grid: bool = False,
) -> None:
    """The frame of a plot, its ticks and what its axes mean; `grid` also draws faint lines."""
    left, top, right, bottom = axes.box
    for value in x_ticks:
        x, _ = axes.at(value, axes.y[0])
        if grid:
            canvas.line([(x, top), (x, bottom)], FAINT)
        canvas.line([(x, bottom), (x, bottom + 5)], INK)
        canvas.text(x, bottom + 15, x_ticks[value] if isinstance(x_ticks, Mapping) else f"{value:.4g}", TICK)
    for value in y_ticks:
        _, y = axes.at(axes.x[0], value)
        if grid:
            canvas.line([(left, y), (right, y)], FAINT)
        canvas.line([(left - 5, y), (left, y)], INK)
        canvas.text(left - 8, y, f"{value:.4g}", TICK, "rm")
    canvas.frame(axes.box)
    canvas.text((left + right) / 2, bottom + 40, x_label, LABEL)
    canvas.text(left - _widest(y_ticks) - 24, (top + bottom) / 2, y_label, LABEL, up=True)


def _widest(values: Sequence[float]) -> int:
    """Pixels that the longest of some ticks takes."""
    return math.ceil(max(ImageFont.load_default(TICK).getlength(f"{value:.4g}") for value in values))


def lines(
    path: Path,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str = "",
    log: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    size: tuple[int, int] = (900, 520),
) -> Axes:
    """Writes one chart of all series with error bars and a legend on its right; where the plot lies.

    log: the y axis is logarithmic; every y must be positive, an error bar that reaches 0 or below ends at the axis.
    x_ticks: words for values of x (windows, say); None: round numbers.
    Raises ValueError for a y that is not finite, or not positive on a logarithmic axis.
    """
    values = np.concatenate([np.asarray(s.y, float) for s in series])
    if not np.all(np.isfinite(values)) or (log and np.any(values <= 0)):
        raise UserError(f"the chart {title!r} can only draw finite numbers, positive on a logarithmic axis")
    canvas = Canvas(*size)
    words = [ImageFont.load_default(TICK).getlength(s.name) for s in series]
    limits = _limits(series, log)
    numbers, right = ticks(*limits[1], log=log), size[0] - 62 - math.ceil(max(words))
    axes = Axes((_widest(numbers) + 42, 48 if title else 20, right, size[1] - 62), *limits, log)
    if title:
        canvas.text((axes.box[0] + axes.box[2]) / 2, 24, title, TITLE)
    _sides(canvas, axes, x_label, y_label, x_ticks or ticks(*axes.x, most=8), numbers, grid=True)
    for i, line in enumerate(series):
        mark, colour = MARKERS[i % len(MARKERS)], SERIES[i % len(SERIES)]
        _series(canvas, axes, line, mark, colour)
        y = axes.box[1] + 14 + 24 * i
        canvas.line([(right + 14, y), (right + 42, y)], colour, 2)
        canvas.marker(mark, right + 28, y, colour)
        canvas.text(right + 50, y, line.name, TICK, "lm")
    canvas.save(path)
    return axes


def _limits(series: Sequence[Line], log: bool) -> tuple[tuple[float, float], tuple[float, float]]:
    """Values at the sides of the plot: all points and error bars with some room around; from 0 where nothing is negative."""
    x = np.concatenate([np.asarray(s.x, float) for s in series])
    y = np.concatenate([np.asarray(s.y, float) for s in series])
    spread = np.concatenate([np.broadcast_to(0.0 if s.spread is None else s.spread, len(s.y)) for s in series])
    low, high, room = float(np.min(y - spread)), float(np.max(y + spread)), 0.04 * float(np.ptp(x)) or 0.5
    if log:
        below = (y - spread)[y - spread > 0.1 * y]
        lowest = min(float(y.min()), float(below.min()) if len(below) else math.inf)
        sides = (lowest / 1.3, high * 1.3)
    else:
        low = 0.0 if low >= 0 or float(y.min()) >= 0 else low - 0.05 * (high - low)
        sides = (low, high + 0.05 * (high - low) if high > low else low + 1.0)
    return (float(x.min()) - room, float(x.max()) + room), sides


def _series(canvas: Canvas, axes: Axes, line: Line, mark: str, colour: tuple[int, int, int]) -> None:
    """One line, its error bars with caps, its markers on top."""
    canvas.line([axes.at(x, y) for x, y in zip(line.x, line.y, strict=True)], colour, 2)
    for x, y, spread in zip(line.x, line.y, line.spread if line.spread is not None else [0.0] * len(line.x), strict=True):
        if spread:
            (across, low), (_, high) = axes.at(x, max(y - spread, axes.y[0])), axes.at(x, y + spread)
            canvas.line([(across, low), (across, high)], colour, 2)
            for end in (low, high):
                canvas.line([(across - 5, end), (across + 5, end)], colour, 2)
        canvas.marker(mark, *axes.at(x, y), colour)
