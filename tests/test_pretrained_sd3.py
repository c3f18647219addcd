"""Folders of Stable Diffusion 3 and 3.5: read as diffusers reads them, refused by one line, written back in every bit."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
import tiny_sd3  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiny import quick_jit  # noqa: E402

from proreflow_jax.exports import formats, write  # noqa: E402
from proreflow_jax.pretrained import lora_file, pipeline, sources, t5_tokenizer, weights  # noqa: E402

PROMPTS = ("a digit", "a photo of the number two, and of much more than a tokenizer of eight tokens takes", "")
LONG = " ".join(["a photo of the digit seven"] * 60)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A whole SD 3.5 medium, and an SD 3 medium without T5."""
    home = tmp_path_factory.mktemp("models")
    return {"whole": tiny_sd3.write(home / "whole"), "without": tiny_sd3.write(home / "without", "3-medium", t5=False)}


def edited(folder: Path, target: Path, name: str, **fields) -> Path:
    """A copy in which a JSON file has other fields; None takes one out."""
    path = Path(shutil.copytree(folder, target)) / name
    changed = json.loads(path.read_text()) | fields
    path.write_text(
        json.dumps({key: value for key, value in changed.items() if value is not None or name == "model_index.json"})
    )
    return target


def line(call, *args) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bits(tensors) -> dict:
    return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in tensors.items()}


def close(ours, theirs, tolerance=1e-4):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1)


