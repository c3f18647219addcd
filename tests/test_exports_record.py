"""The record of an export decides how its UNet is read: a damaged or missing one is never taken for a good one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from verb import tiny_config

from proreflow_jax import UserError
from proreflow_jax.exports.formats import student_scheduler_config
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.pretrained import single_file, sources, weights
from proreflow_jax.run import open
from proreflow_jax.storage import atomic, sealed

RECORD = {"format": {"form": "diffusers"}, "flow": {"prediction": "ddim_eps", "windows": 4, "path": "linear"}}


def test_no_flipped_bit_of_a_record_changes_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    sealed.seal(tmp_path, RECORD)
    whole, right = (tmp_path / sealed.RECORD).read_bytes(), sealed.read_record(tmp_path)
    assert right["flow"] == RECORD["flow"]
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        (tmp_path / sealed.RECORD).write_bytes(data)
        try:
            assert sealed.read_record(tmp_path) == right, bytes(data)
        except UserError as error:
            assert sealed.RECORD in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ["[]", "", "3", "{", "[" * 100_000], ids=["list", "empty", "number", "cut", "deep"])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, model: Path, text: str) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    (student / sealed.RECORD).write_text(text)
    for read in (sealed.read_record, sources.open_folder):
        with pytest.raises(UserError, match=r"reflow\.json (is no valid JSON|holds a \w+ where)") as error:
            read(student)
        assert "\n" not in str(error.value) and "write the folder again" in str(error.value)


def test_a_record_says_more_after_an_export_is_replayed(tmp_path: Path) -> None:
    sealed.seal(tmp_path, RECORD)
    sealed.seal(tmp_path, sealed.read_record(tmp_path) | {"replay": 1.0})
    assert sealed.read_record(tmp_path)["replay"] == 1.0


@pytest.mark.parametrize("flow", [Parameterization("ddim_eps", 4, "linear"), Parameterization("ddim_v", 2, "linear")])
def test_a_student_without_its_record_is_no_diffusion_model(tmp_path: Path, model: Path, flow: Parameterization) -> None:
    student = Path(shutil.copytree(model, tmp_path / "student"))
    place = student / "scheduler" / "scheduler_config.json"
    atomic.write_json(place, student_scheduler_config(json.loads(place.read_text()), flow))
    config = tiny_config(tmp_path, student)
    with pytest.raises(UserError, match=rf"student of {flow.windows} windows.*reflow.json is missing"):
        open.base_flow(config, tiny.load(student)[0])
    sealed.seal(student, RECORD | {"flow": flow._asdict()})
    assert open.base_flow(config, tiny.load(student)[0]) == flow


def test_a_single_file_of_a_student_says_so_too(tmp_path: Path, model: Path) -> None:
    source = sources.open_folder(model)
    tensors = {}
    for name in source.components:
        tensors |= single_file.to_original(name, dict(source.tensors(name)), source.config(name), source.family)
    weights.save_tensors(tmp_path / "one.safetensors", tensors, {sources.STUDENT: "4"})
    assert sources.open_file(tmp_path / "one.safetensors", model).config("scheduler")[sources.STUDENT] == 4
