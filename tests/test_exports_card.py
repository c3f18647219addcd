"""The card of an export: its header for the hub, lines that run as written, pictures and numbers of this very student."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from verb import run, tiny_flags

from configs.digits import get_config as digits
from configs.emoji import get_config as emoji
from configs.sd15 import get_config as sd15
from proreflow_jax.data import emoji_packages
from proreflow_jax.data.credits import credit_lines
from proreflow_jax.exports import card_pictures
from proreflow_jax.exports.card_base import read_licence
from proreflow_jax.exports.card_page import card_page
from proreflow_jax.exports.card_use import example_prompt, own_prompts
from proreflow_jax.exports.card_words import plain_words
from proreflow_jax.run.pictures import HALVES
from proreflow_jax.storage import sealed
from proreflow_jax.storage.atomic import read_json, write_json

pytestmark = pytest.mark.usefixtures("quick")
FORMS = ("diffusers", "single-file", "lora", "delta")
HOSTILE = '---\nlicense: mit\n"```\n<script>alert(1)</script> | [a](b) \u2028\ud800 $x$ # {{x}} \x1b[31m'


def parts(page: str) -> tuple[dict, str]:
    """(header, the rest) as the hub takes them apart."""
    match = re.match(r"---\n(.*?)\n---\n", page, re.DOTALL)
    return yaml.safe_load(match[1]), page[match.end() :]


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's base model, with a page that names its licence."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("base") / "tiny base"))
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def export(request: pytest.FixtureRequest, chain: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 4-window student of the chain in each form."""
    out = tmp_path_factory.mktemp("export") / request.param
    ended = run("export", *tiny_flags(chain, base), "--stage=4", f"--form={request.param}", f"--out={out}")
    assert ended.code == 0, ended.err
    return out


def test_the_header_is_that_of_the_form(export):
    header, page = parts((export / "README.md").read_text())
    form = read_json(export / "reflow.json")["format"]["form"]
    assert header["license"] == "creativeml-openrail-m" and header["pipeline_tag"] == "text-to-image"
    assert header["library_name"] == ("proreflow_jax" if form == "delta" else "diffusers")
    assert {"text-to-image", "stable-diffusion", "proreflow", "4-step"} <= set(header["tags"])
    assert (form in header["tags"]) == (form in ("lora", "delta"))
    assert "base_model" not in header  # the hub takes ids alone, and this is a folder
    assert "## Pictures" not in page and "## Numbers" not in page and "samples.png" not in page  # the run has none
    assert ("ComfyUI: file into" in page) == (form in ("single-file", "lora"))


@pytest.mark.parametrize(("form", "relation"), [("diffusers", "finetune"), ("lora", "adapter"), ("delta", "adapter")])
def test_a_base_model_of_the_hub_stands_in_the_header(chain, form, relation):
    card = read_json(chain / "runs" / "tiny" / "export" / "stage-4" / "reflow.json")
    card["format"]["form"], card["about"]["base_model"], card["about"]["family"] = form, "me/base", "xl"
    header, page = parts(card_page(card))
    assert header["base_model"] == "me/base" and header["base_model_relation"] == relation
    assert "stable-diffusion-xl" in header["tags"]
    merged = card | {"merged": {"delta": "0", "base": "b", "scale": 1.0}, "about": card["about"] | {"delta_base_model": "a/b"}}
    assert parts(card_page(merged))[0]["base_model"] == ["me/base", "a/b"]


def test_the_lines_of_the_card_draw_a_picture(export, base, tmp_path, monkeypatch):
    """In the export's folder, where the base model lies under the name that the card has."""
    here = Path(shutil.copytree(export, tmp_path / "export"))
    shutil.copytree(base, here / base.name)
    monkeypatch.chdir(here)
    language, code = re.search(r"```(python|bash)\n(.*?)```", (export / "README.md").read_text(), re.DOTALL).groups()
    if language == "python":
        assert len([line for line in code.splitlines() if line and not line.startswith("from ")]) <= 4
        exec(compile(code, "README.md", "exec"), {})
        assert Image.open(here / "picture.png").size == (8, 8)
        return
    words = re.findall(r"--[\w.]+='[^']*'|\S+", code)
    assert words[:2] == ["proreflow", "merge"]
    ended = run("merge", *(word.replace("'", "") for word in words[2:]))
    assert ended.code == 0, ended.err
    header, page = parts((tmp_path / "merged" / "README.md").read_text())
    assert header["license"] == "creativeml-openrail-m" and "merged onto another model" in page


