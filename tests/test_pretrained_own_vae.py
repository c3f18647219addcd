"""A VAE in the place of the model's own: read in every form as the same VAE, and refused in words where it does not fit."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny
from fake_hub import FakeHub, connect
from safetensors.numpy import load_file, save_file
from verb import run, tiny_config, tiny_flags

from proreflow_jax import UserError
from proreflow_jax.pretrained import pipeline, single_file, sources, weights
from proreflow_jax.pretrained.own_vae import with_own_vae
from proreflow_jax.run.base_identity import base_identity
from proreflow_jax.run.find_model import find_base_model, title

pytestmark = pytest.mark.usefixtures("quick")

WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMS = ("folder", "model", "model's vae", "diffusers names", "bare names", "whole file")
FLAG = "--config.model.vae"


def set_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def tuned(model: Path) -> dict[str, np.ndarray]:
    """A fine-tune of the model's own VAE, under diffusers' names."""
    draws = np.random.default_rng(1)
    noise = lambda value: (0.02 * draws.standard_normal(value.shape)).astype(np.float32)
    return {name: value + noise(value) for name, value in load_file(model / "vae" / WEIGHTS).items()}


@pytest.fixture(scope="module")
def places(model: Path, tuned: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same VAE in every form."""
    folder = tmp_path_factory.mktemp("vaes")
    whole = Path(shutil.copytree(model, folder / "model"))
    save_file(tuned, whole / "vae" / WEIGHTS)
    shutil.copytree(whole / "vae", folder / "alone")
    set_json(folder / "alone" / "config.json", sample_size=512, shift_factor=None, use_quant_conv=True)  # newer diffusers'
    source = sources.open_folder(whole)
    parts = {n: single_file.to_original(n, source.tensors(n), source.config(n), "v1") for n in source.components}
    bare = {name.removeprefix(single_file.VAE): value for name, value in parts["vae"].items()}
    save_file(tuned, folder / "today.safetensors")
    save_file(bare | {"loss.logvar": np.zeros((), np.float32)}, folder / "bare.safetensors")
    save_file({name: value for part in parts.values() for name, value in part.items()}, folder / "whole.safetensors")
    names = (folder / "alone", whole, whole / "vae", *(folder / f"{n}.safetensors" for n in ("today", "bare", "whole")))
    return dict(zip(FORMS, names, strict=True))


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_vae(model, tuned, places, form, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = pipeline.load_pipeline(with_own_vae(sources.open_folder(model), places[form]), with_denoiser=False)
    same(weights.to_torch(loaded.params["vae"]), tuned)
    own = pipeline.load_pipeline(model, with_denoiser=False)
    assert loaded.scaling == own.scaling == 0.5 and loaded.resolution == own.resolution
    first = pipeline.load_pipeline(with_own_vae(sources.open_folder(model), places["model"]), with_denoiser=False)
    ours, before = base_identity(loaded), base_identity(own)
    assert ours == base_identity(first) and {name for name in ours if ours[name] != before[name]} == {"base.vae"}
    assert not caplog.records


def test_the_model_s_own_vae_named_again_is_the_same_model(model):
    again = pipeline.load_pipeline(with_own_vae(sources.open_folder(model), model / "vae"), with_denoiser=False)
    assert base_identity(again) == base_identity(pipeline.load_pipeline(model, with_denoiser=False))


def test_a_file_without_a_vae_is_whole_with_one(model, places, tuned, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({n: v for n, v in load_file(places["whole file"]).items() if not n.startswith(single_file.VAE)}, file)
    config = tiny_config(tmp_path, file, model__like=str(model), model__vae=str(places["folder"]))
    source = find_base_model(config)
    same(weights.to_torch(pipeline.load_pipeline(source, with_denoiser=False).params["vae"]), tuned)
    assert title(config, source) == "model.safetensors with the VAE of alone"


def test_a_damaged_vae_is_replaced(model, places, tuned, tmp_path):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "vae" / WEIGHTS).write_bytes(b"cut")
    config = tiny_config(tmp_path, broken, model__vae=str(places["model's vae"]))
    source = find_base_model(config)
    same(weights.to_torch(pipeline.load_pipeline(source, with_denoiser=False).params["vae"]), tuned)
    assert title(config, source) == "broken with the VAE of model"


# Refused


def other_scale(folder: Path) -> None:
    set_json(folder / "config.json", scaling_factor=0.13025)


def other_sizes(folder: Path, **sizes: object) -> None:
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in (tiny.VAE | sizes).items()}
    levels = len(config["block_out_channels"])
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    set_json(folder / "config.json", **config, **kinds)
    network = pipeline.make_vae(json.loads((folder / "config.json").read_text()))
    save_file(weights.to_torch(tiny.random_params(network.shapes, 0)), folder / WEIGHTS)


