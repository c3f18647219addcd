"""samples.png of an export: what this very student draws beside the base model, as the run drew it when the stage ended.

Nothing is drawn for an export. A run whose config.samples names prompts has a picture of every finished student.
"""

import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from proreflow_jax.exports.card_words import plain_words
from proreflow_jax.run.pictures import HALVES
from proreflow_jax.run.stages import Stage, read_done
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)
FILE = "samples.png"
WIDEST, NARROWEST = 1024, 512  # pixels: larger pictures are scaled down, small ones up by a whole number
FIELDS = ("prompts", "count", "left", "right", "step", "windows")  # of the picture's record, on the card


def copy_pictures(stage: Stage, draft: Path) -> dict[str, Any]:
    """Writes samples.png into a draft and returns how it was drawn; {} if the run has no picture of the finished student."""
    done = read_done(stage)
    place = stage.picture(done.step)
    if not place.is_file():
        return {}
    try:
        with Image.open(paths.local_copy(place)) as file:
            record = json.loads(file.info[HALVES])
            record, image = {name: record[name] for name in FIELDS}, file.convert("RGB")
    except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:  # the last: PIL's of a broken PNG
        log.info("%s is damaged, or does not say how it was drawn (%s): the export goes without", place, type(error).__name__)
        return {}
    if (record["step"], record["windows"]) != (done.step, stage.windows):
        log.info("%s is of another step: the export goes without", place)
        return {}
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    elif (times := NARROWEST // image.width) > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.save(draft / FILE, "PNG", optimize=True)
    return record


def picture_lines(card: dict[str, Any]) -> list[str]:
    """The picture on the page, and how it was drawn; [] of a card without one."""
    if not (record := card.get("about", {}).get("pictures")):
        return []
    left, right, count = record["left"], record["right"], record["count"]
    half = lambda side, steps: f"{steps} steps, guidance scale {float(side['guidance']):g}"
    student = "this student"
    if "error" in card.get("lora", {}):
        student = "the whole student, which this LoRA approximates"
    elif card["format"]["form"] == "delta":
        student = "the student, base and delta together"
    elif card["format"]["form"] == "lora":
        student = "the student, base and LoRA together"
    rows = [f"{i}. {plain_words(prompt)}" for i, prompt in enumerate(record["prompts"], 1)]
    steps = max(int(right.get("taken", record["windows"])), record["windows"])
    return [
        "## Pictures",
        "",
        f"![left the base model, right the student]({FILE})",
        "",
        f"Left the base model ({half(left, int(left['steps']))}), right {student} ({half(right, steps)}), "
        f"{count} fixed noise{'s' if count > 1 else ''} from left to right, the same on both sides. Drawn by proreflow_jax "
        f"at step {int(record['step'])} of the training, which the export holds; not chosen by eye. Rows:",
        "",
        *rows,
        "",
    ]