@pytest.mark.parametrize("kind", ["whole", "without"])
def test_text_and_network_are_diffusers_own(models, kind):
    """States of three encoders, or of two with zeros in T5's place (one row here stands for diffusers' 256)."""
    model, pipe = pipeline.load_pipeline(models[kind]), tiny_sd3.stock(models[kind])
    assert (model.denoiser_name, model.latent_shape, model.resolution) == ("transformer", tiny_sd3.LATENT, tiny_sd3.SIDE)
    assert model.scaling == tiny_sd3.SCALING and model.source.family == "sd3"
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=False)
        z = torch.randn((3, 16, 4, 4), generator=torch.Generator().manual_seed(0))
        fed = torch.tensor([999.0, 500.0, 3.0])
        out = pipe.transformer(z, states, pooled, fed, return_dict=False)[0]
    context = quick_jit(model.condition)(model.text, jnp.asarray(model.tokenizer.encode(PROMPTS)))
    length = states.shape[1] if kind == "whole" else states.shape[1] - t5_tokenizer.LENGTH + 1
    close(context.states, states[:, :length])
    close(context.pooled, pooled)
    ours = quick_jit(model.denoiser.apply)(
        model.params["transformer"], jnp.asarray(z.numpy().transpose(0, 2, 3, 1)), jnp.asarray(fed.numpy()), *context
    )
    close(ours, out.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", ["whole", "without"])
def test_parameters_are_the_files_in_every_bit(models, kind):
    model = pipeline.load_pipeline(models[kind])
    for name in model.source.components:
        stored = {key: np.asarray(value) for key, value in weights.read_tensors(models[kind] / name).items()}
        assert bits(weights.to_torch(model.params[name])) == bits(stored)
    outline = pipeline.outline_pipeline(model.source)
    assert {name: outline.params[name].keys() for name in outline.params} == {n: p.keys() for n, p in model.params.items()}
    assert outline.tokenizer.length == model.tokenizer.length


@pytest.mark.parametrize("kind", ["whole", "without"])
def test_a_folder_is_written_back_equal(models, tmp_path, kind):
    source = sources.open_folder(models[kind])
    write.check_copies(source)
    student = {name: np.asarray(value) for name, value in source.tensors("transformer").items()}
    write.write_folder(tmp_path, source, student, source.config("scheduler"))
    files = lambda root: {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert files(tmp_path) == files(models[kind])
    for name in files(tmp_path):
        one, other = tmp_path / name, models[kind] / name
        if name.endswith("index.json") or name.startswith("scheduler/"):
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        elif name.endswith(".safetensors"):
            assert bits(load_file(one)) == bits(load_file(other))
        else:
            assert one.read_bytes() == other.read_bytes()
    pipe = tiny_sd3.stock(tmp_path)
    assert type(pipe).__name__ == "StableDiffusion3Pipeline" and type(pipe.scheduler).__name__.startswith("FlowMatchEuler")
    assert formats.denoiser_file(source.denoiser_name).as_posix() in files(tmp_path)


def test_t5_in_shards_is_read_and_handed_on(models, tmp_path):
    folder = Path(shutil.copytree(models["whole"], tmp_path / "shards"))
    place = folder / "text_encoder_3"
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, keys in shards.items():
        weights.save_tensors(place / name, {key: tensors[key] for key in keys})
    table = {key: name for name, keys in shards.items() for key in keys}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    source = sources.open_folder(folder)
    assert bits(dict(source.tensors("text_encoder_3"))) == bits(tensors)
    (tmp_path / "out").mkdir()
    write.write_folder(tmp_path / "out", source, dict(source.tensors("transformer")), source.config("scheduler"))
    assert {p.name for p in (tmp_path / "out" / "text_encoder_3").iterdir()} == {p.name for p in place.iterdir()}
    assert tiny_sd3.stock(tmp_path / "out").text_encoder_3.shared.weight.shape[1] == tiny_sd3.STATES


def test_t5s_ids_are_those_of_transformers(models, caplog):
    stock = tiny_sd3.stock(models["whole"]).tokenizer_3
    ours = t5_tokenizer.load_t5_tokenizer(models["whole"] / "tokenizer_3", {"vocab_size": 40})
    texts = [*PROMPTS, LONG, "two  spaces\nand a line", "Ünïcode ﬁ 漢字", "<extra_id_0> a </s> b"]
    theirs = stock(texts, padding="max_length", max_length=t5_tokenizer.LENGTH, truncation=True, return_tensors="np").input_ids
    assert np.array_equal(ours.encode(texts), theirs)
    assert len([record for record in caplog.records if "cut to the 256" in record.message]) == 1
    assert ours.encode([LONG])[0, -1] == 1 and ours.length == 256


def test_a_tokenizer_that_is_not_read_is_refused(models, tmp_path):
    folder = Path(shutil.copytree(models["whole"] / "tokenizer_3", tmp_path / "tokenizer_3"))
    said = line(t5_tokenizer.load_t5_tokenizer, folder, {"vocab_size": 20})
    assert "has id" in said and "20 rows" in said
    (folder / "tokenizer.json").write_text("{}")
    assert "no readable tokenizer" in line(t5_tokenizer.load_t5_tokenizer, folder, {"vocab_size": 40})
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in line(t5_tokenizer.load_t5_tokenizer, folder, {"vocab_size": 40})
    (folder / "spiece.model").write_bytes(b"\x0a")
    said = line(t5_tokenizer.load_t5_tokenizer, folder, {"vocab_size": 40})
    assert "spiece.model" in said and "save_pretrained" in said


REFUSED = [
    ("model_index.json", {"text_encoder_2": [None, None]}, ("no text_encoder_2", "SD 3.5")),
    ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, ("its text_encoder is a CLIPTextModel",)),
    ("model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]}, ("UMT5EncoderModel",)),
    ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, ("no unet",)),
    ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, ("transformer/config.json", "Flux", "SD3Trans")),
    ("transformer/config.json", {"qk_norm": "layer_norm"}, ('qk_norm="layer_norm"', "must be rms_norm, or null")),
    ("transformer/config.json", {"caption_projection_dim": 24}, ("caption_projection_dim=24", "16", "one attention")),
    ("transformer/config.json", {"joint_attention_dim": None}, ("lacks joint_attention_dim",)),
    ("transformer/config.json", {"dual_attention_layers": "0,1"}, ("dual_attention_layers", "a list of whole numbers")),
    ("transformer/config.json", {"in_channels": 4}, ("the transformer takes 4 channels", "the VAE gives 16")),
    ("transformer/config.json", {"pooled_projection_dim": 21}, ("pooled states of width 21", "give 20")),
    ("text_encoder_3/config.json", {"d_model": "24"}, ('d_model="24"', "a whole number")),
    ("text_encoder_3/config.json", {"feed_forward_proj": "relu"}, ("feed_forward_proj",)),
    ("vae/config.json", {"latents_mean": [0.0] * 16}, ("latents_mean",)),
    ("vae/config.json", {"shift_factor": "0.06"}, ("shift_factor", "a number, or null")),
    ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True, "max_image_seq_len": 256}, ("max_image_seq_len=256",)),
    ("scheduler/scheduler_config.json", {"base_image_seq_len": 2.5}, ("base_image_seq_len=2.5", "whole number")),
    ("scheduler/scheduler_config.json", {"shift": 0}, ("shift=0", "a number above 0")),
]


