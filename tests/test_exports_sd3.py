"""A tiny Stable Diffusion 3.5, made by diffusers, distilled, exported in every form, and drawn by stock diffusers again."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from verb import quickly, run, tiny_flags

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import tiny_sd3  # noqa: E402
from test_pretrained_joint_file import with_identity  # noqa: E402

from proreflow_jax.exports import formats, replay_in_diffusers  # noqa: E402
from proreflow_jax.pretrained import sources  # noqa: E402
from proreflow_jax.runtime import mesh  # noqa: E402
from proreflow_jax.storage.atomic import read_json  # noqa: E402

FIELDS = {
    "stages": "(4,)",
    "export__stages": "()",
    "student__prediction": "velocity",
    "train__steps": 2,
    "train__ema": 0,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-2,
    "pairs__mode": "online",
    "train__batch": 4,
}
FORMS = ("diffusers", "single-file", "lora")


@pytest.fixture(scope="module", autouse=True)
def quick(programs):
    with quickly(programs) as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)
        patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The flags of a finished run, and its model's folder."""
    folder = tmp_path_factory.mktemp("sd3")
    model = with_identity(tiny_sd3.write(folder / "model"))
    words = tiny_flags(folder, model, **FIELDS)
    ended = run("distill", *words)
    assert ended.code == 0, ended.err
    return words, model


@pytest.fixture(scope="module")
def exported(distilled, tmp_path_factory):
    """The folder of a form, written and checked once. Tests only read it."""
    made = {}

    def once(form: str) -> Path:
        if form not in made:
            target = tmp_path_factory.mktemp("exports") / form
            more = {"lora": ["--rank=1000"]}.get(form, []) + ["--check"] * (form != "delta")
            ended = run("export", *distilled[0], "--stage=4", f"--form={form}", f"--out={target}", *more)
            assert ended.code == 0, ended.err
            made[form] = target
        return made[form]

    return once


@pytest.mark.parametrize("form", FORMS)
def test_stock_diffusers_draws_the_student(exported, form):
    """N steps by the written scheduler, told nothing else; 2 N steps told `sigmas`."""
    folder = exported(form)
    found = read_json(folder / "replay.json")
    assert found["largest_difference"] <= replay_in_diffusers.LIMIT < found["largest_value"]
    assert (found["steps"], found["told"]["steps"]) == (4, 8)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    page = (folder / "README.md").read_text()
    assert "StableDiffusion3Pipeline" in page or form == "diffusers"
    assert "FlowMatchEuler" in page and "DDIM" not in page and "stable-diffusion-3" in page


def test_the_folder_opens_again_as_what_it_is(distilled, exported):
    folder = exported("diffusers")
    source = sources.open_folder(folder)
    assert source.student["flow"]["windows"] == 4 and source.denoiser_name == "transformer"
    base = load_file(distilled[1] / formats.denoiser_file("transformer"))
    student = load_file(folder / formats.denoiser_file("transformer"))
    assert base.keys() == student.keys() and max(np.abs(base[n] - student[n]).max() for n in base) > 1e-3
    assert np.array_equal(base["pos_embed.pos_embed"], student["pos_embed.pos_embed"])


def test_a_delta_is_merged_onto_its_base(distilled, exported, tmp_path):
    ended = run("merge", f"--delta={exported('delta')}", f"--out={tmp_path / 'merged'}", *distilled[0])
    assert ended.code == 0, ended.err
    folder = exported("diffusers")
    one, other = (load_file(f / formats.denoiser_file("transformer")) for f in (tmp_path / "merged", folder))
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= 1e-6


def test_a_student_of_a_single_file_is_that_of_the_folder(distilled, exported):
    source = sources.open_file(exported("single-file") / formats.FILES["single-file"], distilled[1])
    student = load_file(exported("diffusers") / formats.denoiser_file("transformer"))
    tensors = source.tensors("transformer")
    assert all(np.array_equal(tensors[name], value) for name, value in student.items()) and source.student["windows"] == 4


def test_our_own_scheduler_is_not_needed(distilled, tmp_path):
    ended = run("export", *distilled[0], "--stage=4", "--scheduler=windowed", f"--out={tmp_path / 'out'}")
    assert ended.code and "--scheduler=windowed" in ended.err and "stock scheduler" in ended.err
