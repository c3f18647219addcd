"""Figures: values lie where their axes say, nothing is cut off, and matplotlib is needed only where a figure is made."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.evaluation import figures

pytest.importorskip("matplotlib")
FALLING = (1.0, 0.75, 0.5, 0.25)
LINES = (
    figures.Line("first", (0, 1, 2), (1.0, 2.0, 1.0), (0.0, 0.5, 0.25)),
    figures.Line("second, with a long name", (0, 1, 2), (0.5, 0.5, 3.0)),
)


def pixels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("axis", [FALLING, FALLING[::-1]])
def test_every_cell_has_the_colour_of_its_value_at_its_place(tmp_path, axis):
    """In the written picture, at the pixel of (x, y) = (axis[j], axis[i])."""
    values = np.arange(16.0).reshape(4, 4)
    panels = [figures.Panel("L2", values), figures.Panel("cosine", np.sign(values - 7.5), "diverging", (-1, 1))]
    figure = figures.heat_maps(tmp_path / "m.png", panels, axis, "time", "both")
    picture = pixels(tmp_path / "m.png")
    for axes, panel in zip(figure.axes[:2], panels, strict=True):
        (image,) = axes.images
        for (i, j), value in np.ndenumerate(panel.values):
            x, y = axes.transData.transform((axis[j], axis[i]))
            colour = 255 * np.asarray(image.to_rgba(value)[:3])
            np.testing.assert_allclose(picture[picture.shape[0] - 1 - int(y), int(x)], colour, atol=1.5)
        first, last = axes.transData.transform((axis[0], axis[0])), axes.transData.transform((axis[-1], axis[-1]))
        assert np.all(first < last)  # the first value is at the left and at the bottom
        assert axes.get_xlabel() == axes.get_ylabel() == "time"


def test_the_colour_bars_ends_are_the_limits_or_the_values_own(tmp_path):
    values = np.arange(16.0).reshape(4, 4)
    panels = [figures.Panel("L2", values), figures.Panel("cosine", values / 16, "diverging", (-1, 1))]
    figure = figures.heat_maps(tmp_path / "m.png", panels, FALLING, "time")
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0, 15), (-1, 1)]
    assert min(figure.axes[1].images[0].to_rgba(0.0)[:3]) > 0.95  # white halfway
    assert pixels(tmp_path / "m.png").shape[1] == 900


def test_panels_that_do_not_fit_the_axis_or_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"panel 'L2' has shape \(3, 3\), must be \(4, 4\)"):
        figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.zeros((3, 3)))], FALLING, "time")
    with pytest.raises(UserError, match="panel 'L2' can only show finite numbers"):
        figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.full((4, 4), np.nan))], FALLING, "time")
    assert not (tmp_path / "m.png").exists()
    figures.heat_maps(tmp_path / "m.png", [figures.Panel("L2", np.zeros((1, 1)))], FALLING[:1], "time")  # one value, no range


def test_lines_and_error_bars_have_their_values_and_lie_inside(tmp_path):
    figure = figures.lines(tmp_path / "l.png", LINES, "size", "distance", "chart")
    (axes,) = figure.axes
    for line, (curve, caps, _) in zip(LINES, axes.containers, strict=True):
        np.testing.assert_array_equal(curve.get_xydata(), np.stack([line.x, line.y], axis=1))
        if line.spread:
            ends = [cap.get_ydata() for cap in caps]
            np.testing.assert_array_equal(ends, [np.subtract(line.y, line.spread), np.add(line.y, line.spread)])
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 3
    assert pixels(tmp_path / "l.png").shape == (520, 900, 3)


def test_an_axis_begins_below_zero_where_values_do(tmp_path):
    below = figures.Line("below", (0, 1), (-1.0, 1.0), (0.5, 0.5))
    low, high = figures.lines(tmp_path / "l.png", [below], "size", "distance").axes[0].get_ylim()
    assert low < -1.5 and high > 1.5


def test_the_legend_names_every_series_and_nothing_is_cut_off(tmp_path):
    figure = figures.lines(tmp_path / "l.png", LINES, "size", "distance", "a long title, " * 5, x_ticks={0: "one", 2: "three"})
    (legend,), (axes,) = figure.legends, figure.axes
    assert [text.get_text() for text in legend.get_texts()] == [line.name for line in LINES]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "three"]
    box = legend.get_window_extent()
    assert axes.get_window_extent().x1 < box.x0 and box.x1 < 900  # beside the plot
    assert not box.overlaps(figure.texts[0].get_window_extent())  # nor over the title
    picture = pixels(tmp_path / "l.png")
    assert min(picture[:, :3].min(), picture[:, -3:].min(), picture[:3].min(), picture[-3:].min()) == 255


def test_a_chart_refuses_numbers_that_are_not_finite(tmp_path):
    with pytest.raises(UserError, match="the chart 'c' can only show finite numbers"):
        figures.lines(tmp_path / "l.png", [LINES[0]._replace(y=(np.nan, 1.0, 1.0))], "x", "y", "c")
    assert not (tmp_path / "l.png").exists()


def test_colour_and_marker_together_tell_series_apart():
    colours, markers = figures.COLOURS, figures.MARKERS
    assert len({(colours[i % len(colours)], markers[i % len(markers)]) for i in range(20)}) == 20


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install matplotlib \(the extra `demo`\)"):
        figures.lines(tmp_path / "l.png", LINES, "x", "y")
    assert not (tmp_path / "l.png").exists()


def test_matplotlib_is_imported_only_where_a_figure_is_made_and_pyplot_never(tmp_path):
    code = (
        "import sys, pathlib; from proreflow_jax.evaluation import figures; assert 'matplotlib' not in sys.modules;"
        f"figures.lines(pathlib.Path({str(tmp_path / 'l.png')!r}), [figures.Line('a', (0, 1), (1.0, 2.0))], 'x', 'y');"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
