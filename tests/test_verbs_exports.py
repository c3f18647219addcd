"""Exports: what they may replace and take along, what is noticed when they are read, what their cards say."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from fake_hub import TOKEN, FakeHub, connect
from PIL import Image
from safetensors.numpy import load_file, save_file
from verb import CONFIG, run, tiny_config, tiny_flags

from proreflow_jax import UserError
from proreflow_jax.exports.formats import FILES, denoiser_file
from proreflow_jax.run.find_model import find_base_model
from proreflow_jax.run.open import open_experiment
from proreflow_jax.storage import sealed
from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.usefixtures("quick")
UNET_FILE = denoiser_file("unet")
SECRET = "hf_never_to_be_copied"


@pytest.fixture(scope="module")
def student(chain: Path) -> Path:
    """The export of the 4-window student."""
    return chain / "runs" / "tiny" / "export" / "stage-4"


@pytest.fixture(scope="module")
def delta(chain: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its delta."""
    folder = tmp_path_factory.mktemp("delta") / "delta"
    ended = run("export", *tiny_flags(chain, model), "--stage=4", "--form=delta", f"--out={folder}")
    assert ended.code == 0, ended.err
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(ended: object, *needles: str) -> str:
    """The last line of a verb that refused in one line."""
    assert ended.code == 2, ended
    line = ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err and [needle for needle in needles if needle not in line] == [], line
    return line


def merge_words(model: Path, delta: Path, out: Path) -> list[str]:
    return [f"--config={CONFIG}", f"--config.model.path={model}", f"--delta={delta}", f"--out={out}"]


# What may be replaced.


def notes(folder: Path) -> Path:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("not of the program")
    return folder / "mine"


def own_picture(folder: Path, student: Path) -> Path:
    shutil.copytree(student, folder / "mine")
    (folder / "mine" / "seven.png").write_bytes(b"drawn by its user")
    return folder / "mine"


@pytest.mark.parametrize("form", ["notes", "base", "base's parent", "spare", "run", "runs", "stage", "picture", "file", "home"])
def test_overwrite_replaces_an_export_and_nothing_else(chain, model, student, tmp_path, monkeypatch, form):
    own = Path(shutil.copytree(model, tmp_path / "models" / "base"))
    home = Path(shutil.copytree(student, tmp_path / "home"))  # it looks like an export, and is somebody's home all the same
    monkeypatch.setenv("HOME", str(home))
    runs = chain / "runs"
    places = {"base": own, "base's parent": own.parent, "run": runs / "tiny", "runs": runs, "stage": runs / "tiny" / "stage-4"}
    places |= {"spare": Path(shutil.copytree(model, tmp_path / "spare")), "home": home}
    places |= {"notes": notes(tmp_path)} if form == "notes" else {}
    places |= {"picture": own_picture(tmp_path, student)} if form == "picture" else {}
    (tmp_path / "one.txt").write_text("a file")
    target = places.get(form, tmp_path / "one.txt")
    before, whole = contents(tmp_path), contents(runs)
    for flag in ((), ("--overwrite",)):
        ended = run("export", *tiny_flags(chain, own), "--stage=4", f"--out={target}", *flag)
        line = refused(ended, str(target))
        assert "pass --overwrite" not in line and "remove it" not in line
        assert contents(tmp_path) == before and contents(runs) == whole


def test_the_working_directory_is_never_replaced(chain, model, student, tmp_path, monkeypatch):
    here = Path(shutil.copytree(student, tmp_path / "here"))
    monkeypatch.chdir(here)
    for out in (".", here, tmp_path):
        refused(run("export", *tiny_flags(chain, model), "--stage=4", f"--out={out}", "--overwrite"), "working directory")
    assert (here / UNET_FILE).is_file()


def test_merge_replaces_an_export_and_nothing_else(model, delta, tmp_path):
    before = contents(delta)
    for target in (notes(tmp_path), model, delta, delta.parent):
        refused(run("merge", *merge_words(model, delta, target), "--overwrite"), str(target))
    assert contents(delta) == before and (tmp_path / "mine" / "notes.txt").is_file() and (model / UNET_FILE).is_file()


