"""Pictures that carry their story: what readers of A1111's and ComfyUI's kind find in any of them; grids and folders."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.run import pictures

DIGEST = "0123456789abcdef" * 4
STUDENT = {"prediction": "ddim_eps", "windows": 4, "path": "linear", "dtype": "float32", "tool": ["Euler", "Simple"]}
STORY = pictures.Story("a fox", "blurred", 2**64 - 1, 0, 4, 1.5, STUDENT, "owner/name@1a2b", DIGEST)
PROMPTS = [
    "a fox, red; \"quoted\" 'twice', 50% {braces} [brackets] (weights:1.2) \\ back",
    "two\nlines\r\nand\u2028a third\x85and\x0ba fourth",
    "Steps: 99, Sampler: Wrong, CFG scale: 30, Seed: 1, Size: 9x9, Model: other",
    "a fox\nSteps: 99, Sampler: Wrong, CFG scale: 30, Seed: 1",
    "a fox\nNegative prompt: wrong\nSteps: 99, Sampler: Wrong, CFG scale: 30",
    "Negative prompt: is what I want",
    "Ein Füchslein, 狐狸, ليس ثعلبا, \U0001f98a",
    "nul \x00 and \x1b[31m control",
    "<lora:other:1> " + "long " * 800,
    "",
    " ",
]


def picture(story: pictures.Story = STORY, shade: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return pictures.with_story(Image.new("RGB", size, (shade, 0, 255 - shade)), story)


def read_a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields, by the rules of its `parse_generation_parameters`."""
    field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    assert len(field.findall(last)) >= 3
    parts, now = {"prompt": [], "negative": []}, "prompt"
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            now, line = "negative", line[16:].strip()
        parts[now].append(line)
    return "\n".join(parts["prompt"]), "\n".join(parts["negative"]), dict(field.findall(last))


def read_comfyui(text: str) -> tuple[str, str, dict[str, str]]:
    """The same by the rules of its frontend's `importA1111`, which needs the line of the negative prompt."""
    at = text.rindex("\nSteps:")
    words = re.finditer(r"\s*([^:]+:\s*([^\"\{].*?|\".*?\"|\{.*?\}))\s*(,|$)", text[at:].split("\n")[1])
    pairs = [match[0].split(":") for match in words]
    before = text.rindex("\nNegative prompt:", 0, at)
    fields = {pair[0].strip().lower(): pair[1].removesuffix(",").strip() for pair in pairs}
    return text[:before].strip(), text[before + 18 : at].strip(), fields


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_no_prompt_breaks_the_story_nor_the_file(tmp_path, prompt):
    story = STORY._replace(prompt=prompt, negative=prompt, strength=0.5)
    (path,) = pictures.save_pictures([picture(story)], tmp_path / "x.png")
    with Image.open(path) as image:
        image.load()
        text, (record,) = image.text["parameters"], json.loads(image.text["proreflow_jax"])
    assert record["prompt"] == record["negative"] == prompt and record["seed"] == 2**64 - 1
    plain = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", prompt).split())
    shown = re.sub("^Negative prompt:", "Negative prompt :", plain)
    one, two, fields = read_a1111(text)
    assert (one, two) == (shown, plain)
    expected = {"Steps": "4", "Sampler": "Euler", "Schedule type": "Simple", "CFG scale": "1.5", "Seed": str(2**64 - 1)}
    expected |= {"Size": "32x32", "Model hash": DIGEST[:10], "Model": "owner/name@1a2b", "Denoising strength": "0.5"}
    assert fields | expected == fields
    one, two, lower = read_comfyui(text)
    assert (one, two) == (shown, plain)
    assert lower | {name.lower(): value for name, value in expected.items()} == lower


def test_a_models_name_cannot_break_the_story():
    story = STORY._replace(model='a", Steps: 9, {"x": 1}, Seed: 3\nSeed: 4')
    text = pictures.parameters(story, (8, 8))
    assert text.count("\n") == 2
    for fields in (read_a1111(text)[2], {name.capitalize(): value for name, value in read_comfyui(text)[2].items()}):
        assert (fields["Steps"], fields["Seed"]) == ("4", str(2**64 - 1))


def test_steps_that_no_tool_makes_are_not_called_by_a_tools_name():
    text = pictures.parameters(STORY._replace(sampler={"prediction": "velocity", "windows": 4, "path": "linear"}), (8, 8))
    assert "Sampler: windowed, Schedule type: Trailing" in text and "Windows: 4, Prediction: velocity" in text


def series(rows: int, columns: int) -> list[Image.Image]:
    numbers = [(row, column) for row in range(rows) for column in range(columns)]
    return [picture(STORY._replace(prompt=f"prompt {r}", picture=c), 40 * r + c) for r, c in numbers]


def test_a_grid_holds_all_pictures_and_all_stories(tmp_path):
    images = series(2, 3)
    (path,) = pictures.save_pictures(images, tmp_path / "grid.png")
    with Image.open(path) as sheet:
        pixels, stories = np.asarray(sheet), pictures.records(sheet)
        assert read_a1111(sheet.text["parameters"])[0] == "prompt 0"
    rows = np.asarray([np.asarray(image) for image in images]).reshape(2, 3, 32, 32, 3)
    np.testing.assert_array_equal(pixels, np.concatenate(np.concatenate(rows, axis=1), axis=1))
    assert [(one["prompt"], one["picture"]) for one in stories] == [(f"prompt {r}", c) for r in range(2) for c in range(3)]


def test_labels_stand_beside_the_pictures_and_change_none(tmp_path):
    plain, labelled = (pictures.grid(series(2, 3), 3, labels) for labels in (False, True))
    np.testing.assert_array_equal(np.asarray(labelled)[-64:, -96:], np.asarray(plain))
    margin = np.asarray(labelled)[-64:, : pictures.LEFT]
    assert (margin[:32] < 128).any() and (margin[32:] < 128).any() and (margin[:32] != margin[32:]).any()
    assert (np.asarray(labelled)[:-64, -96:] < 128).any()
    assert pictures.records(labelled) == pictures.records(plain)


def test_a_long_prompt_stays_in_its_margin():
    images = [picture(STORY._replace(prompt=word)) for word in ("w" * 400, "many words " * 40)]
    sheet = np.asarray(pictures.grid(images, 1, labels=True))
    assert (sheet[:, pictures.LEFT + 1 : pictures.LEFT + pictures.PAD] == 255).all()


def test_a_folder_gets_numbered_names_and_loses_nothing(tmp_path):
    folder = tmp_path / "new" / "v1.5"
    folder.mkdir(parents=True)
    names = [path.name for path in pictures.save_pictures(series(1, 2), folder)]
    names += [path.name for path in pictures.save_pictures(series(1, 2), f"{folder}/")]
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png"] == sorted(path.name for path in folder.iterdir())
    with Image.open(folder / "00003.png") as image:
        assert [one["picture"] for one in pictures.records(image)] == [1]


@pytest.mark.parametrize("out", ["a/b/x.png", "a/b", "a/b.c/"])
def test_missing_folders_are_made(tmp_path, out):
    for path in pictures.save_pictures(series(1, 2), f"{tmp_path}/{out}"):
        assert path.is_file()


@pytest.mark.parametrize(("out", "rule"), [("x.jpg", "must be a .png file, or a folder"), ("file/x.png", "can't be made")])
def test_a_place_that_cannot_be_is_refused(tmp_path, out, rule):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rule):
        pictures.save_pictures(series(1, 1), tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
