"""Stable Diffusion in, and back out: whatever form a model lies in, no bit of it is lost, and a stranger is named."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import quick_jit

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import families  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from proreflow_jax.flow.schedule import from_config, make_schedule  # noqa: E402
from proreflow_jax.models.network import Context  # noqa: E402
from proreflow_jax.pretrained import pipeline, single_file, sources, tokenizer, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
each_family = pytest.mark.parametrize("family", families.FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
STRANGERS = {  # beside the model in files that people have: averaged weights, buffers of training, tensors of other tools
    "model_ema.decay": np.array([0.9999], np.float32),
    "model_ema.num_updates": np.array([7], np.int32),
    "model_ema.diffusion_modelconv_inweight": np.full((2, 2), np.nan, np.float32),
    "alphas_cumprod": make_schedule("scaled_linear", 0.00085, 0.012).alphas_cumprod.astype(np.float32),
    "betas": np.zeros(1000, np.float32),
    "denoiser.sigmas": np.zeros(1000, np.float32),
    "logvar": np.zeros(1000, np.float32),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family as diffusers saves it."""
    folder = tmp_path_factory.mktemp("families")
    return {family: families.write(folder / family, family, seed) for seed, family in enumerate(families.FAMILIES)}


def stored(source: sources.ModelSource, dtype: Any = None) -> dict[str, dict[str, np.ndarray]]:
    """All tensors by component, in `dtype` where one is named."""
    take = lambda tensors: {n: v if dtype is None else v.astype(dtype) for n, v in tensors.items()}
    return {name: take(source.tensors(name)) for name in source.components}