def test_an_empty_folder_and_an_export_are_replaced_also_through_a_link(chain, model, student, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [*tiny_flags(chain, model), "--stage=4", "--form=delta"]
    assert run("export", *words, f"--out={tmp_path / 'empty'}", "--overwrite").code == 0
    shutil.copytree(student, tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    line = refused(run("export", *words, f"--out={tmp_path / 'link'}"), "holds another export", "--overwrite")
    assert "format" in line or "windows" in line
    assert run("export", *words, f"--out={tmp_path / 'link'}", "--overwrite").code == 0
    assert (tmp_path / "link").is_symlink() and read_json(tmp_path / "other" / "reflow.json")["format"]["form"] == "delta"
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "other"]


# What is taken along from a stranger's model.


def link_out(folder: Path, secret: Path) -> None:
    (folder / "vae" / "notes.txt").symlink_to(secret)


def link_json(folder: Path, secret: Path) -> None:
    (folder / "vae" / "notes.json").symlink_to(secret)


def link_licence(folder: Path, secret: Path) -> None:
    (folder / "LICENSE").symlink_to(secret)


def link_page(folder: Path, secret: Path) -> None:
    secret.write_text(f"---\nlicense: other\nlicense_name: {SECRET}\n---\n")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(secret)


def link_config(folder: Path, secret: Path) -> None:
    shutil.copy(folder / "unet" / "config.json", secret)
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to(secret)


def link_component(folder: Path, secret: Path) -> None:
    (folder / "feature_extractor").symlink_to(secret.parent)
    secret.rename(secret.with_name("preprocessor_config.json"))
    index = read_json(folder / "model_index.json") | {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))


STRANGE = {"json": link_json, "licence": link_licence, "page": link_page, "config": link_config, "component": link_component}


@pytest.mark.parametrize("plant", STRANGE.values(), ids=STRANGE)
def test_a_link_out_of_the_models_folder_is_not_followed(chain, model, delta, tmp_path, plant):
    strange = Path(shutil.copytree(model, tmp_path / "strange"))
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "token"
    secret.write_text(SECRET)
    plant(strange, secret)
    verbs = {
        "distill": tiny_flags(tmp_path, strange),
        "merge": merge_words(strange, delta, tmp_path / "out"),
        "export": [*tiny_flags(chain, strange), "--stage=4", f"--out={tmp_path / 'out'}"],
    }
    for verb in verbs if plant is link_json else ("merge",):
        line = refused(run(verb, *verbs[verb]), "leads out of the model's folder")
        assert SECRET not in line and not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_only_named_kinds_of_files_are_taken_along(chain, model, delta, tmp_path):
    strange = Path(shutil.copytree(model, tmp_path / "strange"))
    (tmp_path / "token").write_text(SECRET)
    link_out(strange, tmp_path / "token")
    (strange / "vae" / "environ.txt").symlink_to("/proc/self/environ")
    (strange / "vae" / "module.py").write_text("import os")
    (strange / "vae" / ".env").write_text(SECRET)
    (strange / "vae" / "deep").mkdir()
    (strange / "vae" / "deep" / "config.json").write_text("{}")
    (strange / "LICENSE.md").symlink_to("vae/../model_index.json")  # a link that stays inside is a file
    for verb, words in {
        "export": [*tiny_flags(chain, strange), "--stage=4", f"--out={tmp_path / 'export'}"],
        "merge": merge_words(strange, delta, tmp_path / "merge"),
    }.items():
        ended = run(verb, *words)
        assert ended.code == 0, ended.err
        taken = contents(tmp_path / verb)
        assert set(taken) - {"reflow.json", "README.md"} == {*contents(model), "LICENSE.md"}
        assert not any(SECRET.encode() in data for data in taken.values())
        assert not any(path.is_symlink() for path in (tmp_path / verb).rglob("*"))


