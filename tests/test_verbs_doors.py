"""Every door through which a stage's weights are read compares what the stage was taught with the config and the base model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import Ended, run, tiny_flags

import proreflow_jax
from proreflow_jax import MissingFile, UserError
from proreflow_jax.exports.formats import denoiser_file
from proreflow_jax.run import taught
from proreflow_jax.storage.atomic import read_json, write_json

pytestmark = pytest.mark.usefixtures("quick")
UNET_FILE = denoiser_file("unet")
DIGITS = {"data__kind": "digits"}  # `evaluate` needs the demo's digits, whatever the student was trained on


@pytest.fixture(scope="module")
def bases(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other base models: all of it, and the UNet alone."""
    folder = tmp_path_factory.mktemp("bases")
    one = Path(shutil.copytree(model, folder / "unet"))
    weights = dict(load_file(one / UNET_FILE))
    weights["conv_in.bias"] = weights["conv_in.bias"] + np.float32(0.5)
    save_file(weights, one / UNET_FILE)
    return {"whole": tiny.write_model(folder / "whole", seed=5), "UNet": one}


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(chain, tmp_path / "copy"))


def door(verb: str, folder: Path, model: Path, out: Path, **fields: object) -> Ended:
    """A verb that reads the student of 4 windows."""
    words = {
        "export": ["--stage=4", "--form=delta", f"--out={out / 'delta'}"],
        "sample": ["--stage=4", "--count=1", f"--out={out / 'x.png'}"],
        "evaluate": [],
    }
    data = DIGITS | {"data__path": out / "digits"} if verb == "evaluate" else {}
    return run(verb, *tiny_flags(folder, model, **data, **fields), *words[verb])


def refused(ended: Ended, *needles: str) -> None:
    line = ended.err.splitlines()[-1]
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert [needle for needle in needles if needle not in line] == [], line


@pytest.mark.parametrize("verb", ["export", "sample", "evaluate"])
def test_another_guidance_is_refused(chain, model, tmp_path, verb):
    ended = door(verb, chain, model, tmp_path, pairs__guidance=7.0)
    refused(ended, "stage-4/plan.json", "pairs.guidance = 1.0", "says 7.0", "--config.pairs.guidance=1.0")
    assert not (tmp_path / "delta").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("verb", ["export", "sample", "evaluate"])
@pytest.mark.parametrize(("base", "part"), [("whole", "text encoder"), ("UNet", "the UNet")])
def test_another_base_model_is_refused(chain, bases, tmp_path, verb, base, part):
    ended = door(verb, chain, bases[base], tmp_path)
    refused(ended, "stage-4/plan.json", part, "--config.model.path")
    assert not (tmp_path / "delta").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("base", ["whole", "UNet"])
def test_load_refuses_another_base_model(chain, bases, base):
    with pytest.raises(UserError, match=r"stage-4/plan\.json.*--config\.model\.path"):
        proreflow_jax.load(chain / "runs" / "tiny", stage=4, overrides={"model.path": str(bases[base])})
    student_of_none = proreflow_jax.load(chain / "runs" / "tiny", stage=0, overrides={"model.path": str(bases[base])})
    assert student_of_none.flow.windows == 0  # the base model alone is what it is


def test_load_refuses_a_config_that_was_changed_since(copied, model):
    path = copied / "runs" / "tiny" / "config.json"
    record = read_json(path)
    write_json(path, record | {"pairs": record["pairs"] | {"guidance": 7.0}})
    with pytest.raises(UserError, match=r"stage-2/plan\.json.*pairs\.guidance = 1\.0"):
        proreflow_jax.load(copied / "runs" / "tiny")
    assert proreflow_jax.load(copied / "runs" / "tiny", overrides={"pairs.guidance": 1.0}).flow.windows == 2


def test_a_card_states_no_setting_that_the_student_has_not_seen(chain, model, tmp_path):
    for fields, flag in (
        ({"train__steps": 12}, "--config.train.steps=6"),
        ({"loss__alpha": 0.25}, "--config.loss.alpha=1.0"),
        ({"seed": 3}, "--config.seed=0"),
        ({"data__kind": "folder"}, "--config.data.kind=prompts"),
    ):
        refused(door("export", chain, model, tmp_path, **fields), "stage-4/plan.json", flag)
    assert not (tmp_path / "delta").exists()