def single(source: sources.ModelSource, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The model as one file, each component under its prefix."""
    parts = (single_file.to_original(n, t, source.config(n), source.family) for n, t in tensors.items())
    return {name: value for part in parts for name, value in part.items()}


def write_single(path: Path, folder: Path, dtype: Any = np.float32, **marks: np.ndarray) -> Path:
    source = sources.open_folder(folder)
    save_file({**single(source, stored(source, dtype)), **STRANGERS, **marks}, path)
    return path


def same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert sorted(found) == sorted(wanted)
    for name, value in found.items():
        assert (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype), name
        assert value.tobytes() == np.ascontiguousarray(wanted[name]).tobytes(), name


def bare(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A text encoder's names without what transformers 5 leaves out, and 4 writes; all of them read both."""
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def told(model: pipeline.Pipeline, *prompts: str) -> Context:
    """What the UNet is told."""
    return quick_jit(model.condition)(model.text, model.tokenizer.encode(prompts))


def edited(folder: Path, target: Path, name: str, **fields: object) -> Path:
    """A copy of a model with other fields in one of its JSON files; None removes a field."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text()) | fields
    (target / name).write_text(json.dumps({field: value for field, value in content.items() if value is not None}))
    return target


def line(action: Callable[..., object], *arguments: Any, **keywords: Any) -> str:
    """The one line that an action is refused with."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        action(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def has(text: str, *needles: str) -> None:
    assert [needle for needle in needles if needle not in text] == [], text


# Round trips


@each_family
@each_dtype
def test_folder_to_ours_to_folder_keeps_every_bit(models, tmp_path, family, dtype):
    """Written by diffusers (cast), read as the verbs do, written as export does, read again."""
    folder = shutil.copytree(models[family], tmp_path / "cast")
    before = stored(sources.open_folder(models[family]), dtype)
    for name, tensors in before.items():
        save_file(tensors, folder / name / weights.file_name(name))
    ours = pipeline.load_pipeline(folder)
    assert {value.dtype for params in ours.params.values() for value in params.values()} == {np.dtype(np.float32)}
    for name, params in ours.params.items():
        weights.save_tensors(folder / name / weights.file_name(name), weights.to_torch(params, dtype))
    after = stored(sources.open_folder(folder))
    for name in before:
        same(bare(after[name]), bare(before[name]))


@each_family
@each_dtype
def test_single_file_to_ours_to_single_file_keeps_every_bit(models, tmp_path, family, dtype):
    path = write_single(tmp_path / "model.safetensors", models[family], dtype)
    before = {name: value for name, value in load_file(path).items() if name not in STRANGERS}
    source = sources.open_file(path, models[family])
    ours = pipeline.load_pipeline(source)
    assert (source.family, source.origin) == (family, path)
    same(single(source, {name: weights.to_torch(params, dtype) for name, params in ours.params.items()}), before)


@each_family
def test_a_single_file_is_the_same_model_as_the_folder(models, tmp_path, family):
    """What else lies in it, NaN in its averaged weights even, is neither read nor missed."""
    folder = pipeline.load_pipeline(models[family])
    file = pipeline.load_pipeline(
        sources.open_file(write_single(tmp_path / "model.safetensors", models[family]), models[family])
    )
    assert file.params.keys() == folder.params.keys() and file.scheduler == folder.scheduler
    for name in folder.params:
        same(file.params[name], folder.params[name])


# What a source says of itself


@each_family
def test_the_family_and_its_components_are_recognised(models, tmp_path, family):
    source = sources.open_folder(models[family])
    assert (source.family, source.origin, source.file) == (family, models[family], None)
    second = ["text_encoder_2"] if family == "xl" else []
    assert source.components == ["unet", "vae", "text_encoder", *second]
    assert sources.file_family(write_single(tmp_path / "model.safetensors", models[family])) == family


def test_marks_in_a_file_say_how_it_is_read(models, tmp_path):
    mark = np.zeros(0, np.float32)  # as UIs write them: empty tensors
    plain = write_single(tmp_path / "plain.safetensors", models["xl"])
    v = write_single(tmp_path / "v.safetensors", models["xl"], v_pred=mark)
    zero = write_single(tmp_path / "zero.safetensors", models["xl"], v_pred=mark, ztsnr=mark)
    read = lambda path: sources.open_file(path, models["xl"]).config("scheduler")
    assert read(plain)["prediction_type"] == "epsilon"
    assert read(v)["prediction_type"] == "v_prediction"
    assert from_config(read(v)).alphas_cumprod.shape == (1000,)
    has(line(from_config, read(zero)), "rescale_betas_zero_snr", "alpha(1) = 0 leaves the image undetermined")


def test_a_word_of_the_config_goes_before_that_of_the_model(models):
    assert pipeline.load_pipeline(models["v2"]).scheduler["prediction_type"] == "v_prediction"
    assert pipeline.load_pipeline(models["v2"], prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"


def test_a_single_file_brings_no_safety_checker(tmp_path):
    """It has none in it, and the folder beside it may be there without its weights."""
    folder = families.write(tmp_path / "checked", "v1", safety=True)
    assert sources.open_folder(folder).index["safety_checker"][0] is not None
    source = sources.open_file(write_single(tmp_path / "model.safetensors", folder), folder)
    assert source.index["safety_checker"] == [None, None]
    shutil.rmtree(folder / "safety_checker")
    for weight in folder.rglob("*.safetensors"):
        weight.unlink()
    assert sorted(pipeline.load_pipeline(source).params) == ["text_encoder", "unet", "vae"]


# Conditioning


def test_two_tokenizers_stand_side_by_side(models):
    """Each with its own padding; the sum of lengths; one row of ids for both."""
    one, two = (tokenizer.load_tokenizer(models["xl"] / name) for name in ("tokenizer", "tokenizer_2"))
    both = pipeline.load_pipeline(models["xl"]).tokenizer
    prompts = ["", "a handwritten zero", "five " * 30]
    ids = both.encode(prompts)
    assert both.length == one.length + two.length and ids.shape == (3, both.length) and ids.dtype == np.int32
    assert np.array_equal(ids, np.concatenate([one.encode(prompts), two.encode(prompts)], axis=1))
    assert not np.array_equal(ids[:, : one.length], ids[:, one.length :])  # "!" and the end token
    assert pipeline.load_pipeline(models["v1"]).tokenizer.length == one.length


def test_tokenizers_of_two_lengths_are_refused(models, tmp_path):
    folder = edited(models["xl"], tmp_path / "long", "tokenizer_2/tokenizer_config.json", model_max_length=9)
    has(line(pipeline.load_pipeline, folder), "8 and 9 tokens")


@pytest.mark.parametrize("forced", [True, False])
def test_only_the_empty_prompt_is_told_as_zeros_and_only_where_the_model_says_so(models, tmp_path, forced):
    folder = edited(models["xl"], tmp_path / "model", "model_index.json", force_zeros_for_empty_prompt=forced)
    states, pooled, sizes = told(pipeline.load_pipeline(folder), "a three", "", "!", "five")
    empty = lambda values: [not np.any(row) for row in np.asarray(values)]
    assert empty(states) == empty(pooled) == [False, forced, False, False]
    assert np.array_equal(sizes, np.tile([8, 8, 0, 0, 8, 8], (4, 1)))  # the model's own resolution


def test_micro_conditioning_is_in_the_order_of_diffusers(models):
    sizes = {"original_size": (64, 48), "crop": (3, 5), "target_size": (16, 24)}
    theirs = families.make("xl")._get_add_time_ids(*sizes.values(), torch.float32, families.POOLED)
    assert np.array_equal(told(pipeline.load_pipeline(models["xl"], **sizes), "five").time_ids, theirs.numpy())


# Strangers


def test_a_folder_of_another_family_beside_a_file_is_refused(models, tmp_path):
    for family in families.FAMILIES:
        path = write_single(tmp_path / f"{family}.safetensors", models[family])
        for other in set(families.FAMILIES) - {family}:
            said = line(sources.open_file, path, models[other])
            has(said, str(path), f"family {family}", f"{models[other]} a folder of {other}", "--config.model.like")
    has(line(sources.open_file, path, tmp_path / "none"), str(tmp_path / "none"), "does not exist", "--config.model.like")


def test_a_refiner_is_refused(models, tmp_path):
    """It has the second text encoder only, another reading of sizes, and pictures as its input."""
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
    folder = edited(models["xl"], tmp_path / "refiner", "model_index.json", **index)
    has(
        line(sources.open_folder, folder),
        "StableDiffusionXLImg2ImgPipeline",
        "no text_encoder",
        "SDXL base",
        "--config.model.path",
    )
    folder = edited(models["xl"], tmp_path / "five", "unet/config.json", projection_class_embeddings_input_dim=12 + 5 * 8)
    has(line(pipeline.load_pipeline, folder), "refiner", "52", "60")


def test_a_model_with_further_channels_is_refused(models, tmp_path):
    """Inpainting has nine."""
    folder = edited(models["v1"], tmp_path / "inpainting", "unet/config.json", in_channels=9)
    has(line(pipeline.load_pipeline, folder), "9 channels", "inpainting", "--config.model.path")


@pytest.mark.parametrize(
    ("name", "fields", "needles"),
    [
        (
            "model_index.json",
            {"unet": None, "transformer": ["diffusers", "SD3Transformer2DModel"]},
            ("a CLIPTextModel", "SD 3"),
        ),
        ("model_index.json", {"unet": None, "transformer": ["diffusers", "FluxTransformer2DModel"]}, ("no unet", "SDXL base")),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, ("unet is a UNet3DConditionModel",)),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, ("T5EncoderModel",)),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, ("vae is a AutoencoderTiny",)),
        ("model_index.json", {"vae": "AutoencoderKL"}, ("no vae",)),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, ("vae", "AutoencoderTiny", "AutoencoderKL")),
        ("vae/config.json", {"shift_factor": 0.1}, ("shift_factor", "only scaled")),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, ("latents_mean",)),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, ("text_encoder", "T5EncoderModel")),
        ("text_encoder/config.json", {"hidden_size": None}, ("text_encoder", "lacks hidden_size")),
        ("unet/config.json", {"_class_name": "AutoencoderKL"}, ("unet", "AutoencoderKL", "UNet2DConditionModel")),
        ("unet/config.json", {"class_embed_type": "timestep"}, ("class_embed_type='timestep'",)),
        ("unet/config.json", {"cross_attention_dim": None, "sample_size": None}, ("lacks cross_attention_dim, sample_size",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_another_architecture_is_refused(models, tmp_path, name, fields, needles):
    folder = edited(models["v1"], tmp_path / "strange", name, **fields)
    said = line(pipeline.load_pipeline, folder)
    has(said, *needles)
    if "class_embed_type" not in fields:  # models/unet.py sees a config only, not where it lies
        has(said, str(folder), "--config.model.path")


def test_weights_in_eight_bits_are_refused(models, tmp_path):
    folder = Path(shutil.copytree(models["v1"], tmp_path / "eight"))
    save = pytest.importorskip("safetensors.torch").save_file
    path = folder / "unet" / weights.file_name("unet")
    save({n: torch.from_numpy(v).to(torch.float8_e4m3fn) for n, v in load_file(path).items()}, path)
    has(line(pipeline.load_pipeline, folder), str(path), "F8_E4M3", "float16")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_text_encoder_may_count_one_layer_less_than_its_file_has(models, tmp_path, caplog, form):
    """As models for "clip skip" do; transformers reads the layers that the config counts, and so do we."""
    folder = edited(models["v1"], tmp_path / "skip", "text_encoder/config.json", num_hidden_layers=1)
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")
    source = sources.open_folder(folder)
    if form == "file":
        source = sources.open_file(write_single(tmp_path / "model.safetensors", models["v1"]), folder)
    with caplog.at_level(logging.INFO):
        ours = pipeline.load_pipeline(source)
    prompts = ("a three", "five")
    ids = ours.tokenizer.encode(prompts)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(told(ours, *prompts).states, expected, atol=1e-5)
    assert "leaves out the last layer of the file" in caplog.text and source.layers_left_out("text_encoder") == 1


def test_two_layers_less_are_another_model(models, tmp_path):
    folder = edited(models["v1"], tmp_path / "less", "text_encoder/config.json", num_hidden_layers=1)
    path = folder / "text_encoder" / weights.file_name("text_encoder")
    tensors = load_file(path)
    save_file(tensors | {n.replace("layers.1.", "layers.2."): v for n, v in tensors.items()}, path)
    has(line(pipeline.load_pipeline, folder), "16 unexpected", "layers.2.", "of two models")


def test_a_layer_that_is_missing_is_still_missing(models, tmp_path):
    folder = edited(models["v1"], tmp_path / "more", "text_encoder/config.json", num_hidden_layers=3)
    has(line(pipeline.load_pipeline, folder), "16 missing", "layers.2.", "of two models")


# Reading


@pytest.mark.parametrize("form", ["folder", "file"])
def test_each_tensor_is_read_when_it_is_asked_for_and_once(models, tmp_path, monkeypatch, form):
    """Opening reads none; a look at a component's names reads none; loading reads each of the model's, and nothing else."""
    path = write_single(tmp_path / "model.safetensors", models["v1"])
    taken, part = Counter(), weights.Tensors.part
    monkeypatch.setattr(weights.Tensors, "part", lambda self, name, at: taken.update([name]) or part(self, name, at))
    source = sources.open_file(path, models["v1"]) if form == "file" else sources.open_folder(models["v1"])
    names = {name: sorted(source.tensors(name)) for name in source.components}
    assert "conv_in.weight" in source.tensors("unet") and not taken
    pipeline.load_pipeline(source)
    assert set(taken.values()) == {1}
    if form == "file":
        assert set(taken) == load_file(path).keys() - STRANGERS.keys()
    else:
        read = sum(not weights.IGNORED.search(name) for each in names.values() for name in each)
        assert read >= sum(taken.values()) > len(names["unet"])