SPOILT = {  # how, what the line says
    "scale": (other_scale, ("scales its latents by 0.13025, the model's own VAE by 0.5", "SDXL", "fine-tune")),
    "channels": (lambda f: other_sizes(f, latent_channels=16), ("16 channels", "takes 4", "fine-tune")),
    "levels": (
        lambda f: other_sizes(f, block_out_channels=(8, 8, 8)),
        ("makes pictures 4 times smaller, the model's own VAE 2 times",),
    ),
    "shifted": (lambda f: set_json(f / "config.json", shift_factor=0.1), ("shift_factor",)),
    "another network": (lambda f: set_json(f / "config.json", _class_name="AutoencoderTiny"), ("AutoencoderTiny",)),
    "weights of another": (lambda f: save_file({"x": np.zeros(1, np.float32)}, f / WEIGHTS), ("missing", "unexpected")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("holds no diffusion_pytorch_model.safetensors",)),
    "no folder": (shutil.rmtree, ("does not exist", "must name a VAE's folder")),
    "no config": (lambda f: (f / "config.json").unlink(), ("holds neither config.json", "must name a VAE's folder")),
}


@pytest.mark.parametrize(("spoil", "needles"), SPOILT.values(), ids=SPOILT)
def test_a_folder_that_does_not_fit_is_refused(model, places, tmp_path, spoil, needles):
    folder = Path(shutil.copytree(places["folder"], tmp_path / "spoilt"))
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    ended = run("sample", *tiny_flags(tmp_path, model, model__vae=folder), "--stage=0", f"--out={tmp_path}/x.png")
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    (line,) = ended.err.splitlines()
    assert str(folder) in line and [needle for needle in needles if needle not in line] == [], line
    assert "--config.model.path" not in line
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "prompts.txt") == before


def bare_with(places: dict[str, Path], path: Path, **tensors: np.ndarray) -> Path:
    save_file(load_file(places["bare names"]) | tensors, path)
    return path


def test_a_file_that_does_not_fit_is_refused(model, places, tmp_path):
    source = sources.open_folder(model)
    refused = lambda path, *needles: [needle for needle in needles if needle not in line(source, path)]
    wide = bare_with(places, tmp_path / "wide.safetensors", **{"decoder.conv_in.weight": np.zeros((8, 16, 3, 3), np.float32)})
    assert refused(wide, FLAG, str(wide), "16 channels") == []
    deep = bare_with(places, tmp_path / "deep.safetensors", **{"encoder.down.2.block.0.norm1.bias": np.zeros(8, np.float32)})
    assert refused(deep, FLAG, "4 times smaller, the model's own VAE 2 times") == []
    stray = bare_with(places, tmp_path / "stray.safetensors", **{"decoder.more.weight": np.zeros(8, np.float32)})
    assert refused(stray, FLAG, "decoder.more.weight", "left over") == []
    unet = model / "unet" / WEIGHTS
    assert refused(unet, FLAG, "holds no VAE", "encoder.down") == []
    (tmp_path / "vae.pt").write_bytes(b"\x80\x04.")
    assert refused(tmp_path / "vae.pt", FLAG, "a pickle may run code") == []


def line(source: sources.ModelSource, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        with_own_vae(source, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stranger_s_encoder_is_warned_of(model, tmp_path, caplog):
    """A file states no scale and no origin: SDXL's VAE has the very shapes of SD's."""
    other = tiny.write_model(tmp_path / "other", seed=7)
    shutil.copy(other / "vae" / WEIGHTS, tmp_path / "sdxl_vae.safetensors")
    with caplog.at_level(logging.WARNING):
        with_own_vae(sources.open_folder(model), tmp_path / "sdxl_vae.safetensors")
    assert "sdxl_vae.safetensors is no fine-tune of the model's own VAE" in caplog.text


# The hub


@pytest.mark.parametrize("form", ["folder", "model"])
def test_a_hub_s_vae_is_fetched_alone(model, places, tuned, tmp_path, monkeypatch, form):
    with FakeHub() as hub:
        connect(monkeypatch, hub.url, tmp_path / "home")
        hub.add_folder("me/vae", places[form])
        config = tiny_config(tmp_path, model, model__vae="me/vae")
        source = find_base_model(config)
        names = {f"vae/{name}" for name in ("config.json", WEIGHTS)} | {"model_index.json"}
        assert set(hub.fetched("me/vae")) == (names if form == "model" else {"config.json", WEIGHTS})
        commit = hub.models["me/vae"].commit
    same(weights.to_torch(pipeline.load_pipeline(source, with_denoiser=False).params["vae"]), tuned)
    assert title(config, source) == f"model with the VAE of me/vae@{commit}"
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert find_base_model(config).vae.origin == source.vae.origin
