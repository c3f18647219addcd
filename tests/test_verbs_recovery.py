"""A run that was damaged or mixed with another: mended by the same command where that can be, else refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import Ended, run, tiny_flags

from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.usefixtures("quick")
STAGES = ("stage-4", "stage-2")


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(chain, tmp_path / "copy"))


def again(verb: str, folder: Path, model: Path, *words: str, **fields: object) -> Ended:
    """A verb with the run's own config, but for what is named."""
    return run(verb, *tiny_flags(folder, model, **fields), *words)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def damage(step: Path) -> None:
    """Turns the bits of the middle half of every array file of a checkpoint."""
    for path in (step / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        for i in range(len(data) // 4, 3 * len(data) // 4):
            data[i] ^= 255
        path.write_bytes(data)


def rewrite(done: Path, **flow: object) -> None:
    record = read_json(done)
    done.write_text(json.dumps(record | {"flow": record["flow"] | flow}))


def test_damaged_last_steps_and_records_are_mended_by_the_same_command(chain, model, copied):
    mine, theirs = (folder / "runs" / "tiny" for folder in (copied, chain))
    damage(mine / "stage-4" / "checkpoints" / "6")
    rewrite(mine / "stage-2" / "DONE.json", windows=4)
    read = again("sample", copied, model, "--stage=4", f"--out={copied / 'x.png'}")
    assert read.code == 2 and "train --stage=4" in read.err and "remove" not in read.err, read.err

    ended = again("distill", copied, model)
    assert ended.code == 0, ended.err
    assert "stage 4: checkpoint of step 6" in ended.err and "going on from the newest good step" in ended.err
    assert "stage-2/DONE.json is damaged" in ended.err
    for stage in STAGES:
        assert read_json(mine / stage / "DONE.json") == read_json(theirs / stage / "DONE.json")


@pytest.mark.parametrize("flow", [{"windows": 8}, {"path": "first_order"}], ids=str)
def test_a_record_of_done_that_was_changed_is_not_believed(copied, model, flow):
    rewrite(copied / "runs" / "tiny" / "stage-4" / "DONE.json", **flow)
    ended = again("sample", copied, model, "--stage=4", "--steps=8", f"--out={copied / 'x.png'}")
    assert ended.code == 2 and "stage-4/DONE.json is damaged" in ended.err and not (copied / "x.png").exists(), ended.err


def test_another_stage_s_record_and_another_config_are_refused(copied, model):
    stages = [copied / "runs" / "tiny" / stage for stage in STAGES]
    ended = again(
        "sample", copied, model, "--stage=4", f"--out={copied / 'x.png'}", student__path="first_order", loss__space="output"
    )
    assert ended.code == 2 and "--config.student.path" in ended.err, ended.err
    shutil.copy(stages[1] / "DONE.json", stages[0] / "DONE.json")
    ended = again("sample", copied, model, "--stage=4", f"--out={copied / 'x.png'}")
    assert ended.code == 2 and "windows 2" in ended.err, ended.err


def test_another_stage_s_checkpoints_are_refused(copied, model):
    stages = [copied / "runs" / "tiny" / stage for stage in STAGES]
    (stages[0] / "DONE.json").unlink()
    shutil.rmtree(stages[0] / "checkpoints")
    shutil.copytree(stages[1] / "checkpoints", stages[0] / "checkpoints")
    ended = again("train", copied, model, "--stage=4")
    assert ended.code == 2 and "step 6 was saved by another stage" in ended.err and "2 windows" in ended.err, ended.err


@pytest.mark.parametrize("fields", [{"seed": 1}, {"pairs__solver": "euler"}, {"pairs__guidance": 2.0}], ids=str)
def test_train_refuses_pairs_of_another_config(copied, model, fields):
    stage = copied / "runs" / "tiny" / "stage-4"
    for path in stage.iterdir():
        if path.name != "pairs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = names(copied)
    ended = again("train", copied, model, "--stage=4", **fields)
    assert ended.code == 2 and "stage-4/pairs/plan.json was fixed with" in ended.err, ended.err
    assert names(copied) == before


def test_train_refuses_pairs_of_another_base_model(copied, tmp_path):
    stage = copied / "runs" / "tiny" / "stage-4"
    for path in stage.iterdir():
        if path.name != "pairs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = names(copied)
    ended = again("train", copied, tiny.write_model(tmp_path / "new", seed=5), "--stage=4")
    assert ended.code == 2 and "stage-4/pairs/plan.json was fixed with" in ended.err, ended.err
    assert names(copied) == before


def swap_merges(model: Path) -> None:
    merges = model / "tokenizer" / "merges.txt"
    *first, one, two = merges.read_text().splitlines()
    merges.write_text("\n".join([*first, two, one]) + "\n")


def change_encoder(model: Path) -> None:
    path = model / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] * np.asarray(1.001, tensors[name].dtype)
    save_file(tensors, path)


def change_betas(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    path.write_text(json.dumps(config | {"beta_end": 1.01 * config["beta_end"]}))


PARTS = {"tokenizer": swap_merges, "text_encoder": change_encoder, "schedule": change_betas}


@pytest.mark.parametrize("part", PARTS)
def test_another_part_of_the_base_model_in_a_run_under_way_is_refused(copied, model, tmp_path, part):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    PARTS[part](other)
    (copied / "runs" / "tiny" / "stage-2" / "DONE.json").unlink()
    before = names(copied)
    ended = again("distill", copied, other)
    assert ended.code == 2 and f"was fixed with base.{part} = " in ended.err, ended.err
    assert names(copied) == before


def test_more_stages_under_a_run_s_name_are_refused_before_the_first_begins(copied, model):
    before = names(copied)
    ended = again("distill", copied, model, stages="(8, 4, 2)")
    assert ended.code == 2 and "stage-4/plan.json was begun from other weights" in ended.err, ended.err
    assert names(copied) == before


def test_the_base_of_a_run_may_move(copied, model, tmp_path):
    ended = again("distill", copied, Path(shutil.copytree(model, tmp_path / "moved")))
    assert ended.code == 0, ended.err


def test_a_new_model_is_another(tmp_path, copied):
    ended = again("distill", copied, tiny.write_model(tmp_path / "new", seed=5))
    assert ended.code == 2 and "was fixed with" in ended.err
