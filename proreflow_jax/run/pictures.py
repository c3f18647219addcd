"""Pictures as files that carry their story: what was asked for, and of which model; single files, and grids with labels.

Two texts go into a PNG. "parameters" is the form of A1111, which ComfyUI and other readers of pictures know too.
"proreflow_jax" is JSON, exact and complete, a list with one record a picture. There is no ComfyUI workflow: none was run, and
without one ComfyUI builds its own from "parameters".
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from proreflow_jax import UserError
from proreflow_jax.storage import atomic, paths
from proreflow_jax.storage.paths import Location

PARAMETERS, RECORDS = "parameters", "proreflow_jax"  # keys of a PNG's texts
HALVES = "proreflow_jax_samples"  # key of a stage's pictures: JSON of how both halves were drawn
NEGATIVE = "Negative prompt:"  # begins the second line of A1111's form
HASH_DIGITS = 10  # of a model's digest in A1111's form
DIGITS, LARGEST_NAME = 5, re.compile(r"(\d{5,9})\.png")  # of numbered names
FONT_SIZE, PAD, LEFT = 12, 4, 140  # pixels: of labels; between label and picture; the width of the prompts' column


class Story(NamedTuple):
    """How a picture was made."""

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    picture: int = 0  # its number among those of one prompt and seed, from 0: the noise is drawn for all of them at once
    steps: int = 0
    guidance: float = 1.0
    sampler: dict[str, Any] = {}  # prediction, windows and path of a student; prediction and solver of a diffusion model; dtype
    model: str = ""
    digest: str = ""  # of the weights
    strength: float | None = None  # of image-to-image


def with_story(image: Image.Image, story: Story) -> Image.Image:
    """The image, its `info` with the texts that its PNG will have."""
    record = {name: value for name, value in story._asdict().items() if value is not None}
    record |= {"width": image.width, "height": image.height}
    image.info |= {PARAMETERS: parameters(story, image.size), RECORDS: json.dumps([record])}
    return image


def parameters(story: Story, size: tuple[int, int]) -> str:
    """The story in the form of A1111: prompt, negative prompt, then one line of `name: value`.

    Prompts stand on one line each. A prompt that begins with "Negative prompt:" would be taken for one: a blank goes before its
    colon, which is nothing to CLIP. Values of the last line are plain words, without commas and quotes.
    """
    flow = story.sampler
    sampler, schedule = flow.get("tool") or (_plain(flow.get("solver", "windowed")), "Trailing")
    prompt = _one_line(story.prompt)
    if prompt.startswith(NEGATIVE):
        prompt = NEGATIVE[:-1] + " :" + prompt.removeprefix(NEGATIVE)
    fields = {
        "Steps": story.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{story.guidance:g}",
        "Seed": story.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": story.digest[:HASH_DIGITS],
        "Model": _plain(story.model),
        "Denoising strength": None if story.strength is None else f"{story.strength:g}",
        "Windows": flow.get("windows"),
        "Prediction": flow.get("prediction"),
        "Picture of seed": story.picture,
        "Drawn by": "proreflow_jax",
    }
    line = ", ".join(f"{name}: {value}" for name, value in fields.items() if value not in (None, ""))
    return f"{prompt}\n{NEGATIVE} {_one_line(story.negative)}\n{line}"


def _one_line(text: str) -> str:
    """White space and control characters of any kind become one blank."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text).split())


def _plain(text: str) -> str:
    return re.sub(r"[^\w.@/+ -]", "_", _one_line(text))


def records(image: Image.Image) -> list[dict[str, Any]]:
    """The stories of an image or a grid, one record a picture; [] of an image that has none."""
    try:
        value = json.loads(image.info.get(RECORDS, "[]"))
    except (TypeError, ValueError):
        return []
    return value if isinstance(value, list) else []