def test_a_snapshot_of_the_hub_is_taken_along_with_its_blobs(chain, model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123abc", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    words = [*tiny_flags(chain, snapshot), "--stage=4"]
    assert run("export", *words, f"--out={tmp_path / 'out'}").code == 0
    assert contents(model).keys() < contents(tmp_path / "out").keys()
    blobs.rename(tmp_path / "elsewhere")  # blobs that are a link lead anywhere
    blobs.symlink_to(tmp_path / "elsewhere")
    refused(run("export", *words, f"--out={tmp_path / 'again'}"), "leads out of the model's folder")


@pytest.mark.parametrize("name", ["../planted", "/tmp/planted", "..", ".", "a/b", "reflow.json", ""])
def test_a_component_has_a_plain_name(chain, model, delta, tmp_path, name):
    strange = Path(shutil.copytree(model, tmp_path / "models" / "strange"))
    (tmp_path / "models" / "planted").mkdir()
    (tmp_path / "models" / "planted" / "config.json").write_text("{}")
    index = read_json(strange / "model_index.json") | {name: ["diffusers", "Planted"]}
    (strange / "model_index.json").write_text(json.dumps(index))
    for verb, words in {
        "export": [*tiny_flags(chain, strange), "--stage=4", f"--out={tmp_path / 'exports' / 'out'}"],
        "merge": merge_words(strange, delta, tmp_path / "exports" / "out"),
    }.items():
        refused(run(verb, *words), "model_index.json", "component", repr(name))
        assert not (tmp_path / "exports").exists()


def test_a_component_whose_weights_are_a_pickle_is_left_out_and_named(chain, model, tmp_path):
    strange = Path(shutil.copytree(model, tmp_path / "strange"))
    (strange / "safety_checker").mkdir()
    (strange / "safety_checker" / "config.json").write_text("{}")
    (strange / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    index = read_json(strange / "model_index.json") | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (strange / "model_index.json").write_text(json.dumps(index))
    ended = run("export", *tiny_flags(chain, strange), "--stage=4", f"--out={tmp_path / 'out'}")
    assert ended.code == 0 and "safety_checker: left out" in ended.err
    assert read_json(tmp_path / "out" / "model_index.json")["safety_checker"] == [None, None]
    assert not (tmp_path / "out" / "safety_checker").exists()


# What is noticed when it is read.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def draw(path: Path, folder: Path, *words: str, **fields: object) -> object:
    return run("sample", *tiny_flags(folder, path, **fields), "--stage=0", "--count=2", f"--out={folder}/x.png", *words)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "no bytes": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", [str(UNET_FILE), "tokenizer/merges.txt"])
def test_a_damaged_export_is_not_read(student, model, tmp_path, name, damage):
    broken = Path(shutil.copytree(student, tmp_path / "broken"))
    damage(broken / name)
    refused(draw(broken, tmp_path), name, "reflow.json")


def test_a_damaged_delta_and_a_damaged_merge_are_not_read(delta, model, tmp_path):
    words = merge_words(model, delta, tmp_path / "merged")
    assert run("merge", *words).code == 0
    flip(tmp_path / "merged" / UNET_FILE)
    refused(draw(tmp_path / "merged", tmp_path), str(UNET_FILE), "reflow.json")
    broken = Path(shutil.copytree(delta, tmp_path / "broken"))
    flip(broken / FILES["delta"])
    refused(run("merge", *merge_words(model, broken, tmp_path / "again")), FILES["delta"], "reflow.json")
    assert not (tmp_path / "again").exists()


def test_a_damaged_export_is_not_sent_away(student, tmp_path):
    broken = Path(shutil.copytree(student, tmp_path / "broken"))
    flip(broken / UNET_FILE)
    refused(run("upload", f"--folder={broken}", "--repo=me/student"), str(UNET_FILE), "reflow.json")


def test_the_same_command_mends_a_damaged_export(chain, model, student, tmp_path):
    copy = Path(shutil.copytree(chain, tmp_path / "copy"))
    words = tiny_flags(copy, model)
    exported = copy / "runs" / "tiny" / "export" / "stage-4"
    whole = contents(student)
    for name in ("reflow.json", str(UNET_FILE)):
        (exported / name).write_bytes(b"")
        ended = run("export", *words, "--stage=4")
        assert ended.code == 0 and "written anew" in ended.err, (name, ended.err)
        assert contents(exported) == whole, name
    flip(exported / UNET_FILE)
    ended = run("distill", *words)
    assert ended.code == 0 and contents(exported) == whole and str(UNET_FILE) in ended.err
    ended = run("export", *words, "--stage=4")
    assert ended.code == 0 and "is there" in ended.err


def test_the_same_command_mends_a_damaged_merge(model, delta, tmp_path):
    out = tmp_path / "out"
    words = merge_words(model, delta, out)
    assert run("merge", *words).code == 0
    whole = contents(out)
    for name in ("reflow.json", str(UNET_FILE)):
        (out / name).write_bytes(b"")
        ended = run("merge", *words)
        assert ended.code == 0 and "written anew" in ended.err, (name, ended.err)
        assert contents(out) == whole, name
    ended = run("merge", *words)
    assert ended.code == 0 and f"{out}: is there" in ended.err
    refused(run("merge", *words, "--scale=0.5"), "holds another export", "--overwrite")
    assert contents(out) == whole
    assert run("merge", *words, "--scale=0.5", "--overwrite").code == 0 and contents(out) != whole


def test_the_record_of_an_export_lists_every_file_and_sees_it_damaged(student, tmp_path):
    record = sealed.read_record(student)
    whole = contents(student)
    assert set(record["files"]) == set(whole) - {"reflow.json"} and sealed.damage(student, record) == ""
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    for name in record["files"]:
        for damage in (lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
            (copy / name).write_bytes(damage(whole[name]))
            assert name in sealed.damage(copy, record) or name == "README.md" and (copy / name).stat().st_size
        (copy / name).unlink()
        assert sealed.damage(copy, record) == f"{name} is missing"
        (copy / name).write_bytes(whole[name])


def test_an_export_on_the_hub_is_the_same_student(student, tmp_path, monkeypatch):
    with FakeHub() as server:
        connect(monkeypatch, server.url, tmp_path / "home", token=TOKEN)
        server.add_folder("me/student", student)
        source = find_base_model(tiny_config(tmp_path, Path("me/student")))
        assert source.student["flow"] == {"prediction": "ddim_eps", "windows": 4, "path": "linear"}
        server.add_folder("me/broken", student)
        server.models["me/broken"].files[str(UNET_FILE)] = server.models["me/broken"].files[str(UNET_FILE)][:-4] + b"1234"
        with pytest.raises(UserError, match=f"{UNET_FILE} holds other bytes"):
            find_base_model(tiny_config(tmp_path, Path("me/broken")))


def test_weights_whose_header_lies_about_their_kind_are_refused(model, tmp_path):
    lying = Path(shutil.copytree(model, tmp_path / "lying"))
    tensors = load_file(lying / UNET_FILE)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].view(np.int32)
    save_file(tensors, lying / UNET_FILE)
    refused(draw(lying, tmp_path), "conv_in.weight", "I32")


@pytest.mark.parametrize("text", ["", "#version: 0.2\n"])
def test_a_tokenizer_without_its_merges_is_refused(model, tmp_path, text):
    empty = Path(shutil.copytree(model, tmp_path / "empty"))
    (empty / "tokenizer" / "merges.txt").write_text(text)
    refused(draw(empty, tmp_path), "merges.txt lacks 20 of 20 merges")


# What an export is when it is the base model.


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "x.png")).astype(int)