def test_what_only_says_how_to_draw_or_to_measure_is_free(chain, model, tmp_path):
    """The run has moved, and so have its base model and its prompts."""
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    fields = {
        "model__sampling_dtype": "bfloat16",
        "samples__prompts": "('a three',)",
        "samples__guidance": 3.0,
        "evaluate__examples": 16,
        "evaluate__batch": 8,
        "evaluate__columns": 2,
        "data__path": tmp_path / "gone.txt",
        "train__accumulation": 2,
        "checkpoint__every": 3,
        "pairs__batch": 8,
        "mesh__fsdp": 2,
    }
    ended = door("sample", chain, moved, tmp_path, **fields, seed=3, train__steps=12)
    assert ended.code == 0 and (tmp_path / "x.png").is_file(), ended.err
    ended = door("export", chain, moved, tmp_path, **fields)
    assert ended.code == 0 and (tmp_path / "delta" / "reflow.json").is_file(), ended.err


def test_evaluate_may_measure_other_examples(copied, model, tmp_path):
    few = {"evaluate__examples": 16, "evaluate__batch": 8}
    few |= {"evaluate__teacher_steps": "(4,)", "evaluate__student_steps": "((4, 4),)"}
    ended = door("evaluate", copied, model, tmp_path, **few, seed=3)
    assert ended.code == 0, ended.err


def test_the_newest_step_of_an_unfinished_stage_is_compared_too(copied, model, bases, tmp_path):
    (copied / "runs" / "tiny" / "stage-4" / "DONE.json").unlink()
    refused(door("sample", copied, model, tmp_path, pairs__guidance=7.0), "--config.pairs.guidance=1.0")
    refused(door("sample", copied, bases["UNet"], tmp_path), "the UNet")
    ended = door("sample", copied, model, tmp_path)
    assert ended.code == 0, ended.err


def test_the_stages_before_are_compared_before_a_folder_is_made(copied, model):
    stage = copied / "runs" / "tiny" / "stage-2"
    shutil.rmtree(stage)
    for verb in ("make_pairs", "train"):
        ended = run(verb, *tiny_flags(copied, model, pairs__guidance=7.0), "--stage=2")
        refused(ended, "stage-4/plan.json", "--config.pairs.guidance=1.0")
        assert not stage.exists()


def test_a_student_of_other_stages_is_refused(chain, model, tmp_path):
    words = [*tiny_flags(chain, model, stages="(2,)", export__stages="(2,)"), "--stage=2", f"--out={tmp_path / 'x.png'}"]
    refused(run("sample", *words), "stage-2/plan.json", "--config.stages")


def test_a_stage_without_its_plan_is_refused(copied, model, tmp_path):
    (copied / "runs" / "tiny" / "stage-4" / "plan.json").unlink()
    refused(door("sample", copied, model, tmp_path), "stage-4/plan.json", "bring it back")
    with pytest.raises(MissingFile, match="plan.json"):
        proreflow_jax.load(copied / "runs" / "tiny", stage=4)


PLACE, RANK_0 = Path("stage-4/plan.json"), {"rank": 0, "alpha": 0.0, "layers": "attn"}


def test_what_a_plan_does_not_say_and_what_says_nothing_is_not_compared():
    config = {
        "student.lora": {"rank": 0, "alpha": 4.0, "layers": "ff"},
        "pairs.guidance": 1.0,
        "pairs.new": 3,
        "pairs.batch": 8,
    }
    taught.check_settings(PLACE, {"student.lora": RANK_0, "pairs.guidance": 1.0}, config)


@pytest.mark.parametrize(
    ("plan", "flag"),
    [
        ({"student.lora": RANK_0 | {"rank": 2}}, "--config.student.lora.rank=2"),
        ({"conditioning.crop": [0, 8]}, "--config.conditioning.crop=(0, 8)"),
    ],
    ids=str,
)
def test_the_flag_is_that_of_the_field(plan, flag):
    config = {"student.lora": RANK_0, "conditioning.crop": [0, 0]}
    with pytest.raises(UserError) as error:
        taught.check_settings(PLACE, plan, config)
    assert flag in str(error.value)
