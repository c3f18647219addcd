"""An evaluation's report: a table in text and as the run's page shows it, a picture with seeds in columns."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from proreflow_jax.storage import atomic

LABEL, CELL, GAP = 190, 64, 4  # pixels: label column, one image, between images
LINE, LETTER = 22, 8  # pixels: a line of heads, and about the width of one letter
INK, PAPER = (20, 20, 20), (255, 255, 255)


def text_table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; columns maps a row's key to its heading. Floats are shown with three digits."""
    body = _cells(rows, columns)
    heads = list(columns.values())
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    aligned = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in [heads, *body]
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    lines = ["| " + " | ".join(line) + " |" for line in aligned]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def shown_table(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], better: Mapping[str, str], compared: Sequence[int]
) -> dict[str, Any]:
    """The same table for the run's page, as JSON.

    better: "less" or "more" of the columns that have a better end. compared: rows of which the best is marked.
    """
    ends = [better.get(key, "") for key in columns]
    return {"heads": list(columns.values()), "better": ends, "cells": _cells(rows, columns), "compared": list(compared)}


def _cells(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> list[list[str]]:
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    return [[cell(row.get(key, "")) for key in columns] for row in rows]


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
