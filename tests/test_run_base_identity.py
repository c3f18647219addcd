"""What pairs depend on beside the UNet: each part of the base model changes its own hash, and no other."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from proreflow_jax.data import captions, digits
from proreflow_jax.pretrained.pipeline import load_pipeline
from proreflow_jax.run.base_identity import base_identity

WEIGHTS = {"text_encoder": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}


def identity(folder: Path) -> dict[str, str]:
    return base_identity(load_pipeline(folder, with_denoiser=False))


@pytest.fixture(scope="module")
def own(model: Path) -> dict[str, str]:
    return identity(model)


def spoil_weights(folder: Path, component: str) -> None:
    path = folder / component / WEIGHTS[component]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, path)


def set_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CHANGES = {
    "text_encoder": lambda folder: spoil_weights(folder, "text_encoder"),
    "text_encoder ": lambda folder: set_json(folder / "text_encoder" / "config.json", hidden_act="gelu"),
    "vae": lambda folder: spoil_weights(folder, "vae"),
    "vae ": lambda folder: set_json(folder / "vae" / "config.json", scaling_factor=0.25),
    "unet": lambda folder: set_json(folder / "unet" / "config.json", attention_head_dim=4),
    "schedule": lambda folder: set_json(folder / "scheduler" / "scheduler_config.json", beta_end=0.013),
    "tokenizer": lambda folder: set_json(folder / "tokenizer" / "tokenizer_config.json", pad_token="!"),
    "index": lambda folder: set_json(folder / "model_index.json", force_zeros_for_empty_prompt=True),
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_changes_its_own_hash(model, own, tmp_path, part):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    CHANGES[part](folder)
    other = identity(folder)
    assert {name for name in own if own[name] != other[name]} == {f"base.{part.strip()}"}


def test_where_a_model_lies_and_whence_it_comes_change_nothing(model, own, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    set_json(folder / "unet" / "config.json", _name_or_path="elsewhere", _diffusers_version="1")
    set_json(folder / "scheduler" / "scheduler_config.json", steps_offset=1, timestep_spacing="leading")
    assert identity(folder) == own


def test_a_tfds_folder_that_was_prepared_anew_is_another(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        digits.write_dataset(tmp_path / name, 8, seed=seed)
    one, same, other = (captions.tfds_identity(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
