"""An evaluation's report: a table in text, a picture with seeds in columns, an HTML page."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from proreflow_jax.storage import atomic

LABEL, CELL, GAP = 190, 64, 4  # pixels: label column, one image, between images
LINE, LETTER = 22, 8  # pixels: a line of heads, and about the width of one letter
INK, PAPER = (20, 20, 20), (255, 255, 255)
STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:62em;padding:0 1em}td,th{padding:.3em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}img{max-width:100%}"
)


def text_table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; columns maps a row's key to its heading. Floats are shown with three digits."""
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    body = [[cell(row.get(key, "")) for key in columns] for row in rows]
    heads = list(columns.values())
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    aligned = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in [heads, *body]
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    lines = ["| " + " | ".join(line) + " |" for line in aligned]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def picture(
    path: Path, rows: Sequence[tuple[str, UInt8[np.ndarray, "n h w 3"]]], heads: Sequence[str], cell: int = CELL
) -> None:
    """Writes a PNG: one labelled row of images per method, the same seed and prompt in each column.

    cell: pixels a side of one image. Heads are broken into lines of a cell's width.
    """
    columns = len(heads)
    lines = ["\n".join(textwrap.wrap(head, max(cell // LETTER, 1))) for head in heads]
    font, top = ImageFont.load_default(13), LINE * max(1 + text.count("\n") for text in ["", *lines])
    step = cell + GAP
    canvas = Image.new("RGB", (LABEL + columns * step, top + len(rows) * step), PAPER)
    draw = ImageDraw.Draw(canvas)
    for j, head in enumerate(lines):
        draw.multiline_text((LABEL + j * step + cell // 2, top // 2), head, INK, font, anchor="mm", align="center")
    for i, (label, images) in enumerate(rows):
        y = top + i * step
        draw.text((8, y + cell // 2), label, INK, font, anchor="lm")
        for j, image in enumerate(images[:columns]):
            canvas.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.BICUBIC), (LABEL + j * step, y))
    with atomic.drafted(path) as draft:
        canvas.save(draft, "PNG")


def report_page(
    path: Path, title: str, notes: Sequence[str], rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], image: str
) -> None:
    """Writes the same table and picture as one HTML page; `image` is a file beside it."""
    cell = lambda value: html.escape(f"{value:.3g}" if isinstance(value, float) else str(value))
    head = "".join(f"<th>{html.escape(text)}</th>" for text in columns.values())
    body = "".join("<tr>" + "".join(f"<td>{cell(row.get(key, ''))}</td>" for key in columns) + "</tr>" for row in rows)
    text = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    atomic.write_text(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{text}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f'<p><img src="{html.escape(image)}" alt="samples: one row a method, one seed a column"></p></html>\n',
    )
