"""The chain on a tiny model: its lineage, a second start, a changed config, damaged folders, all variants, the exports."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file
from test_runtime_profiler import traced_steps
from verb import CONFIG, run, tiny_flags

from proreflow_jax.data import digits
from proreflow_jax.exports import formats, replay_in_diffusers
from proreflow_jax.exports.formats import denoiser_file
from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil; times of change are kept."""
    return Path(shutil.copytree(chain, tmp_path / "copy"))


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """{path: (time of change, hash)} of every file but locks."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in found}


def test_a_warning_about_the_chain_is_said_once(finished):
    assert (finished / "said.txt").read_text().count("--config.pairs.substeps=1 reads students at window starts alone") == 1


def test_every_stage_names_the_weights_it_started_from(chain):
    run_folder = chain / "runs" / "tiny"
    first, second = (read_json(run_folder / f"stage-{n}" / "DONE.json") for n in (4, 2))
    plans = [read_json(run_folder / f"stage-{n}" / "plan.json") for n in (4, 2)]
    pairs = [read_json(run_folder / f"stage-{n}" / "pairs" / "plan.json") for n in (4, 2)]
    assert second["parent"] == first["digest"]
    assert len({first["parent"], first["digest"], second["digest"]}) == 3
    assert [plan["parent"] for plan in plans] == [plan["parent"] for plan in pairs] == [first["parent"], first["digest"]]
    assert [done["flow"]["windows"] for done in (first, second)] == [4, 2]
    assert [done["step"] for done in (first, second)] == [6, 6]
    exported = [read_json(run_folder / "export" / f"stage-{n}" / "reflow.json")["digest"] for n in (4, 2)]
    assert exported == [first["digest"], second["digest"]]
    assert read_json(run_folder / "config.json")["stages"] == [4, 2]
    lines = [json.loads(line) for line in (run_folder / "stage-2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and all(np.isfinite(line["loss"]) for line in lines)
    assert all(line["seconds"] >= line["wait_input"] + line["wait_device"] > 0 for line in lines)
    assert [traced_steps(run_folder / f"stage-{n}" / "profile") for n in (4, 2)] == [[[3, 4]], [[3, 4]]]


def test_the_same_command_again_does_nothing(chain, model, copied):
    before = files(copied)
    ended = run("distill", *tiny_flags(copied, model))
    assert ended.code == 0, ended.err
    assert files(copied) == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"train__steps": 8}, "train.steps"),
        ({"loss__alpha": 0.5}, "loss.alpha"),
        ({"optimizer__learning_rate": 0.1}, "optimizer.learning_rate"),
        ({"pairs__guidance": 2.0}, "pairs.guidance"),
        ({"pairs__examples": 48}, "examples"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_config_in_the_same_folder_is_refused_by_field(chain, model, copied, fields, named):
    before = files(copied)
    ended = run("distill", *tiny_flags(copied, model, **fields))
    assert ended.code == 2 and len(ended.err.splitlines()[-1:]) == 1
    assert f"fixed with {named} = " in ended.err and "Traceback" not in ended.err
    assert files(copied) == before


def test_another_base_model_in_the_same_folder_is_refused(chain, copied, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=5)
    ended = run("distill", *tiny_flags(copied, other))
    assert ended.code == 2 and "fixed with" in ended.err


def test_a_damaged_pair_shard_is_refused_by_name(chain, model, copied):
    stage = copied / "runs" / "tiny" / "stage-2"
    shutil.rmtree(stage / "checkpoints")
    (stage / "DONE.json").unlink()
    shard = sorted((stage / "pairs").glob("*.array_record"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    ended = run("train", *tiny_flags(copied, model), "--stage=2")
    assert ended.code == 2 and shard.name in ended.err.splitlines()[-1]
    assert not (stage / "DONE.json").exists()


def test_weights_that_are_not_those_of_done_are_refused(chain, model, copied):
    done = copied / "runs" / "tiny" / "stage-4" / "DONE.json"
    done.write_text(json.dumps({**read_json(done), "digest": "0" * 16}))
    ended = run("export", *tiny_flags(copied, model), "--stage=4", f"--out={copied / 'out'}")
    assert ended.code == 2 and "DONE.json" in ended.err and not (copied / "out").exists()


def test_make_pairs_and_train_alone_are_the_same_as_distill(chain, model, tmp_path):
    command = tiny_flags(tmp_path, model, data__path=(chain / "prompts.at").read_text())
    for verb in ("make_pairs", "train"):
        ended = run(verb, *command, "--stage=4")
        assert ended.code == 0, ended.err
    mine, theirs = (folder / "runs" / "tiny" / "stage-4" for folder in (tmp_path, chain))
    assert read_json(mine / "DONE.json") == read_json(theirs / "DONE.json")
    hashes = [{name: hashed for name, (_, hashed) in files(folder / "pairs").items()} for folder in (mine, theirs)]
    assert hashes[0] == hashes[1] and len(hashes[0]) > 4
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text()
    assert "<b>finished what this command was to do</b>" in page and "Stage 4" in page and "not begun" in page


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as 8 x 8 pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures") / "digits"
    digits.write_dataset(folder, 8, seed=0)
    return folder


UNET_FILE = denoiser_file("unet")
SLOW = pytest.mark.slow
FIRST_ORDER = {"student__path": "first_order", "loss__space": "output"}
VELOCITY = {"student__prediction": "velocity"}
VARIANTS = [
    pytest.param({"pairs__mode": "online", "pairs__start": "data", "train__accumulation": 2, "train__ema": 0}, marks=SLOW),
    pytest.param(FIRST_ORDER | {"pairs__guidance": 2.0, "pairs__storage": "float16"}, marks=SLOW),
    pytest.param(VELOCITY | {"pairs__solver": "heun", "model__dtype": "bfloat16", "mesh__fsdp": 2}, marks=SLOW),
    pytest.param({"pairs__mode": "online"}, marks=SLOW),
    pytest.param({"pairs__start": "data", "student__prediction": "diff_eps"}, marks=SLOW),
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()))
def test_every_variant_runs(model, pictures, tmp_path, fields):
    images = {"data__kind": "digits", "data__path": pictures, "data__resolution": 8} if "pairs__start" in fields else {}
    short = {"stages": "(2,)", "export__stages": "()", "train__steps": 2, "optimizer__warmup_steps": 0, "pairs__examples": 16}
    ended = run("distill", *tiny_flags(tmp_path, model, **short, **images, **fields))
    assert ended.code == 0, ended.err
    stage = tmp_path / "runs" / "tiny" / "stage-2"
    done = read_json(stage / "DONE.json")
    assert done["digest"] != done["parent"]
    assert (stage / "pairs").exists() == (fields.get("pairs__mode") != "online")
    if fields.get("student__prediction") == "velocity":
        words = [*tiny_flags(tmp_path, model, **short, **fields), "--stage=2", f"--out={tmp_path / 'out'}"]
        ended = run("export", *words)
        assert ended.code == 2 and "velocity" in ended.err and not (tmp_path / "out").exists()


def v_model(folder: Path) -> Path:
    """The tiny model, declared to predict v."""
    path = tiny.write_model(folder) / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**read_json(path), "prediction_type": "v_prediction"}))
    return folder


def test_a_v_prediction_model_does_not_relearn_its_output(tmp_path):
    refused = run("distill", *tiny_flags(tmp_path, v_model(tmp_path / "model")))
    assert refused.code == 2 and "take --config.student.prediction=ddim_v" in refused.err and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_v_prediction_model_keeps_its_words_from_distillation_to_diffusers(tmp_path):
    model = v_model(tmp_path / "model")
    short = {"stages": "(2,)", "export__stages": "(2,)", "train__steps": 2, "optimizer__warmup_steps": 0, "pairs__examples": 16}
    words = tiny_flags(tmp_path, model, **short, student__prediction="ddim_v")
    assert run("distill", *words).code == 0
    ended = run("export", *words, "--stage=2", "--check")
    assert ended.code == 0, ended.err
    exported = tmp_path / "runs" / "tiny" / "export" / "stage-2"
    assert read_json(exported / "scheduler" / "scheduler_config.json")["prediction_type"] == "v_prediction"
    assert read_json(exported / "replay.json")["largest_difference"] <= replay_in_diffusers.LIMIT


def test_an_export_is_the_student_in_stock_diffusers(chain, model, tmp_path):
    target = tmp_path / "exported"
    words = [*tiny_flags(chain, model), "--stage=2", f"--out={target}"]
    ended = run("export", *words, "--check")
    assert ended.code == 0, ended.err
    proof = read_json(target / "replay.json")
    assert proof["steps"] == 2 and proof["largest_difference"] <= replay_in_diffusers.LIMIT < proof["largest_value"]

    again = run("export", *words)
    assert again.code == 0 and f"{target}: is there" in again.err and (target / "replay.json").exists()
    other = run("export", *words, "--dtype=float16")
    assert other.code == 2 and str(target) in other.err and "--overwrite" in other.err
    assert run("export", *words, "--overwrite").code == 0 and not (target / "replay.json").exists()


def test_a_wrong_export_is_found_out(chain, model, tmp_path, monkeypatch):
    target = tmp_path / "exported"
    words = [*tiny_flags(chain, model), "--stage=2", f"--out={target}"]
    monkeypatch.setitem(formats.SCHEDULER, "set_alpha_to_one", True)
    ended = run("export", *words, "--check")
    assert ended.code == 1 and "differ by" in ended.err.splitlines()[-1]


FORMS = [("single-file",), ("lora", "--rank=1000"), ("diffusers", "--scheduler=windowed")]


@pytest.mark.parametrize("form, more", [(form, more) for form, *more in FORMS], ids=lambda x: str(x))
def test_every_form_is_the_same_student_in_diffusers(chain, model, tmp_path, form, more):
    target = tmp_path / "exported"
    words = [*tiny_flags(chain, model), "--stage=2", f"--out={target}", f"--form={form}", *more]
    ended = run("export", *words, "--check")
    assert ended.code == 0, ended.err
    proof, card = read_json(target / "replay.json"), read_json(target / "reflow.json")
    assert proof["largest_difference"] <= replay_in_diffusers.LIMIT < proof["largest_value"]
    assert proof["steps"] == (4 if more == ["--scheduler=windowed"] else 2)
    assert card["stages"] == [4, 2] and card["guidance"]["teacher"] == 1.0 and card["format"]["form"] == form
    page = (target / "README.md").read_text()
    assert "4 -> 2 windows" in page and card["digest"] in page and "| `loss.alpha` | 1.0 |" in page
    if form == "lora":
        assert "rank  64 keeps" in ended.err and 0 < card["lora"]["left_out"]["energy"] < 1
        assert proof["to_student"] > proof["largest_difference"]


def test_a_delta_merges_back_into_the_student_and_onto_another_model_only_of_the_same_network(chain, model, tmp_path):
    (model / "v1-5-pruned.ckpt").write_bytes(b"a whole model beside its components, as the hub has them")
    words = [*tiny_flags(chain, model), "--stage=2"]
    for form in ("diffusers", "delta"):
        assert run("export", *words, f"--form={form}", f"--out={tmp_path / form}").code == 0
    merged = ["--config=" + str(CONFIG), f"--delta={tmp_path / 'delta'}", f"--out={tmp_path / 'merged'}"]
    ended = run("merge", *merged, f"--config.model.path={model}")
    assert ended.code == 0, ended.err
    assert not list(tmp_path.rglob("*.ckpt")) and (tmp_path / "merged" / "tokenizer").is_dir()
    student, again = (load_file(tmp_path / name / UNET_FILE) for name in ("diffusers", "merged"))
    assert student.keys() == again.keys()
    for name in student:
        np.testing.assert_allclose(again[name], student[name], atol=1e-6)

    other = run("merge", *merged, "--overwrite")  # the embedded digits model
    assert other.code == 2 and "not of the same network" in other.err and len(other.err.splitlines()) == 1
    assert read_json(tmp_path / "merged" / "reflow.json")["merged"]["scale"] == 1.0  # what was there is there


WRONG = [("--form=zip", "--form"), ("--form=delta --check", "--form"), ("--dtype=int8", "--dtype"), ("--rank=0", "--rank=0")]
WRONG += [("--form=lora --scheduler=windowed", "--scheduler=windowed")]


@pytest.mark.parametrize("flags, named", WRONG)
def test_an_export_that_cannot_be_is_refused(chain, model, tmp_path, flags, named):
    ended = run("export", *tiny_flags(chain, model), "--stage=2", f"--out={tmp_path / 'out'}", *flags.split())
    assert ended.code == 2 and named in ended.err and not (tmp_path / "out").exists()


def test_pictures_of_base_and_student(chain, model, tmp_path):
    def draw(name: str, *words: str) -> np.ndarray:
        out = tmp_path / name
        ended = run("sample", *tiny_flags(chain, model), "--count=3", f"--out={out}", *words)
        assert ended.code == 0, ended.err
        return np.asarray(Image.open(out))

    student = draw("student.png", "--stage=2", "--prompt=a three")
    assert student.shape == (8, 24, 3) and student.std() > 0
    np.testing.assert_array_equal(draw("again.png", "--stage=2", "--prompt=a three"), student)
    words = ("--stage=0", "--steps=3", f"--prompts={(chain / 'prompts.at').read_text()}", "--guidance=3")
    base = draw("base.png", *words, "--negative=the number two")
    assert base.shape == (48, 24, 3)
    other = draw("other.png", *words, "--negative=five")
    assert (other != base).any()
