"""The page of a run from its value: all text is text, nothing is loaded from elsewhere, curves and marks are right."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from proreflow_jax.evaluation.page import charts, costs, embed, markup, sections
from proreflow_jax.evaluation.page.document import asset, document
from proreflow_jax.evaluation.page.facts import Change, Drawing, Run, Stage, Table

PIXEL = "data:image/png;base64,AAAA"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
WAITED = {"seconds": 2.0, "wait_input": 0.5, "wait_device": 1.0}
LINES = [
    {"step": 2, "loss": 0.5, "window/0/loss": 0.9, "window/1/loss": 0.1, "window/0/cosine": 0.9, **WAITED},
    {"step": 6, "loss": 0.25, "window/0/loss": "nan", "window/1/loss": 0.05, **WAITED, "seconds": 1.0, "wait_input": 0.0},
]


def stage(windows: int = 2, **changes: object) -> Stage:
    whole = Stage(windows, True, {}, "a" * 64, 6, 8, LINES, [Drawing(0, PIXEL), Drawing(6, PIXEL)], PIXEL)
    return whole._replace(**changes)


def whole_run(**changes: object) -> Run:
    parts = [
        {"phase": "pairs", "stage": 2, "done": 32, "total": 32, "unit": "pairs", "cost": 8.0},
        {"phase": "train", "stage": 2, "done": 6, "total": 8, "unit": "steps", "cost": 48.0},
    ]
    progress = {"phase": "train", "stage": 2, "done": 6, "total": 8, "unit": "steps", "parts": parts, "time": 0.0}
    progress |= {"seconds_left": 65.0, "devices": "8 x TPU v5e", "rates": {"pairs": 0.25}}
    table = Table(
        "Table", ["method", "FD"], ["", "less"], [["teacher", "0.1"], ["one", "0.5"], ["two", "0.4"]], [1, 2], ["a note"]
    )
    fields = {"model.path": "/models/digits", "stages": [2]}
    run = Run("digits", "runs/digits", 0.0, fields, progress, [stage()], [], [table], ["a three"], {"count": 1}, 8, "digits")
    return run._replace(**changes)


def parsed(page: str) -> tuple[list[tuple[str, dict]], str]:
    """All tags with their attributes, and all text."""
    tags, shown = [], []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = shown.append
    parser.feed(page)
    return tags, "".join(shown)


def evil_run() -> Run:
    table = Table(EVIL, [EVIL, EVIL], ["", "less"], [[EVIL, "1"]], [0], [EVIL], PIXEL)
    part = {"phase": EVIL, "stage": EVIL, "done": 1, "total": 2, "unit": EVIL}
    return Run(
        name=EVIL,
        folder=EVIL,
        time=0.0,
        fields={"model.path": EVIL},
        progress={**part, "parts": [part], "time": 0.0, "devices": f"1 x {EVIL}"},
        stages=[stage(done={"digest": EVIL}, parent=EVIL)],
        tables=[table],
        prompts=[EVIL],
        halves={"left": {"steps": EVIL, "guidance": 1.0}, "right": {}},
        config_name=EVIL,
        changes=[Change(EVIL, EVIL, EVIL)],
        disk={EVIL: 1},
    )


def test_all_text_from_outside_is_shown_as_text():
    tags, shown = parsed(document(evil_run()))
    assert [tag for tag, _ in tags].count("script") == 1 and shown.count("<script>alert(1)</script>") > 12
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert [attributes["src"] for tag, attributes in tags if "src" in attributes] == [PIXEL] * 4


@pytest.mark.parametrize("run", [whole_run(), evil_run(), Run("a", "runs/a", 0.0, {})], ids=["whole", "evil", "empty"])
def test_nothing_is_loaded_from_elsewhere(run):
    page = document(run)
    tags, _ = parsed(page)
    addresses = [attributes.get(name) for _, attributes in tags for name in ("src", "href", "srcset", "action", "data")]
    assert all(address is None or address.startswith("data:") for address in addresses)
    assert not {tag for tag, _ in tags} & {"link", "iframe", "object", "embed", "form", "base", "video", "audio"}
    policy = next(attributes["content"] for tag, attributes in tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy
    own = asset("style.css") + asset("script.js")
    assert own.strip() and not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp|import\(", own)
    assert not re.search(r"https?://", page)


def test_the_page_says_where_the_run_is():
    _, shown = parsed(document(whole_run()))
    for words in (
        "stage 2, training: 6 of 8 steps; about 1 min 5 s left in all",
        "6 of 8 steps",
        "--config=digits as it comes",
    ):
        assert words in shown.replace("\n", "")
    done = [stage(done={"digest": "b" * 64, "step": 8})]
    assert sections.headline(whole_run(progress={}, stages=done)) == "finished"
    assert sections.headline(whole_run(progress={})) == "begun; nothing is counted yet"
    over = whole_run().progress | {"phase": "done"}
    assert sections.headline(whole_run(progress=over)) == "finished what this command was to do"
    assert sections.headline(whole_run(progress=over, stages=done)) == "finished"


def test_lineage_has_every_digest_and_names_a_stage_that_starts_from_another():
    first = stage(4, done={"digest": "b" * 64}, parent="a" * 64)
    second = stage(2, parent="b" * 64)
    drawing = sections.lineage(whole_run(stages=[first, second], exports=[4]))
    assert drawing.count("a" * 12) == 1 and drawing.count("b" * 12) == 1 and "exported" in drawing and "is not" not in drawing
    wrong = sections.lineage(whole_run(stages=[first, second._replace(parent="c" * 64)]))
    assert f"starts from {'c' * 12}, which is not the box before" in wrong


def test_the_best_student_of_a_column_is_marked_and_no_teacher():
    assert sections.best_cells(whole_run().tables[0]) == {(2, 1)}
    cells = [
        ["t", "0", "99 %", "1"],
        ["a", "1,200 +- 3", "95.9 %", "x"],
        ["b", "1.3e3", "95.9 %", ""],
        ["c", "", "4 / 99 %", "2"],
    ]
    table = Table("", ["", "", "", ""], ["", "less", "more", "less"], cells, [1, 2, 3])
    assert sections.best_cells(table) == {(1, 1), (1, 2), (2, 2)}  # equals share; one number alone is no best
    assert sections.best_cells(table._replace(compared=[1])) == set()


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.11), (0.5, 3), (1e-5, 1), (1e-12, 1e6), (7.3, 7.4), (1e-300, 1e300)])
def test_an_axis_has_a_few_round_labels_inside_it(low, high):
    ticks = charts.log_ticks(low, high)
    assert 1 <= len(ticks) <= charts.FEW and all(low <= tick <= high for tick in ticks) and ticks == sorted(set(ticks))


@pytest.mark.parametrize("right", [1, 2, 6, 500, 12345, 1_000_000])
def test_steps_have_round_labels_from_the_start(right):
    ticks = charts.even_ticks(right)
    assert ticks[0] == 0 and ticks[-1] <= right and 2 <= len(ticks) <= 6 and all(tick == int(tick) for tick in ticks)


def test_curves_lie_inside_their_chart_and_leave_out_what_is_no_number():
    series = charts.series_of(LINES, "loss", 2)
    assert [(one.name, list(one.points)) for one in series] == [
        ("mean", [(2, 0.5), (6, 0.25)]), ("window 0", [(2, 0.9)]), ("window 1", [(2, 0.1), (6, 0.05)])
    ]  # fmt: skip
    (cosine,) = charts.series_of(LINES, "cosine", 2, beyond_one=True)
    assert cosine.points == [(2, pytest.approx(0.1))]
    figure = charts.chart("loss", series, 8)
    spots = [tuple(map(float, spot.split(","))) for line in re.findall(r'points="([^"]+)"', figure) for spot in line.split()]
    assert len(spots) == 4 and all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in spots)
    assert spots[0][0] < spots[1][0] and spots[0][1] < spots[1][1]  # later is further right, less is lower
    assert charts.chart("loss", [], 8) == ""
    assert "<circle" in charts.chart("loss", [charts.Series("mean", [(1, 1.0)], -1)], 0)


@pytest.mark.parametrize("count", [2, charts.MOST_POINTS, charts.MOST_POINTS + 1, 10_000])
def test_a_long_curve_is_thinned_to_means_and_ends_where_it_ends(count):
    points = [(float(i), 1.0 + i % 2) for i in range(count)]
    short = charts.thinned(points)
    assert len(short) <= charts.MOST_POINTS and short[-1] == points[-1] and [x for x, _ in short] == sorted(x for x, _ in short)
    assert all(1 <= y <= 2 for _, y in short)


def test_costs_are_sums_over_what_was_written_down():
    run = whole_run()
    assert costs.network_calls(run) == 32 * 8 + 6 * 48
    assert costs.training_seconds(run.stages[0]) == 2 * 2.0 + 4 * 1.0
    assert costs.pair_seconds(run) == 32 * 8 * 0.25
    assert costs.wait_shares(run.stages[0]) == pytest.approx((6 / 8, 1 / 8, 1 / 8))
    assert dict(costs.costs(run).facts)["device hours"] == f"{markup.number(8 * 72 / 3600)} on 8 x TPU v5e"
    assert costs.costs(Run("a", "a", 0.0, {})).facts == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (90000, "1 d 1 h"), (float("inf"), "unknown time")],
)
def test_a_duration_is_said_in_two_units(seconds, words):
    assert markup.span(seconds) == words


def opened(data: str) -> Image.Image:
    head, _, body = data.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_a_small_picture_is_exact_and_a_large_one_is_bounded(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (16, 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    left, right = embed.halves(tmp_path / "small.png", 1, 8, 4)
    np.testing.assert_array_equal(np.asarray(opened(left)), pixels[:, :8])
    np.testing.assert_array_equal(np.asarray(opened(right)), pixels[:, 12:])
    none, whole = embed.halves(tmp_path / "small.png", 1, 9, 4)  # of another layout
    assert none == "" and opened(whole).size == (20, 16)
    Image.fromarray(rng.integers(0, 255, (2048, 2052, 3), np.uint8)).save(tmp_path / "large.png")
    for part in embed.halves(tmp_path / "large.png", 2, 1024, 4):
        assert opened(part).size == (550, 1100) and len(part) < 1_000_000  # noise, the worst of all pictures