def grid(images: Sequence[Image.Image], columns: int, labels: bool = False) -> Image.Image:
    """The pictures in rows of `columns`, with all their stories. labels: prompts beside the rows, seeds above the columns."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    stories = [record for image in images for record in records(image)]
    labels = labels and len(stories) == len(images)
    left, top = (LEFT + PAD, FONT_SIZE + 2 * PAD) if labels else (0, 0)
    sheet = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (left + i % columns * width, top + i // columns * height))
    if labels:
        _label(sheet, stories, columns, (left, top, width, height))
    first = {PARAMETERS: images[0].info[PARAMETERS]} if PARAMETERS in images[0].info else {}
    sheet.info |= first | ({RECORDS: json.dumps(stories)} if stories else {})
    return sheet


def _label(sheet: Image.Image, stories: Sequence[dict[str, Any]], columns: int, sizes: tuple[int, int, int, int]) -> None:
    """The seed above the columns, with the picture's number if it fits; each row's prompt beside it."""
    left, top, width, height = sizes
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for j in range(columns):
        story = stories[j]
        names = (f"seed {story['seed']} / {story['picture']}", f"{story['seed']}/{story['picture']}", str(story["picture"]))
        text = next((name for name in names if pen.textlength(name, font) <= width - PAD), names[-1])
        pen.text((left + j * width + width // 2, PAD), text, "black", font, anchor="ma")
    for row, i in enumerate(range(0, len(stories), columns)):
        lines = _wrapped(pen, font, _one_line(stories[i]["prompt"]), max(height // (FONT_SIZE + 2), 1))
        pen.multiline_text((LEFT, top + row * height + height // 2), "\n".join(lines), "black", font, anchor="rm", spacing=2)


def _wrapped(pen: ImageDraw.ImageDraw, font: Any, text: str, count: int) -> list[str]:
    """At most `count` lines of LEFT pixels; three dots where the text is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= LEFT - PAD or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown, cut = lines[:count], len(lines) > count
    for i, line in enumerate(shown):
        dots = "..." if cut and i == count - 1 else ""
        while line and pen.textlength(line + dots, font) > LEFT - PAD:
            line, dots = line[:-1], "..."
        shown[i] = line + dots
    return shown


def save_pictures(
    images: Image.Image | Sequence[Image.Image], out: str | Path, *, columns: int = 0, labels: bool = False, flag: str = "out"
) -> list[Location]:
    """Writes pictures with their stories: a grid into a .png file, or single files with numbered names into a folder.

    Args:
      images: of `ImageModel`, or any PIL images.
      out: a path that ends in .png, local or gs://; or a folder. Folders are made when they are missing.
      columns: of the grid; 0: the pictures of one prompt, by their stories.
      labels: prompts beside the rows of a grid, seeds above its columns.
      flag: of `out`, for messages.

    Returns the files that were written. In a folder numbers go on after the highest that is there; nothing is replaced.
    Raises UserError, one line, for a path that cannot be.
    """
    images, single = ([images], True) if isinstance(images, Image.Image) else (list(images), False)
    if not images:
        raise UserError("there are no pictures to save")
    place, folder = parse_out(out, flag)
    if folder:
        return _numbered(images, place)
    several = columns or max((record["picture"] + 1 for image in images for record in records(image)), default=len(images))
    whole = images[0] if single and not labels else grid(images, min(several, len(images)), labels)
    with atomic.drafted(place) as draft:
        _write(whole, draft)
    return [place]


def parse_out(out: str | Path, flag: str = "out") -> tuple[Location, bool]:
    """(path, whether it is a folder), the folder of the file or the folder itself made when it is missing.

    Raises UserError, one line, if the path is neither a .png file nor a folder, or if the folder cannot be made.
    """
    place = paths.parse_path(out, flag)
    folder = place.is_dir() or str(out).endswith("/") or not place.suffix
    if not folder and place.suffix.lower() != ".png":
        raise UserError(f"{flag}={out} must be a .png file, or a folder (end it with /) for single pictures")
    paths.make_folder(place if folder else place.parent, f"{flag}={out}")
    return place, folder


def _numbered(images: Sequence[Image.Image], folder: Location) -> list[Location]:
    names = [LARGEST_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    first = max((int(name[1]) + 1 for name in names if name), default=0)
    places = [folder / f"{first + i:0{DIGITS}}.png" for i in range(len(images))]
    for image, place in zip(images, places, strict=True):
        with atomic.drafted(place, replace=False) as draft:
            _write(image, draft)
    return places


def _write(image: Image.Image, path: Path) -> None:
    info = PngInfo()
    for name in (PARAMETERS, RECORDS):
        if isinstance(text := image.info.get(name), str):
            info.add_text(name, text)
    image.save(path, "PNG", pnginfo=info)
