"""`serve`: what the page offers and draws, in which words it refuses; and the page itself, where gradio is installed."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verb import run

import proreflow_jax
from proreflow_jax import UserError
from proreflow_jax.jobs import gallery_page
from proreflow_jax.jobs.gallery import Ask, Gallery, open_gallery, whole_number
from proreflow_jax.run import pictures

pytestmark = pytest.mark.usefixtures("quick")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
FOUR, TWO, BASE = "student of 4 windows", "student of 2 windows", "base model"


@pytest.fixture(scope="module")
def gallery(chain: Path) -> Gallery:
    return open_gallery(str(chain / "runs" / "tiny"))


def test_a_run_offers_its_students_and_the_base_model(gallery):
    assert gallery.students == [TWO, FOUR, BASE] and gallery.teacher == BASE and gallery.name == "tiny"


def test_both_sides_are_what_the_models_draw_from_the_same_noise(gallery, chain):
    steps = []
    ask = Ask(
        "a three", FOUR, BASE, steps="8", teacher_steps=4.0, guidance=1, teacher_guidance="2.5", negative="five", seed="3"
    )
    answer = gallery.draw(ask, lambda *step: steps.append(step))
    assert answer.refusal == "" and steps[:2] == [(0, 8, FOUR), (1, 8, FOUR)] and steps[-1] == (4, 4, BASE)
    for drawing, stage, words in (
        (answer.student, 4, {"steps": 8}),
        (answer.teacher, 0, {"steps": 4, "guidance": 2.5}),
    ):
        model = proreflow_jax.load(chain / "runs" / "tiny", stage=stage)
        (picture,) = model("a three", negative="five", seed=3, callback=lambda step: None, **words)
        np.testing.assert_array_equal(np.asarray(drawing.image), np.asarray(picture))
        assert pictures.records(drawing.image) == pictures.records(picture)
    assert (answer.student.steps, answer.student.calls) == (8, 8)
    assert (answer.teacher.steps, answer.teacher.calls) == (4, 8)  # guidance reads each prompt twice
    assert answer.student.compiled and "8 steps, 8 network calls" in answer.student.words()
    again = gallery.draw(ask._replace(teacher="", steps=4))
    assert again.teacher is None and not again.student.compiled and "with compiling" not in again.student.words()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"student": None}, "no student is chosen"),
        ({"student": "student of 3 windows"}, "reload the page"),
        ({"steps": 2}, "2"),
        ({"steps": 1.5}, "steps=1.5 must be a whole number"),
        ({"steps": None}, "steps=None must be a whole number"),
        ({"guidance": "much"}, "guidance=much must be a number"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": 1e9}, "guidance=1000000000.0 must be in"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"seed": "9" * 5000}, "must be a whole number"),
        ({"teacher": BASE, "teacher_steps": 5000}, "5000 sampling steps, must be at most"),
        ({"prompt": "x" * 1_000_000}, "shorten it"),
    ],
)
def test_a_refusal_is_one_line_for_the_page(gallery, change, line):
    answer = gallery.draw(Ask("a three", FOUR, seed=0)._replace(**change))
    assert line in answer.refusal and "\n" not in answer.refusal and answer.student is None and "--" not in answer.refusal


def test_the_largest_seed_is_exact():
    assert whole_number(str(2**64 - 1), "seed") == 2**64 - 1 and whole_number(7.0, "seed") == 7


def test_a_stage_that_trains_is_offered_with_its_newest_step(chain, tmp_path):
    copy = Path(shutil.copytree(chain / "runs" / "tiny", tmp_path / "tiny"))
    done, checkpoints = copy / "stage-2" / "DONE.json", copy / "stage-2" / "checkpoints"
    done.rename(tmp_path / "DONE.json")
    gallery = open_gallery(str(copy))
    label = f"{TWO}, step 6 of 6"
    assert gallery.students == [label, FOUR, BASE]
    drawing = gallery.draw(Ask("a three", label)).student
    assert drawing.steps == 2 and drawing.image.size == (8, 8)
    shutil.rmtree(checkpoints)
    gallery.refresh()
    assert gallery.students == [FOUR, BASE]
    (tmp_path / "DONE.json").rename(done)
    gallery.refresh()
    assert "distill" in gallery.draw(Ask("a three", TWO)).refusal  # its weights are gone


def test_a_model_alone_and_another_beside_it(chain, model):
    export = chain / "runs" / "tiny" / "export" / "stage-4"
    alone = open_gallery(str(export))
    assert alone.students == ["stage-4, student of 4 windows"] and alone.teacher == ""
    both = open_gallery(str(export), str(model))
    assert both.students == ["stage-4, student of 4 windows", "model, base model"] and both.teacher == "model, base model"
    assert both.draw(Ask("a three", both.students[0], both.teacher, teacher_steps=2)).teacher.steps == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"model": ""}, "--model is empty"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all does not exist: --model must name"),
        ({"model": "{run}", "vae": "x"}, "--vae is for a model alone"),
        ({"model": "{run}", "beside": "/nowhere/at/all"}, "/nowhere/at/all does not exist: --beside must name"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_their_own_words(chain, words, line):
    words = {name: value.format(run=chain / "runs" / "tiny") for name, value in words.items()}
    with pytest.raises(UserError, match=line) as error:
        open_gallery(**words)
    assert "source" not in str(error.value)


def test_models_that_are_too_large_together_are_not_kept(gallery, monkeypatch):
    monkeypatch.setattr("proreflow_jax.jobs.gallery.LIMIT", 0)
    for label in (FOUR, TWO, BASE):
        assert gallery.draw(Ask("a three", label, steps=4)).refusal == ""
    assert list(gallery._models) == [TWO, BASE]
    assert gallery.draw(Ask("a three", FOUR)).student.compiled


# The page.


def test_without_gradio_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(gallery_page, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "gradio")
    ended = run("serve", f"--model={tmp_path}")
    assert ended.code == 2 and ended.err.splitlines() == ["serve: serve needs gradio: pip install gradio (the extra `serve`)"]


def test_a_port_that_is_taken_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery_page, "find_spec", lambda name: name)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = run("serve", f"--model={tmp_path}", f"--port={port}")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and f"--port={port}" in ended.err
    ended = run("serve", f"--model={tmp_path}", "--port=70000")
    assert ended.code == 2 and "--port=70000" in ended.err


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_the_page_draws_refuses_and_keeps_what_it_drew(gallery, tmp_path):
    """Through the page's own interface, on 127.0.0.1."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    port = free_port()
    page = gallery_page.start(gallery, port, str(tmp_path))
    try:
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "client"))
        draw = lambda *words: client.predict(*words, api_name="/draw")
        answer = draw("a three", FOUR, BASE, 0, 4, 1.0, 1.0, "", "0")
        assert pictures.records(Image.open(answer[1]))[0]["prompt"] == "a three" and "4 network calls" in answer[2]
        assert "base model: 4 steps" in answer[4] and answer[5].count("<figure>") == 2
        refused = draw("", FOUR, "none", 0, 4, 1.0, 1.0, "", "0")
        assert "the prompt is empty" in str(refused[0])
        html = draw("<script>alert(1)</script>", FOUR, "none", 0, 4, 1.0, 1.0, "", "1")[5]
        assert html.count("<figure>") == 3 and "<script" not in html
        name = re.search(r'src="gradio_api/file=([^"]+)"', html)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/file={name}") as picture:
            assert picture.read() == Path(name).read_bytes()
    finally:
        page.close(verbose=False)
    time.sleep(0.1)
    gallery_page.check_page(port)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_a_click_in_chromium_draws_both_sides(gallery, tmp_path):
    """The extra `serve`, and websockets, which the browser is spoken to by."""
    pytest.importorskip("gradio")
    client = pytest.importorskip("websockets.sync.client")
    (tmp_path / "drawn").mkdir()
    port = free_port()
    page = gallery_page.start(gallery, port, str(tmp_path / "drawn"))
    words = [CHROMIUM, *QUIET, "--remote-debugging-port=0", f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{port}/"]
    browser = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        ports = tmp_path / "DevToolsActivePort"
        until(lambda: ports.exists() and ports.read_text().count("\n") > 0)
        listed = f"http://127.0.0.1:{ports.read_text().split()[0]}/json"
        tabs = lambda: [tab for tab in json.load(urllib.request.urlopen(listed)) if tab["type"] == "page"]
        until(tabs)
        with client.connect(tabs()[0]["webSocketDebuggerUrl"], max_size=None) as socket_:

            def ask(method, **parameters):
                socket_.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                while "id" not in (answer := json.loads(socket_.recv())):
                    pass
                return answer["result"].get("result", {}).get("value")

            evaluate = lambda script: ask("Runtime.evaluate", expression=script, returnByValue=True)
            until(lambda: evaluate("!!document.querySelector('textarea') && !!document.querySelector('button')"))
            evaluate("document.querySelector('textarea').focus()")
            ask("Input.insertText", text="a three")
            evaluate("[...document.querySelectorAll('button')].find((one) => one.textContent.trim() == 'Draw').click()")
            until(lambda: evaluate("document.querySelectorAll('figure').length") == 2)
            shown = evaluate("document.body.innerText")
            assert "a three (seed 0)" in shown and shown.count("network calls") >= 2
    finally:
        browser.kill()
        page.close(verbose=False)


def until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