@pytest.mark.parametrize("scheduler", ["stock", pytest.param("windowed", marks=pytest.mark.slow)])
def test_an_export_is_sampled_as_the_student_that_it_is(chain, model, tmp_path, scheduler):
    out = tmp_path / "out"
    words = [*tiny_flags(chain, model), "--stage=4", f"--out={out}", f"--scheduler={scheduler}"]
    assert run("export", *words).code == 0
    ended = run("sample", *tiny_flags(chain, model), "--stage=4", "--steps=8", "--count=2", f"--out={tmp_path}/x.png")
    assert ended.code == 0, ended.err
    right = picture(tmp_path)
    assert draw(out, tmp_path, "--steps=8").code == 0
    np.testing.assert_array_equal(picture(tmp_path), right)
    ended = draw(out, tmp_path)
    assert ended.code == 0 and " 4 steps," in ended.err  # as many as windows
    refused(draw(out, tmp_path, "--steps=2"), "2")
    refused(draw(out, tmp_path, model__prediction_type="v_prediction"), "--config.model.prediction_type")


def test_the_student_that_comes_with_a_base_model_draws_where_the_run_has_none(student, model, tmp_path):
    mine = tmp_path / "mine.py"
    lines = ["from configs import digits", "", "", "def get_config():", "    c = digits.get_config()"]
    mine.write_text("\n".join([*lines, f"    c.model.student = {str(student)!r}", "    return c", ""]))
    words = [f"--config={mine}", *tiny_flags(tmp_path, model)[1:], "--count=2", f"--out={tmp_path}/x.png"]
    ended = run("sample", *words)
    assert ended.code == 0 and f"the student in {student} draws" in ended.err and " 4 steps," in ended.err, ended.err
    drawn = picture(tmp_path)
    assert draw(student, tmp_path).code == 0
    np.testing.assert_array_equal(picture(tmp_path), drawn)
    ended = run("sample", *words, "--stage=0", "--steps=2")
    assert ended.code == 0 and "the student in" not in ended.err, ended.err


