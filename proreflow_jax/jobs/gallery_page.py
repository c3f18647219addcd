"""The page of `serve`, by gradio (the extra `serve`): form, two pictures, history. What is drawn is decided in `gallery`.

Nothing goes to the network: no analytics, no share link, no fonts from elsewhere; the server listens on 127.0.0.1 alone.
"""

import html
import logging
import os
import socket
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

from proreflow_jax import UserError
from proreflow_jax.jobs.gallery import Answer, Ask, Gallery, caption
from proreflow_jax.run.pictures import save_pictures

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
FOLDER = "GRADIO_TEMP_DIR"  # names the folder of what the page shows
HISTORY = 60  # drawings that the page keeps
FILE = "gradio_api/file="  # what the page's address has before a file of FOLDER
NETWORK = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"}
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1100px !important; margin: auto}
.refusal, .refusal p {color: #c0392b; font-weight: 600}
.picture img {width: 100% !important; height: 100% !important; object-fit: contain}
.past {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 12px}
.past section {border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 8px; min-width: 0}
.past h4 {margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere}
.past section > div {display: grid; grid-template-columns: 1fr 1fr; gap: 8px}
.past figure {margin: 0; min-width: 0}
.past img {width: 100%; display: block}
.past figcaption {font-size: 0.8em; overflow-wrap: anywhere}
"""
ABOUT = "The same noise and prompt on both sides. Seconds are of this machine; the first picture of a kind compiles."


def check_page(port: int) -> None:
    """Raises UserError, one line, if gradio is missing or the port is taken."""
    if "gradio" not in sys.modules and find_spec("gradio") is None:
        raise UserError("serve needs gradio: pip install gradio (the extra `serve`)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port={port} of {HOST} cannot be had ({error.strerror}): name another port") from None


def show(gallery: Gallery, port: int) -> None:
    """Serves the page until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="proreflow-serve-") as folder:  # of pictures; gradio's own stay for ever
        page = start(gallery, port, folder)
        log.info("%s: http://%s:%d   (Ctrl-C ends it)", gallery.name, HOST, port)
        try:
            while True:
                time.sleep(0.5)
        except KeyboardInterrupt:
            log.info("the page is closed")
        finally:
            page.server.force_exit = True  # a browser's open connection would hold the end for seconds
            page.close(verbose=False)


def start(gallery: Gallery, port: int, folder: str) -> Any:
    """The page, served from threads of this process. folder: for the pictures that it shows."""
    os.environ.update(NETWORK | {FOLDER: folder})
    import gradio as gr

    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    page = make_page(gr, gallery)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts)
    page.queue(default_concurrency_limit=1, api_open=False)
    page.launch(
        server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, theme=theme, css=CSS, footer_links=[],
    )  # fmt: skip
    return page


def make_page(gr: Any, gallery: Gallery) -> Any:
    """The form and its answers."""
    with gr.Blocks(title=f"{gallery.name}: proreflow", analytics_enabled=False) as page:
        gr.Markdown(f"## {gallery.name.replace('_', ' ')}\n{ABOUT}")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", lines=2, scale=4, autofocus=True, placeholder="what to draw")
            button = gr.Button("Draw", variant="primary", scale=1, min_width=120)
        with gr.Row():
            student = _choices(gr, gallery, "Student", gallery.students[0])
            steps = gr.Number(0, label="Steps", info="0: as many as windows", precision=0, min_width=140)
            guidance = gr.Number(1.0, label="Guidance scale", info="1: none", min_width=140)
            seed = gr.Textbox("0", label="Seed", max_lines=1, min_width=140, info="of the noise")
        with gr.Row():
            teacher = _choices(gr, gallery, "Teacher", gallery.teacher, none="none")
            teacher_steps = gr.Number(0, label="Steps", info="0: 50", precision=0, min_width=140)
            teacher_guidance = gr.Number(1.0, label="Guidance scale", info="1: none", min_width=140)
            negative = gr.Textbox("", label="Negative prompt", info="where guidance is not 1", max_lines=1, min_width=140)
        refusal = gr.Markdown(visible=False, elem_classes="refusal")
        with gr.Row():
            right = _picture(gr, "Student")
            left = _picture(gr, "Teacher")
        history, past = gr.HTML(""), gr.State([])
        inputs = [prompt, student, teacher, steps, teacher_steps, guidance, teacher_guidance, negative, seed]
        outputs = [refusal, *right, *left, history, past]

        def draw(*values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008  # gradio looks for it there
            ask = Ask(*values[:-1])._replace(teacher="" if values[2] == "none" else values[2])
            report = lambda step, steps, label: progress((step, steps), desc=label)
            return _updates(gr, gallery.draw(ask, report), ask, values[-1])

        for event in (button.click, prompt.submit):
            event(draw, [*inputs, past], outputs, api_name="draw" if event == button.click else False)
        page.load(lambda: _renewed(gr, gallery), None, [student, teacher], api_name=False)
    return page


def _choices(gr: Any, gallery: Gallery, label: str, value: str, none: str = "") -> Any:
    names = [*gallery.students, *([none] if none else [])]
    return gr.Dropdown(names, value=value or none, label=label, min_width=220, filterable=False, scale=2)


def _renewed(gr: Any, gallery: Gallery) -> list[Any]:
    """The choices when the page is loaded: a run may have gone on."""
    gallery.refresh()
    return [gr.update(choices=gallery.students), gr.update(choices=[*gallery.students, "none"])]


def _picture(gr: Any, label: str) -> list[Any]:
    """A picture and the line below it."""
    with gr.Column(min_width=280):
        image = gr.Image(
            label=label,
            type="pil",
            format="png",
            height=360,
            interactive=False,
            elem_classes="picture",
            buttons=["download", "fullscreen"],
        )
        return [image, gr.Markdown("")]


def _updates(gr: Any, answer: Answer, ask: Ask, past: list[str]) -> list[Any]:
    """What the answer changes on the page; a refusal leaves the pictures as they are.

    past: the drawings that the page has, each as HTML, the newest first.
    """
    if answer.refusal:
        return [gr.update(value=_text(answer.refusal), visible=True), *[gr.update()] * 5, past]
    figures, sides = "", []
    for one in (answer.student, answer.teacher):
        if one is None:
            sides += [None, ""]
            continue
        file = str(save_pictures(one.image, f"{os.environ[FOLDER]}/drawings/")[0])
        sides += [file, _text(one.words())]
        words = html.escape(one.words())
        figures += f'<figure><img src="{FILE}{html.escape(file)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    section = f"<section><h4>{html.escape(caption(ask))}</h4><div>{figures}</div></section>"
    past = [section, *past][:HISTORY]
    return [gr.update(value="", visible=False), *sides, f'<h3>History</h3><div class="past">{"".join(past)}</div>', past]


def _text(text: str) -> str:
    """A line in which nothing is Markdown."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+!|~$&" else sign for sign in text)
