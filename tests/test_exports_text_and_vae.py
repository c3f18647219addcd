"""A student made with a VAE of its own and with clip_skip: what each export carries, and what its card says."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import run, tiny_config, tiny_flags

from proreflow_jax.exports.card import card_page, clip_skip_numbers
from proreflow_jax.exports.formats import FILES
from proreflow_jax.pretrained import single_file, sources
from proreflow_jax.run.experiment import PLANNED, stage_plan
from proreflow_jax.run.open import open_experiment
from proreflow_jax.runtime import mesh
from proreflow_jax.storage.atomic import read_json

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import wrong_schedulers  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick", "one_device")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = {"stages": "(4,)", "export__stages": "(4,)", "train__steps": 2, "pairs__examples": 16}


class Place:
    """A folder with a finished run of a model with two text layers; tests only read it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, tiny.write_model(folder / "model", text_layers=2)
        (folder / "tuned").mkdir()
        config = json.loads((self.model / "vae" / "config.json").read_text())
        (folder / "tuned" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
        own = load_file(self.model / "vae" / WEIGHTS)
        self.tuned = {name: value + np.float32(0.01) for name, value in own.items()}
        save_file(self.tuned, folder / "tuned" / WEIGHTS)

    def words(self, **fields: object) -> list[str]:
        known = {"model__vae": self.folder / "tuned", "model__clip_skip": 1}
        return tiny_flags(self.folder, fields.pop("model", self.model), **{**SHORT, **known, **fields})

    def export(self, form: str, out: Path, *words: str) -> Path:
        ended = run("export", *self.words(), "--stage=4", f"--form={form}", f"--out={out}", *words)
        assert ended.code == 0, ended.err
        return out


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Programs for one device compile sooner; meshes have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, quick: None, one_device: None) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    ended = run("distill", *place.words())
    assert ended.code == 0, ended.err
    return place


@pytest.fixture(scope="module")
def student(place: Place) -> Path:
    return place.folder / "runs" / "tiny" / "export" / "stage-4"