WRONG = {
    "stages": ({"stages": "(4, 2)"}, "--config.stages=(4, 2)"),
    "prediction": ({"student__prediction": "velocity"}, "--config.student.prediction=ddim_eps"),
    "path": ({"student__path": "first_order"}, "--config.student.path=linear"),
    "guidance": ({"pairs__guidance": 2.0}, "--config.pairs.guidance=1"),
}


@pytest.mark.parametrize(("fields", "needle"), WRONG.values(), ids=WRONG)
def test_a_student_is_distilled_as_what_it_is_or_not_at_all(student, tmp_path, fields, needle):
    words = tiny_flags(tmp_path, student, **{"stages": "(2,)", "export__stages": "()"} | fields)
    refused(run("distill", *words), "is a student of 4 windows", needle)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_student_goes_on_where_its_run_has_stopped(chain, model, student, tmp_path):
    """Its second stage is that of the run that was not cut in two."""
    copy, short = Path(shutil.copytree(chain, tmp_path / "copy")), {"export__stages": "(2,)"}
    for name in ("stage-2", "export/stage-2"):
        shutil.rmtree(copy / "runs" / "tiny" / name)
    for words in (tiny_flags(tmp_path, student, stages="(2,)", **short), tiny_flags(copy, model, **short)):
        ended = run("distill", *words)
        assert ended.code == 0, ended.err
    mine, theirs = (folder / "runs" / "tiny" for folder in (tmp_path, copy))
    assert read_json(mine / "stage-2" / "DONE.json") == read_json(theirs / "stage-2" / "DONE.json")
    cards = [read_json(folder / "export" / "stage-2" / "reflow.json") for folder in (mine, theirs)]
    assert cards[0]["stages"] == cards[1]["stages"] == [4, 2]
    assert cards[0]["lineage"].items() >= cards[1]["lineage"].items()


def test_an_export_that_is_no_whole_model_says_what_it_is(delta, tmp_path):
    refused(draw(delta, tmp_path), "model_index.json", "a student's delta that export wrote")


# What a delta fits.


def scheduler(folder: Path, **fields: object) -> Path:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(read_json(path) | fields))
    return folder


def test_a_delta_is_not_merged_onto_another_kind_of_diffusion(model, student, delta, tmp_path):
    other = scheduler(tiny.write_model(tmp_path / "v"), prediction_type="v_prediction")
    betas = scheduler(tiny.write_model(tmp_path / "betas"), beta_end=0.02)
    out = tmp_path / "out"
    refused(run("merge", *merge_words(other, delta, out)), "predicts v_prediction", "epsilon")
    refused(run("merge", *merge_words(betas, delta, out)), "noise schedule")
    refused(run("merge", *merge_words(student, delta, out)), "student of 4 windows")
    refused(run("merge", *merge_words(model, delta, out), "--config.model.prediction_type=v_prediction"), "v_prediction")
    for scale in ("nan", "inf"):
        refused(run("merge", *merge_words(model, delta, out), f"--scale={scale}"), f"--scale={scale}")
    assert not out.exists()
    right = run("merge", *merge_words(other, delta, out), "--config.model.prediction_type=epsilon")  # said wrongly there
    assert right.code == 0, right.err


