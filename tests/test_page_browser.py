"""The page in headless Chromium, on a desk and on a phone: nothing scrolls sideways, slider and difference work."""

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proreflow_jax.evaluation.page import embed, serve
from proreflow_jax.evaluation.page.document import document
from proreflow_jax.evaluation.page.facts import Box, Change, Drawing, Panel, Run, Series, Stage, Study, Table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=8000", "--dump-dom",
)  # fmt: skip
HARNESS = """<!doctype html><meta charset=utf-8>
<iframe id=frame style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id=result></pre><script>
frame.addEventListener("load", () => setTimeout(() => {{
  const page = frame.contentDocument, root = page.documentElement, width = frame.clientWidth;
  const outside = [...page.querySelectorAll("body *")].filter((one) => !one.closest(".wide, svg") &&
    one.getBoundingClientRect().right > width + 1).map((one) => one.tagName + "." + one.className);
  const size = (one) => parseFloat(getComputedStyle(one).fontSize);
  const stack = page.querySelector(".stack"), over = stack.querySelector(".over"), range = page.querySelector("[type=range]");
  const shots = [...page.querySelectorAll("button.shot")], box = page.querySelector(".difference");
  const last = over.src === shots[shots.length - 1].querySelector("img").src;
  range.value = 20; range.dispatchEvent(new Event("input"));
  const cut = frame.contentWindow.getComputedStyle(over).clipPath;
  box.click();
  const blend = frame.contentWindow.getComputedStyle(over).mixBlendMode;
  shots[0].click();
  result.textContent = JSON.stringify({{
    sideways: root.scrollWidth - width, outside, last, cut, blend, first: over.src === shots[0].querySelector("img").src,
    which: page.querySelector(".which").textContent, compared: stack.getBoundingClientRect().width,
    small: Math.min(...[...page.querySelectorAll("body *:not(svg *)")].map(size)),
    told: page.querySelector("time").textContent,
  }});
}}, 500));
</script>"""


def long_run() -> Run:
    """A page with the longest of everything."""
    rng = np.random.default_rng(0)
    picture = lambda: embed.as_data(Image.fromarray(rng.integers(0, 255, (128, 64, 3), np.uint8)), embed.SIDES)
    line = lambda step: (
        {"step": step, "seconds": 1.0, "loss": 1 / step}
        | {f"window/{k}/{name}": 1 / (step + k) for k in range(16) for name in ("loss", "cosine")}
    )
    drawings = [Drawing(step, picture()) for step in range(0, 60_000, 10_000)]
    lines = [line(step) for step in range(1000, 60_000, 1000)]
    stage = Stage(16, True, {"digest": "a" * 64, "step": 60_000}, "b" * 64, 60_000, 60_000, lines, drawings, picture())
    parts = [{"phase": "pairs", "stage": 16, "done": 999_999, "total": 1_000_000, "unit": "pairs", "cost": 64.0}] * 3
    progress = {"phase": "pairs", "stage": 16, "done": 999_999, "total": 1_000_000, "unit": "pairs", "parts": parts, "time": 0}
    heads = [f"a long heading of column {i}" for i in range(14)]
    table = Table("Table", heads, ["less"] * 14, [["123,456.7 +- 89.0"] * 14] * 3, [1, 2], ["note " * 60], picture())
    return Run(
        name="a-run-with-a-name-" * 8,
        folder="gs://bucket/" + "folder/" * 30,
        time=0.0,
        fields={"model.path": "/" + "m" * 300},
        progress=progress
        | {"devices": "256 x TPU v5 lite", "seconds_left": 1e6, "rates": {"pairs": 0.1}}
        | {"under_way": ["u" * 90] * 9},
        stages=[stage, stage._replace(windows=8, parent="c" * 64)],
        exports=[16],
        tables=[table],
        prompts=["a prompt that goes on, " * 10, "w" * 200],
        halves={"count": 1, "left": {"steps": 32, "guidance": 4.5}, "right": {}},
        tile=64,
        config_name="digits",
        changes=[Change("data.path", "d" * 200, "v" * 200)] * 20,
        disk={"checkpoints": 10**13},
    )


def long_training() -> Run:
    """The same of a base model's training, a study, and what a grid of methods has."""
    run = long_run()
    stages = [stage._replace(windows=0, own_name="autoencoder " * 3, sides=("original", "r" * 40)) for stage in run.stages]
    boxes = [Box("start", "/" + "m" * 300, "d" * 64), Box("model", "w" * 100, kind="waiting")]
    series = [Series("trained, uniform " * 3, [(0.1, 1.0), (0.9, 3.0)], 0, [0.1, 4.0])]
    alone = [Table("t" * 90, [], [], [], [], picture=run.tables[0].picture)]
    study = Study([Panel("p " * 60, series, {0.0: "noise", 1.0: "data"}, "n " * 60)], run.tables, ["s " * 90])
    more = {"panels": study.panels, "counted": [("c" * 60, "forwards " * 40)], "tables": [*run.tables, *alone]}
    return run._replace(stages=stages, boxes=boxes, study=study, prompts=run.prompts * 6, pictured="how " * 60, **more)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("make", "tile"), [(long_run, 64), (long_run, 512), (long_training, 64)])
def test_the_page_fits_and_its_script_works(tmp_path: Path, width: int, make: Callable[[], Run], tile: int) -> None:
    page = document(make()._replace(tile=tile))
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(width=width, page=html.escape(page, quote=True)), encoding="utf-8")
    own = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 200},1000")
    done = subprocess.run([CHROMIUM, *FLAGS, *own, harness.as_uri()], capture_output=True, text=True, timeout=180)
    match = re.search(r"<pre id=\"result\">(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    facts = json.loads(html.unescape(match[1]))
    assert facts["sideways"] <= 0 and facts["outside"] == []
    assert facts["last"] and facts["first"] and facts["which"] == "untrained" and facts["cut"] == "inset(0px 0px 0px 20%)"
    assert facts["blend"] == "difference" and facts["told"].endswith("days ago")
    assert facts["compared"] >= 220 and facts["small"] >= 12


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_watch_loads_the_page_that_has_changed_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "report.html").write_text("<h1>before</h1>")
    looks, loads = [], []

    def version(folder: Path, look: Callable[[Path], str] = serve.version) -> str:
        looks.append(folder)
        if len(looks) == 3:  # the second time that the browser asks
            (folders[0] / "report.html").write_text("<h1>after</h1>")
        return look(folder)

    def page(folder: Path, read: Callable[[Path], str] = serve.page) -> str:
        loads.append((folder.name, read(folder)))
        return loads[-1][1]

    monkeypatch.setattr(serve, "version", version)
    monkeypatch.setattr(serve, "page", page)
    server = serve.make_server(folders, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", address]
        subprocess.run(words, capture_output=True, text=True, timeout=180)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(loads) == [("one", "<h1>after</h1>"), ("one", "<h1>before</h1>"), ("two", "<h1>before</h1>")]