def test_the_folder_carries_the_vae_that_was_used_and_the_layers_that_were_read(place, student):
    """Stock diffusers needs no word: its text encoder ends where ours did, for the negative prompt too."""
    written = load_file(student / "vae" / WEIGHTS)
    assert written.keys() == place.tuned.keys()
    assert all(np.array_equal(written[name], value) for name, value in place.tuned.items())
    assert read_json(student / "vae" / "config.json")["force_upcast"] is False
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(student)
    base = diffusers.StableDiffusionPipeline.from_pretrained(place.model)
    ids = torch.tensor([[0, 5, 6, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        states = base.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = base.text_encoder.final_layer_norm(states)
        assert torch.allclose(pipe.text_encoder(ids)[0], expected, atol=1e-6)
    assert not [name for name in load_file(student / "text_encoder" / "model.safetensors") if "layers.1." in name]
    card, page = read_json(student / "reflow.json"), (student / "README.md").read_text()
    assert card["base"] == "model with the VAE of tuned" and card["lineage"]["vae"] in page
    assert card["clip_skip"] == {"diffusers": 1, "a1111": 2, "comfyui": -2} and "pass no clip_skip" in page


def test_a_single_file_is_whole_and_its_card_says_what_to_set(place, tmp_path):
    out = place.export("single-file", tmp_path / "file", "--check")
    tensors = load_file(out / FILES["single-file"])
    assert any(name.startswith("cond_stage_model.") and "encoder.layers.1." in name for name in tensors)
    vae = {name: value for name, value in tensors.items() if name.startswith(single_file.VAE)}
    expected = single_file.to_original("vae", place.tuned, sources.open_folder(place.model).config("vae"), "v1")
    assert vae.keys() == expected.keys() and all(np.array_equal(vae[name], expected[name]) for name in vae)
    page = (out / "README.md").read_text()
    assert "Clip skip 2" in page and "CLIP Set Last Layer at -2" in page and "num_hidden_layers less 1" in page
    assert read_json(out / "replay.json")["largest_difference"] < 1e-3
    again = ["--stage=0", f"--out={tmp_path / 'x.png'}", "--count=1"]
    file = {"model": out / FILES["single-file"], "model__like": place.model, "model__vae": ""}
    ended = run("sample", *place.words(**file, model__clip_skip=0), *again)
    assert ended.code == 2 and "a student taught with clip_skip=1: take --config.model.clip_skip=1" in ended.err
    assert run("sample", *place.words(**file), *again).code == 0


def test_a_student_s_folder_reads_its_text_by_itself(place, student, tmp_path):
    words = ["--stage=0", f"--out={tmp_path / 'x.png'}", "--count=1"]
    refused = run("sample", *place.words(model=student, model__vae=""), *words)
    line = refused.err.splitlines()[-1]
    assert refused.code == 2 and "its text encoder ends there: take --config.model.clip_skip=0" in line, line
    assert run("sample", *place.words(model=student, model__vae="", model__clip_skip=0), *words).code == 0


def test_a_lora_s_card_and_a_delta_s_merge_know_it(place, tmp_path):
    lora = place.export("lora", tmp_path / "lora")
    assert "Clip skip 2" in (lora / "README.md").read_text()
    delta = place.export("delta", tmp_path / "delta")
    merge = lambda **fields: run("merge", *place.words(**fields), f"--delta={delta}", f"--out={tmp_path / 'merged'}")
    refused = merge(model__clip_skip=0)
    assert refused.code == 2 and "taught with clip_skip=1: take --config.model.clip_skip=1" in refused.err
    ended = merge(model__vae="")
    assert ended.code == 0, ended.err
    merged = read_json(tmp_path / "merged" / "reflow.json")
    assert "vae" not in merged["lineage"] and merged["clip_skip"]["diffusers"] == 1
    assert read_json(tmp_path / "merged" / "text_encoder" / "config.json")["num_hidden_layers"] == 1
    own, written = load_file(place.model / "vae" / WEIGHTS), load_file(tmp_path / "merged" / "vae" / WEIGHTS)
    assert all(np.array_equal(own[name], written[name]) for name in own)


def test_a_run_of_before_there_was_clip_skip_goes_on(place, tmp_path):
    """Its plan has no such field: 0 is not written."""
    experiment = open_experiment(tiny_config(tmp_path, place.model))
    plan = stage_plan(experiment, experiment.stages[0], "", PLANNED)
    assert "model.prediction_type" in plan and not plan.keys() & {"model.clip_skip", "model.vae"}


def test_a_run_that_goes_on_with_another_is_refused_by_name(place):
    plan = read_json(place.folder / "runs" / "tiny" / "stage-4" / "pairs" / "plan.json")
    assert plan["model.clip_skip"] == 1 and "model.vae" not in plan
    for fields, name in (({"model__clip_skip": 0}, "model.clip_skip"), ({"model__vae": ""}, "base.vae")):
        ended = run("distill", *place.words(**fields))
        assert ended.code == 2 and f"was fixed with {name} = " in ended.err.splitlines()[-1], ended.err


def test_the_vae_that_lies_elsewhere_is_the_same_run(place, tmp_path):
    save_file(place.tuned, tmp_path / "moved.safetensors")
    ended = run("distill", *place.words(model__vae=tmp_path / "moved.safetensors"))
    assert ended.code == 0, ended.err


def test_another_export_is_not_taken_for_it(place, student):
    for fields in ({"model__vae": ""}, {"model__clip_skip": 0}):
        ended = run("export", *place.words(**fields), "--stage=4")
        assert ended.code == 2, ended.err
    assert read_json(student / "reflow.json")["clip_skip"]["diffusers"] == 1


def test_nothing_is_written_over_the_vae(place):
    ended = run("export", *place.words(), "--stage=4", f"--out={place.folder / 'tuned'}", "--overwrite")
    assert ended.code == 2 and "what --config.model.vae names" in ended.err


def test_the_schedulers_of_the_docs_are_measured(student):
    """tests/wrong_schedulers.py; what steps as DDIM does is near, what draws noise is not."""
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    off = {row.name: row.share for row in wrong_schedulers.measure(student, 4.0, ["a three", "five"], noise)}
    assert off.keys() == wrong_schedulers.SCHEDULERS.keys() and np.isfinite(list(off.values())).all()
    assert off["Euler, trailing"] < 0.1 < min(off["LCM"], off["Euler a, trailing"], off["DDIM, `leading` (its default)"])


@pytest.mark.parametrize(("family", "a1111", "comfyui"), [("v1", 2, -2), ("v2", None, -3)])
def test_each_tool_counts_in_its_own_way(family, a1111, comfyui):
    assert clip_skip_numbers(1, family) == {"diffusers": 1, "a1111": a1111, "comfyui": comfyui}
    assert clip_skip_numbers(0, family) == {}


def test_a_page_of_before_says_nothing_of_it(student):
    card = read_json(student / "reflow.json")
    del card["clip_skip"], card["lineage"]["vae"]
    assert "clip_skip" not in card_page(card) and "VAE's weights" not in card_page(card)