# What cards say.


def test_a_card_speaks_of_a_replay_only_if_there_was_one(chain, model, student, tmp_path):
    page = (student / "README.md").read_text()
    assert "replayed at" not in page and "none was made" in page and "replay" not in read_json(student / "reflow.json")
    words = [*tiny_flags(chain, model), "--stage=4", f"--out={tmp_path / 'out'}", "--check"]
    assert run("export", *words).code == 0
    replay, card = read_json(tmp_path / "out" / "replay.json"), read_json(tmp_path / "out" / "reflow.json")
    page = (tmp_path / "out" / "README.md").read_text()
    assert (
        card["replay"] == replay and f"8 prompts in 4 steps at guidance scale 1, with diffusers {replay['diffusers']}" in page
    )
    assert f"largest difference of the latents {replay['largest_difference']:.1e}" in page
    ended = run("export", *words[:-1])
    assert ended.code == 0 and "is there" in ended.err


def test_a_merge_says_that_it_is_one(model, delta, tmp_path):
    other = tiny.write_model(tmp_path / "tuned", seed=3)
    assert run("merge", *merge_words(other, delta, tmp_path / "out"), "--scale=0.5").code == 0
    card, page = read_json(tmp_path / "out" / "reflow.json"), (tmp_path / "out" / "README.md").read_text()
    change = read_json(delta / "reflow.json")
    assert "merge: the weights of tuned + 0.5 x the change" in page and change["digest"] in page
    assert card["merged"] == {"delta": change["digest"], "base": "model", "scale": 0.5} and card["base"] == "tuned"
    assert f"Digest of the weights: {card['digest']}" in page
    opened = open_experiment(tiny_config(tmp_path, tmp_path / "out", stages=(2,)))
    assert opened.denoiser.digest() == card["digest"] != change["digest"]  # a run takes these weights by the same digest
    assert opened.flow.windows == 4


def test_a_lora_says_what_it_loses_and_who_drops_what(chain, model, tmp_path):
    words = [*tiny_flags(chain, model), "--stage=4", "--form=lora", "--rank=4"]
    ended = run("export", *words, f"--out={tmp_path / 'kohya'}", "--check")
    assert ended.code == 0, ended.err
    card, page = read_json(tmp_path / "kohya" / "reflow.json"), (tmp_path / "kohya" / "README.md").read_text()
    lost = card["lora"]["lost"]
    share = lost["kohya's sd-scripts 02298e3"]
    assert lost["ComfyUI 00728eb"] == 0 < share == lost["diffusers 0.36 with peft 0.18"] < 1
    assert f"kohya's sd-scripts 02298e3 does not take layers that hold {share:.4f} of the LoRA's energy" in ended.err
    assert f"relative error {card['lora']['error']:.3f}" in page and f"kohya's sd-scripts 02298e3 {share:.1%}" in page
    assert f", to the whole student {card['replay']['to_student']:.1e}" in page

    ended = run("export", *words, "--for=diffusers", f"--out={tmp_path / 'peft'}", "--check")
    assert ended.code == 0, ended.err
    names = load_file(tmp_path / "peft" / "pytorch_lora_weights.safetensors").keys()
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    proofs = [read_json(tmp_path / folder / "replay.json") for folder in ("kohya", "peft")]
    assert all(proof["largest_difference"] <= 1e-3 < proof["to_student"] for proof in proofs)
    assert "diffusers' own names" in (tmp_path / "peft" / "README.md").read_text()
    refused(run("export", *words[:-2], "--for=diffusers", f"--out={tmp_path / 'x'}"), "--for=diffusers", "--form=lora")
    refused(run("export", *words, "--for=kohya", f"--out={tmp_path / 'x'}"), "--for='kohya'")
