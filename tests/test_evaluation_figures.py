"""Pictures of numbers: what is drawn stands at the pixels where its values are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proreflow_jax.evaluation import figures

AXIS = (1.0, 0.75, 0.5, 0.25)
LINES = (
    figures.Line("first", (0, 1, 2), (1.0, 2.0, 1.0), (0.0, 0.5, 0.25)),
    figures.Line("second, with a long name", (0, 1, 2), (0.5, 0.5, 3.0)),
)


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.format == "PNG" and image.mode == "RGB"
    return np.asarray(image).astype(int)


def near(found: np.ndarray, colour, tolerance: int = 3) -> bool:
    return bool(np.all(np.abs(np.asarray(found) - np.asarray(colour)) <= tolerance))


def at(picture: np.ndarray, axes: figures.Axes, x: float, y: float) -> np.ndarray:
    column, row = axes.at(x, y)
    return picture[int(row), int(column)]


def bar_at(picture: np.ndarray, axes: figures.Axes, x: float, y: float, colour) -> bool:
    """Whether a thin upright line of this colour passes here."""
    column, row = axes.at(x, y)
    return any(near(picture[int(row), int(column) + i], colour, 60) for i in (-1, 0, 1))


@pytest.fixture
def maps(tmp_path):
    """Two panels: 0 to 15 row by row, and -1, 0, 1 on a diverging scale."""
    values = np.arange(16.0).reshape(4, 4)
    panels = [figures.Panel("L2", values), figures.Panel("cosine", np.sign(values - 7.5) * (values != 7), "diverging", (-1, 1))]
    axes = figures.heat_maps(tmp_path / "m.png", panels, AXIS, "time", "both")
    return values, axes, pixels(tmp_path / "m.png")


def test_every_cell_has_the_colour_of_its_value_at_its_place(maps):
    values, (first, _), picture = maps
    for i, y in enumerate(AXIS):
        for j, x in enumerate(AXIS):
            want = figures.colour_of(values[i, j], (0, 15), "sequential")
            assert near(at(picture, first, x, y), want), (i, j)
    left, top, right, bottom = first.box
    assert right - left == bottom - top
    assert near(picture[bottom - 5, left + 5], (0x44, 0x01, 0x54))  # the first value is at the lower left corner
    assert near(picture[top + 5, right - 5], (0xFD, 0xE7, 0x25))


def test_a_diverging_map_is_white_in_the_middle_and_its_bar_names_the_ends(maps):
    _, (_, second), picture = maps
    assert near(at(picture, second, 1.0, 1.0), (0x21, 0x66, 0xAC), 4)
    assert near(at(picture, second, 0.25, 0.25), (0xB2, 0x18, 0x2B), 4)
    assert figures.colour_of(np.array(0.0), (-1, 1), "diverging").min() > 0xF0
    bar = second.box[2] + 22
    assert near(picture[second.box[1] + 4, bar], (0xB2, 0x18, 0x2B), 8)
    assert near(picture[second.box[3] - 5, bar], (0x21, 0x66, 0xAC), 8)
    assert picture[second.box[1] - 6 : second.box[1] + 8, bar + 16 : bar + 28].min() < 120  # the 1 beside the bar's top


def test_a_map_is_900_pixels_wide_and_has_titles_ticks_and_labels(maps):
    _, (first, _), picture = maps
    left, top, right, bottom = first.box
    assert picture.shape[1] == 900
    assert picture[8:36].min() < 100 and picture[top - 26 : top - 6].min() < 100
    assert (
        picture[bottom + 8 : bottom + 24, left:right].min() < 100 and picture[bottom + 30 : bottom + 50, left:right].min() < 100
    )
    assert picture[top:bottom, :26].min() < 100 and picture[top:bottom, 26 : left - 6].min() < 100


def test_panels_that_do_not_fit_the_axis_or_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"panel 'L2' has shape \(3, 3\), must be \(4, 4\)"):
        figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.zeros((3, 3)))], AXIS, "time")
    with pytest.raises(ValueError, match="panel 'L2' can only draw finite numbers"):
        figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.full((4, 4), np.nan))], AXIS, "time")
    figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.zeros((1, 1)))], AXIS[:1], "time")  # one value, no range


@pytest.mark.parametrize("log", [False, True])
def test_lines_marks_and_error_bars_stand_where_their_values_are(tmp_path, log):
    axes = figures.lines(tmp_path / "l.png", LINES, "size", "distance", "chart", log)
    picture = pixels(tmp_path / "l.png")
    assert picture.shape == (520, 900, 3) and axes.log == log
    first, second = figures.SERIES[:2]
    for line, colour in zip(LINES, (first, second), strict=True):
        for x, y in zip(line.x, line.y, strict=True):
            assert near(at(picture, axes, x, y), colour), (line.name, x)
    assert near(at(picture, axes, 0.5, 0.5), second)  # between two points
    assert [bar_at(picture, axes, 1, y, first) for y in (1.4, 1.6, 2.4, 2.6)] == [False, True, True, False]  # 2 +- 0.5
    column, row = axes.at(1, 2.5)
    assert near(picture[round(row) - 1 : round(row) + 2, int(column) + 4].min(axis=0), first, 40)  # its cap
    assert near(at(picture, axes, 0.03, 1.3 if log else 1.4), figures.PAPER)  # a spread of 0 has no bar


def test_a_chart_begins_at_zero_and_holds_every_error_bar(tmp_path):
    axes = figures.lines(tmp_path / "l.png", LINES, "size", "distance")
    assert axes.y[0] == 0 and axes.y[1] > 3.0 and axes.x[0] < 0 and axes.x[1] > 2
    below = figures.Line("below", (0, 1), (-1.0, 1.0), (0.5, 0.5))
    axes = figures.lines(tmp_path / "l.png", [below], "size", "distance")
    assert axes.y[0] < -1.5 and axes.y[1] > 1.5


def test_the_legend_names_every_series_beside_the_plot(tmp_path):
    axes = figures.lines(tmp_path / "l.png", LINES, "size", "distance", "chart", x_ticks={0: "one", 2: "three"})
    picture = pixels(tmp_path / "l.png")
    left, top, right, bottom = axes.box
    for i, colour in enumerate(figures.SERIES[:2]):
        y = top + 14 + 24 * i
        assert near(picture[y, right + 28], colour)
        assert picture[y - 7 : y + 8, right + 50 : right + 80].min() < 120
    assert picture[:, -3:].min() > 250  # the long name is not cut off
    under = picture[bottom + 8 : bottom + 24]
    columns = [int(axes.at(x, 1)[0]) for x in (0, 1, 2)]
    inked = [under[:, c - 12 : c + 12].min() < 120 for c in columns]
    assert inked == [True, False, True]
    assert under[:, columns[2] + 8 : columns[2] + 20].min() < 120  # a word, not the number 2
    assert picture[top:bottom, 8:28].min() < 120 and picture[top:bottom, 30 : left - 6].min() < 120  # the label, the ticks


def test_a_chart_refuses_what_it_cannot_draw(tmp_path):
    bad = [figures.Line("a", (0, 1), (0.0, 1.0))]
    with pytest.raises(ValueError, match="the chart 'c' can only draw finite numbers, positive on a logarithmic axis"):
        figures.lines(tmp_path / "l.png", bad, "x", "y", "c", log=True)
    with pytest.raises(ValueError, match="the chart 'c'"):
        figures.lines(tmp_path / "l.png", [bad[0]._replace(y=(np.nan, 1.0))], "x", "y", "c")
    assert not (tmp_path / "l.png").exists()
    deep = figures.Line("a", (0, 1), (0.1, 1.0), (0.2, 0.1))  # an error bar below zero
    axes = figures.lines(tmp_path / "l.png", [deep], "x", "y", log=True)
    assert 0 < axes.y[0] < 0.1


@pytest.mark.parametrize(
    ("low", "high", "log", "want"),
    [
        (0.0, 0.5, False, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (-1.0, 1.0, False, [-1, -0.5, 0, 0.5, 1]),
        (13.0, 87.0, False, [20, 40, 60, 80]),
        (0.02, 3.0, True, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (1e-4, 1.0, True, [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (0.6, 0.9, True, [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]),
        (2.0, 2.0, False, [2]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, want):
    np.testing.assert_allclose(figures.ticks(low, high, log), want, atol=1e-12)


def test_colours_can_be_told_apart_without_seeing_hue():
    """A sequential map rises in lightness; a diverging one is lightest in its middle."""
    light = lambda name: figures.colour_of(np.linspace(0, 1, 101), (0, 1), name) @ (0.2126, 0.7152, 0.0722)
    assert np.all(np.diff(light("sequential")) > 0)
    assert np.all(np.diff(light("diverging"))[:50] > 0) and np.all(np.diff(light("diverging"))[50:] < 0)
    pairs = {(figures.SERIES[i % len(figures.SERIES)], figures.MARKERS[i % len(figures.MARKERS)]) for i in range(20)}
    assert len(pairs) == 20  # colour and mark together name one series
