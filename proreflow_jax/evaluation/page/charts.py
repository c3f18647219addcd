"""Curves as SVG: one chart with a logarithmic axis, steps below, a legend in HTML that wraps on a phone."""

import math
from collections.abc import Mapping, Sequence

from proreflow_jax.evaluation.page.facts import Series
from proreflow_jax.evaluation.page.markup import number, text

COLOURS = 8  # of the style sheet; further series are dashed
WIDTH, HEIGHT = 360, 220  # units of a chart, pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
MOST_POINTS = 240  # of a series; more are averaged
SPAN = 1.12  # the axis goes so many times beyond the least and the greatest value
FEW = 6  # labels of an axis

Points = Sequence[tuple[int | float, int | float]]


def series_of(lines: Sequence[Mapping[str, object]], number_name: str, windows: int, beyond_one: bool = False) -> list[Series]:
    """The mean, where lines have one, and each window of a number of metrics.jsonl.

    beyond_one: one minus the number.
    """
    of = lambda key: [
        (float(line["step"]), 1 - line[key] if beyond_one else line[key])
        for line in lines
        if isinstance(line.get("step"), int) and isinstance(line.get(key), float | int)
    ]
    rows = [Series("mean", of(number_name), -1)]
    rows += [Series(f"window {k}", of(f"window/{k}/{number_name}"), k) for k in range(windows)]
    return [one._replace(points=thinned(usable)) for one in rows if (usable := positive(one.points))]


def positive(points: Points) -> Points:
    """Those that a logarithmic axis can show."""
    return [(x, y) for x, y in points if math.isfinite(y) and y > 0]


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: means of equal parts; the last point stays."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-(len(points) - 1) // (MOST_POINTS - 1))
    parts = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [*((part[-1][0], sum(y for _, y in part) / len(part)) for part in parts), points[-1]]


def chart(
    title: str,
    series: Sequence[Series],
    total: int | float,
    note: str = "",
    ticks: Mapping[int | float, str] | None = None,
) -> str:
    """A figure with its legend; x goes from 0 to `total` steps, or as far as there are points.

    ticks: labels below, in the place of round numbers of steps.
    """
    if not series:
        return ""
    values = [y for one in series for _, y in one.points]
    above = [y + spread for one in series for (_, y), spread in zip(one.points, one.spreads, strict=False)]
    low, high = min(values) / SPAN, max([*values, *above]) * SPAN
    right = max([total, *(x for one in series for x, _ in one.points)]) or 1
    place = lambda x, y: (
        LEFT + (WIDTH - LEFT - RIGHT) * x / right,
        TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.log(y / low) / math.log(high / low)),
    )
    parts = [_grid(log_ticks(low, high), ticks or step_labels(right), place)]
    parts += [_curve(one, place, low) for one in series]
    legend = "".join(_entry(one) for one in series)
    below = f"<p class=note>{text(note)}</p>" if note else ""
    return (
        f"<figure class=chart><figcaption>{text(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{text(title)}">{"".join(parts)}</svg>'
        f"<ul class=legend>{legend}</ul>{below}</figure>"
    )


def log_ticks(low: int | float, high: int | float) -> list[int | float]:
    """Round values of a logarithmic axis: powers of ten, with 2 and 5 between if these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps, every in (((1, 2, 3, 5, 7), 1), ((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 5)):
        ticks = [m * 10.0**k for k in range(first, last + 1) if k % every == 0 for m in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= FEW:
            return ticks or [math.sqrt(low * high)]
    return ticks[:: -(-len(ticks) // FEW)]


def even_ticks(right: int | float) -> list[int | float]:
    """Round steps from 0 to `right`."""
    size = 10.0 ** math.floor(math.log10(right / 2))
    step = next(size * m for m in (1, 2, 5, 10, 20) if right / (size * m) <= 4)
    step = max(step, 1)
    return [step * i for i in range(int(right / step) + 1)]


def step_labels(right: int | float) -> dict[int | float, str]:
    """{step: label} of an axis; the last one names the unit."""
    steps = even_ticks(right)
    return {step: f"{number(step)} steps" if step == steps[-1] and len(steps) > 1 else number(step) for step in steps}


def _grid(rows: Sequence[int | float], columns: Mapping[int | float, str], place: object) -> str:
    parts = []
    for value in rows:
        _, y = place(0, value)
        parts.append(f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text x={LEFT - 5} y={y + 4:.1f} text-anchor=end>{tick_label(value)}</text>")
    for spot, label in columns.items():
        x, _ = place(spot, rows[0])
        last = spot == max(columns) and len(columns) > 1
        anchor = "end" if last or x > WIDTH - 30 else "start" if not spot else "middle"
        parts.append(f"<text x={x:.1f} y={HEIGHT - 6} text-anchor={anchor}>{text(label)}</text>")
    return "".join(parts)


def tick_label(value: int | float) -> str:
    """0.02, 1e-5."""
    return f"{value:.2g}" if value < 1000 else f"{value:.0e}"


def _curve(one: Series, place: object, low: int | float) -> str:
    spots = [place(x, y) for x, y in one.points]
    kind = "mean" if one.colour < 0 else f"c{one.colour % COLOURS}" + (" dashed" if one.colour >= COLOURS else "")
    title = f"<title>{text(one.name)}</title>"
    x, y = spots[-1]
    dot = f'<circle class="{kind}" cx={x:.1f} cy={y:.1f} r=2.5 />'
    dot += _spreads(one, kind, place, low)
    if len(spots) == 1:
        return dot
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}">{title}</polyline>{dot}'


def _spreads(one: Series, kind: str, place: object, low: int | float) -> str:
    """A line at each point, as far as its spread goes; no further than `low`, the least value of the axis."""
    pairs = zip(one.points, one.spreads, strict=False)  # () where spreads are not known
    ends = [(place(x, y + spread), place(x, max(y - spread, low))) for (x, y), spread in pairs]
    lines = "".join(f"M{x:.1f} {top:.1f}V{bottom:.1f}" for (x, top), (_, bottom) in ends)
    return f'<path class="spread {kind}" d="{lines}"/>' if lines else ""


def _entry(one: Series) -> str:
    kind = "mean" if one.colour < 0 else f"c{one.colour % COLOURS}"
    return f'<li><i class="{kind}"></i>{text(one.name)} <b>{number(one.points[-1][1])}</b></li>'