@pytest.mark.parametrize(("name", "fields", "needles"), REFUSED, ids=[f"{n} {' '.join(f)}" for n, f, _ in REFUSED])
def test_another_model_is_refused_in_one_line(models, tmp_path, name, fields, needles):
    said = line(pipeline.load_pipeline, edited(models["whole"], tmp_path / "strange", name, **fields))
    assert all(needle in said for needle in needles), said


def test_a_shift_by_resolution_is_read_at_the_models_own(models, tmp_path):
    """Four image tokens: mu = 0.5 + 0.65 (4 - 256) / 3840, and the scheduler is told that shift from then on."""
    moving = {"use_dynamic_shifting": True, "shift": None}
    folder = edited(models["without"], tmp_path / "moving", "scheduler/scheduler_config.json", **moving)
    for opened in (pipeline.load_pipeline(folder), pipeline.outline_pipeline(sources.open_folder(folder))):
        assert opened.scheduler["shift"] == pytest.approx(np.exp(0.5 - 0.65 * 252 / 3840))
        assert opened.scheduler["use_dynamic_shifting"] is False


def test_a_named_t5_must_be_there(models, tmp_path):
    folder = Path(shutil.copytree(models["whole"], tmp_path / "half"))
    shutil.rmtree(folder / "text_encoder_3")
    assert "text_encoder_3" in line(pipeline.load_pipeline, folder)


def test_no_layers_are_skipped(models):
    said = line(sources.skip_layers, sources.open_folder(models["whole"]), 1)
    assert "SD 3 reads the states before the last layer" in said


def test_diffusers_reads_a_lora_of_every_layer_as_the_student(models, tmp_path):
    """Both sides of joint attention, the second attention, modulations, embeddings."""
    pytest.importorskip("peft")
    pipe, base = tiny_sd3.stock(models["whole"]), weights.read_tensors(models["whole"] / "transformer")
    rng = np.random.default_rng(0)
    noise = lambda v: (0.5 * v.std() * rng.standard_normal(v.shape)).astype(np.float32)
    student = {name: base[name] + noise(base[name]) if base[name].ndim in (2, 4) else base[name] for name in base}
    factors, _ = lora_file.decompose(lora_file.delta(student, base), 1000)
    assert {"attn.add_q_proj", "attn.to_add_out", "attn2.to_q"} <= {
        n.split(".", 2)[2].removesuffix(".weight") for n in factors if n[:12] == "transformer_"
    }
    file = lora_file.to_peft(factors, component="transformer")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in file
    weights.save_tensors(tmp_path / "lora.safetensors", file)
    read = lora_file.from_peft(weights.Tensors([tmp_path / "lora.safetensors"]), base, "transformer")
    merged = lora_file.apply_factors(base, read)
    assert max(float(np.abs(merged[n] - student[n]).max()) for n in base) < 1e-5
    normal = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = (normal(2, 16, 4, 4), normal(2, 9, tiny_sd3.STATES), normal(2, tiny_sd3.POOLED), torch.tensor([900.0, 20.0]))
    answer = lambda: pipe.transformer(*given, return_dict=False)[0].detach().numpy()
    before = answer()
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = answer()
    pipe.unload_lora_weights()
    pipe.transformer.load_state_dict({name: torch.from_numpy(value) for name, value in student.items()})
    gap = lambda one, other: float(np.abs(one - other).max() / np.abs(other).max())
    assert gap(before, answer()) > 0.1 and gap(loaded, answer()) < 1e-3
