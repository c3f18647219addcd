"""What a single file says of itself, in any form, is understood, refused, or listed; a file that is another thing is named."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import run, tiny_config, tiny_flags

from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.pretrained import single_file, sources
from proreflow_jax.run import open as opening

pytestmark = pytest.mark.usefixtures("quick")

EMPTY = np.zeros(0, np.float32)
LEVELS = make_schedule(**tiny.BETAS).alphas_cumprod


class Whole:
    """A model as a folder, and the tensors of the single file that it would be."""

    def __init__(self, folder: Path) -> None:
        self.folder, source = tiny.write_model(folder / "model"), sources.open_folder(folder / "model")
        parts = [single_file.to_original(n, source.tensors(n), source.config(n), source.family) for n in source.components]
        self.tensors = {name: value for part in parts for name, value in part.items()}

    def write(self, path: Path, metadata: dict[str, str] | None = None, **more: np.ndarray) -> Path:
        save_file(self.tensors | {name.replace("__", "."): value for name, value in more.items()}, path, metadata=metadata)
        return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


def scheduler(whole: Whole, path: Path) -> dict:
    return sources.open_file(path, whole.folder).config("scheduler")


V_FORMS = {
    "mark": ({}, {"v_pred": EMPTY}),
    "ModelSpec": ({"modelspec.prediction_type": "v"}, {}),
    "ModelSpec in full": ({"modelspec.prediction_type": "V_Prediction"}, {}),
    "ComfyUI": ({"modelspec.predict_key": "v"}, {}),
    "kohya": ({"ss_v_parameterization": "True"}, {}),
    "two forms": ({"modelspec.predict_key": "v"}, {"v_pred": EMPTY}),
}


@pytest.mark.parametrize(("metadata", "tensors"), V_FORMS.values(), ids=V_FORMS)
def test_v_prediction_is_heard_in_every_form(whole, tmp_path, metadata, tensors):
    path = whole.write(tmp_path / "v.safetensors", metadata, **tensors)
    assert scheduler(whole, path)["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("metadata", [{}, {"modelspec.prediction_type": "epsilon"}, {"ss_v_parameterization": "False"}])
def test_epsilon_stays_epsilon(whole, tmp_path, metadata):
    assert scheduler(whole, whole.write(tmp_path / "e.safetensors", metadata))["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [({}, {"ztsnr": EMPTY}), ({"ss_zero_terminal_snr": "True"}, {})],
    ids=["mark", "kohya"],
)
def test_zero_terminal_snr_is_heard_in_every_form(whole, tmp_path, metadata, tensors):
    assert scheduler(whole, whole.write(tmp_path / "z.safetensors", metadata, **tensors))["rescale_betas_zero_snr"] is True


REFUSED = {
    "contradiction": ({"modelspec.prediction_type": "epsilon"}, {"v_pred": EMPTY}, ("contradicts itself", "v_pred")),
    "unknown type": ({"modelspec.prediction_type": "flow"}, {}, ("modelspec.prediction_type='flow'", "epsilon")),
    "EDM": ({}, {"edm_mean": EMPTY, "edm_std": EMPTY}, ("Playground", "edm_mean")),
    "EDM's v": ({}, {"edm_vpred__sigma_max": np.ones((), np.float32)}, ("CosXL", "edm_vpred.sigma_max")),
}


@pytest.mark.parametrize(("metadata", "tensors", "needles"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused(whole, tmp_path, metadata, tensors, needles):
    with pytest.raises(ValueError) as caught:
        scheduler(whole, whole.write(tmp_path / "x.safetensors", metadata, **tensors))
    assert all(needle in str(caught.value) for needle in (*needles, "x.safetensors", "--config.model.path")), caught.value
    assert "\n" not in str(caught.value)


def test_the_rest_is_listed(whole, tmp_path, caplog):
    more = {"model_ema__decay": EMPTY, "model_ema__updates": EMPTY, "control_model__x": EMPTY, "v_pred": EMPTY}
    metadata = {"modelspec.encoder_layer": "2", "modelspec.timestep_range": "0,1000", "modelspec.title": "mine"}
    with caplog.at_level(logging.INFO):
        scheduler(whole, whole.write(tmp_path / "x.safetensors", metadata, alphas_cumprod=LEVELS.astype(np.float32), **more))
    first, second = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert first == "x.safetensors: left out, for no part of the model has a place for them: control_model, model_ema (2)"
    assert second == "x.safetensors: its metadata is not followed in modelspec.encoder_layer='2'; not read: modelspec.title"


def test_metadata_beyond_the_known_words_is_listed_in_one_line(whole, tmp_path, caplog):
    read = {"format": "pt", "modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False", "ss_clip_skip": "None"}
    others = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1", "recipe": "{}"}
    many = {f"ss_field_{i}": "x" * 1000 for i in range(60)}

    def said(**metadata: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            scheduler(whole, whole.write(tmp_path / "x.safetensors", metadata))
        return [record.getMessage() for record in caplog.records]

    assert said(**read) == []
    (line,) = said(**read, **others)
    assert line == "x.safetensors: metadata that is not read: modelspec.architecture, recipe, ss_base_model_version"
    assert said(ss_clip_skip="2") == ["x.safetensors: its metadata is not followed in ss_clip_skip='2'"]
    (line,) = said(**read, **others, **many)
    assert line.endswith(" and 51 more") and len(line) < 300 and "\n" not in line
    (line,) = said(**{"a\nb": "c", "d" * 900: "e"})
    assert "\n" not in line and len(line) < 300


def opened(whole: Whole, tmp_path: Path, levels: np.ndarray) -> None:
    path = whole.write(tmp_path / "x.safetensors", alphas_cumprod=levels)
    opening.open_outline(tiny_config(tmp_path, path, model__like=str(whole.folder)), jax.devices())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_table_that_is_the_schedules_is_fine(whole, tmp_path, dtype):
    opened(whole, tmp_path, LEVELS.astype(dtype))


def test_another_table_of_noise_levels_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"x\.safetensors has noise levels of its own .*--config.model.like") as caught:
        opened(whole, tmp_path, make_schedule("linear", 1e-4, 2e-2).alphas_cumprod.astype(np.float32))
    assert "zero terminal" not in str(caught.value)
    root = np.sqrt(LEVELS)
    zero = (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).astype(np.float32)
    with pytest.raises(ValueError, match=r"zero terminal SNR"):
        opened(whole, tmp_path, zero)


def test_a_table_of_nothing_is_listed(whole, tmp_path, caplog):
    opened(whole, tmp_path, np.zeros(1000, np.float32))
    assert "alphas_cumprod is no table of noise levels" in caplog.text


FIRST = f"{single_file.UNET}input_blocks.0.0.weight"


def channels(tensors: dict, count: int) -> dict:
    return tensors | {FIRST: np.zeros((8, count, 3, 3), np.float32)}


OTHERS = {  # how the file is made of a whole one; what the line says
    "no VAE": (
        lambda t: {n: v for n, v in t.items() if not n.startswith(single_file.VAE)},
        ("holds no vae", "first_stage_model."),
    ),
    "inpainting": (lambda t: channels(t, 9), ("a model for inpainting", "9 channels")),
    "editing": (lambda t: channels(t, 8), ("a model for editing", "8 channels")),
    "depth": (lambda t: channels(t, 5), ("a model for depth maps", "5 channels")),
    "LCM": (lambda t: t | {f"{single_file.UNET}time_embed.cond_proj.weight": EMPTY}, ("an LCM", "distil its base model")),
}


@pytest.mark.parametrize(("make", "needles"), OTHERS.values(), ids=OTHERS)
def test_a_whole_file_of_another_thing_is_named(whole, tmp_path, make, needles):
    """Not "download it again": it is as it was published."""
    save_file(make(whole.tensors), tmp_path / "x.safetensors")
    flags = tiny_flags(tmp_path, tmp_path / "x.safetensors", model__like=whole.folder)
    ended = run("sample", *flags, "--stage=0", f"--out={tmp_path}/x.png")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1, ended.err
    assert all(needle in ended.err for needle in (*needles, "x.safetensors", "--config.model.path")), ended.err
    assert "again" not in ended.err


@pytest.mark.parametrize("name", ["UPPER.SAFETENSORS", "Mixed.SafeTensors"])
def test_the_endings_letters_may_be_large(whole, tmp_path, name):
    assert sources.file_family(whole.write(tmp_path / name)) == "v1"
    assert not sources.is_id(f"owner/{name}")
    assert load_file(tmp_path / name)