def test_words_of_others_stay_words(chain):
    """A model's name, a prompt and a licence that try to be more."""
    card = read_json(chain / "runs" / "tiny" / "export" / "stage-4" / "reflow.json")
    plain = parts(card_page(card))[0]
    half = {"steps": 8, "guidance": 1.0}
    pictures = {"prompts": [HOSTILE], "count": 1, "left": half, "right": half, "step": 6, "windows": 4}
    hostile = {"prompt": HOSTILE, "opens": HOSTILE, "configs": HOSTILE, "pictures": pictures}
    for form in FORMS:
        card["base"], card["numbers"] = HOSTILE, [HOSTILE]
        card["about"] |= hostile
        card["format"]["form"] = form
        text = card_page(card)
        text.encode("utf-8")
        header, page = parts(text)
        assert form != "diffusers" or header == plain
        assert "license" not in header and text.count("\n---\n") == 1 and len(re.findall(r"^```", page, re.MULTILINE)) == 2
        code = re.search(r"^```(python|bash)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        assert not re.search(r"(?<!\\)<script", page.replace(code[0], ""))
        if code[1] == "python":
            compile(code[2], "README.md", "exec")


@pytest.mark.parametrize(
    ("page", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: my\nlicense_link: https://a.b/c\n---\n", None),
        ("---\nlicense: 'mit\\nlibrary_name: evil'\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        ("---\nlicense: {a: &a [*a]}\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# license: mit\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_a_licence_is_taken_if_it_is_one(tmp_path, page, licence):
    (tmp_path / "README.md").write_text(page)
    every = {"license": "other", "license_name": "my", "license_link": "https://a.b/c"}
    assert read_licence(tmp_path) == (every if licence is None else licence)


def test_a_licence_file_is_named_where_no_page_names_one(tmp_path):
    assert read_licence(tmp_path) == {}
    (tmp_path / "LICENSE.md").write_text("be kind")
    assert read_licence(tmp_path)["license_link"] == "LICENSE.md"


def test_plain_words_are_one_line_of_text():
    assert plain_words("a\nb\u2028c *x* | `y`") == r"a b c \*x\* \| \`y\`" and len(plain_words("x" * 5000)) == 200


def test_credits_are_those_of_the_data_that_is_known():
    table = emoji_packages.credits_table()
    assert credit_lines(["prompts"]) == [] and "UCI" in credit_lines(["digits"])[0]
    assert table in credit_lines(["prompts"], f"# Emoji\n\n{table}\n") and "Twitter" in table
    assert table in credit_lines(["emoji"])


# Pictures.


def draw_halves(place: Path, step: int, windows: int) -> None:
    """A picture as a stage keeps it."""
    half = {"steps": 8, "guidance": 1.5}
    about = {"prompts": ["a three"], "count": 2, "left": half, "right": half | {"taken": 4}, "step": step, "windows": windows}
    info = PngInfo()
    info.add_text(HALVES, json.dumps(about))
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(16 * 36 * 3, dtype=np.uint8).reshape(16, 36, 3)).save(place, pnginfo=info)


@pytest.fixture
def pictured(chain: Path, tmp_path: Path) -> Path:
    """A copy of the chain whose run has a picture of its finished 4-window student, and its exports not yet."""
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    step = read_json(copy / "runs" / "tiny" / "stage-4" / "DONE.json")["step"]
    draw_halves(copy / "runs" / "tiny" / "stage-4" / "samples" / f"step-{step:08d}.png", step, 4)
    shutil.rmtree(copy / "runs" / "tiny" / "export" / "stage-4")
    return copy


def test_an_export_has_the_pictures_of_its_student_and_gets_them_back(pictured, model):
    words, out = [*tiny_flags(pictured, model), "--stage=4"], pictured / "runs" / "tiny" / "export" / "stage-4"
    assert run("export", *words).code == 0
    record, page = sealed.read_record(out), (out / "README.md").read_text()
    assert set(record["files"]) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"reflow.json"}
    picture = (out / card_pictures.FILE).read_bytes()
    assert Image.open(out / card_pictures.FILE).size == (504, 224)  # 14 times as large
    assert "samples.png" in page and "8 steps, guidance scale 1.5" in page and "1. a three" in page
    assert run("export", *words).err.count("is there") == 1
    (out / card_pictures.FILE).unlink()
    ended = run("export", *words)
    assert ended.code == 0 and "samples.png is missing: written anew" in ended.err
    assert (out / card_pictures.FILE).read_bytes() == picture


@pytest.mark.parametrize("fault", ["of another step", "without a word", "no picture"])
def test_a_picture_of_something_else_is_left_out(pictured, model, fault):
    (place,) = (pictured / "runs" / "tiny" / "stage-4" / "samples").iterdir()
    if fault == "of another step":
        draw_halves(place, 2, 4)
    elif fault == "without a word":
        Image.new("RGB", (8, 8)).save(place)
    else:
        place.write_bytes(place.read_bytes()[:100])
    ended = run("export", *tiny_flags(pictured, model), "--stage=4")
    assert ended.code == 0 and "the export goes without" in ended.err
    assert not (pictured / "runs" / "tiny" / "export" / "stage-4" / "samples.png").exists()


# Numbers.


def test_numbers_come_onto_the_card_by_the_digest_of_the_weights(chain, model, tmp_path):
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    run_folder = copy / "runs" / "tiny"
    out, words = run_folder / "export" / "stage-4", [*tiny_flags(copy, model), "--stage=4"]
    digest = read_json(out / "reflow.json")["digest"]
    rows = [{"digest": "0" * 16, "statement": "of another: 1.0"}, {"method": "of before there were digests", "distance": 1.0}]
    write_json(run_folder / "table.json", {"rows": rows})
    assert run("export", *words).code == 0
    assert "numbers" not in read_json(out / "reflow.json") and "## Numbers" not in (out / "README.md").read_text()
    write_json(run_folder / "table.json", {"rows": [*rows, {"digest": digest, "statement": "distance 0.5 | n = 1"}]})
    assert "its card has the numbers" in run("export", *words).err
    page = (out / "README.md").read_text()
    assert r"- distance 0.5 \| n = 1" in page and "of another" not in page
    assert sealed.damage(out, sealed.read_record(out)) == "" and "its card" not in run("export", *words).err
    for form, carried in (("single-file", True), ("lora", False), ("delta", False)):
        assert run("export", *words, f"--form={form}", f"--out={tmp_path / form}").code == 0
        assert ("## Numbers" in (tmp_path / form / "README.md").read_text()) == carried


def test_a_page_that_its_owner_edited_stays(chain, model, tmp_path):
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    out = copy / "runs" / "tiny" / "export" / "stage-4"
    (out / "README.md").write_text("mine")
    row = {"digest": read_json(out / "reflow.json")["digest"], "statement": "distance 0.5"}
    write_json(copy / "runs" / "tiny" / "table.json", {"rows": [row]})
    ended = run("export", *tiny_flags(copy, model), "--stage=4")
    assert ended.code == 0 and "was edited" in ended.err and (out / "README.md").read_text() == "mine"
    assert read_json(out / "reflow.json")["numbers"] == ["distance 0.5"]


def test_an_export_of_before_is_left_as_it_is(chain, model, tmp_path):
    """Without what the card says since."""
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    out = copy / "runs" / "tiny" / "export" / "stage-4"
    record = sealed.read_record(out)
    del record["about"]
    sealed.write_record(out, record)
    before = (out / "reflow.json").read_bytes()
    ended = run("export", *tiny_flags(copy, model), "--stage=4")
    assert ended.code == 0 and "is there" in ended.err and (out / "reflow.json").read_bytes() == before
    header, page = parts(card_page(record))
    assert header["library_name"] == "diffusers" and "num_inference_steps=4" in page
    again = [*tiny_flags(tmp_path, out), "--stage=0", "--count=1", f"--out={tmp_path / 'x.png'}"]
    assert run("sample", *again).code == 0


def test_the_card_s_example_is_a_prompt_of_the_run_s_own_config():
    shown = {config.__module__: example_prompt(own_prompts(config()), False) for config in (digits, emoji, sd15)}
    assert shown["configs.emoji"] == "an octopus, fluent 3d style" and shown["configs.digits"] == "a handwritten zero"
    assert shown["configs.sd15"] == "a red fox in the snow"
