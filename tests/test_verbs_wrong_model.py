"""A wrong model ends a verb with one line that says what to do and exit code 2: no traceback, and not a byte written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from verb import PROMPTS, run, tiny_flags

from proreflow_jax.pretrained import single_file, sources

pytestmark = pytest.mark.usefixtures("quick")

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
WORDS_CONFIG = "tokenizer/tokenizer_config.json"
PATH, LIKE = "--config.model.path", "--config.model.like"


class Models(NamedTuple):
    """A whole model in both forms. Tests copy what they spoil."""

    folder: Path
    file: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tiny.write_model(tmp_path_factory.mktemp("whole") / "model")
    source, file = sources.open_folder(folder), folder.with_name("model.safetensors")
    parts = [single_file.to_original(n, source.tensors(n), source.config(n), source.family) for n in source.components]
    save_file({name: value for part in parts for name, value in part.items()}, file)
    return Models(folder, file)


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No network and an empty cache for the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def refused(folder: Path, path: Path | str, *needles: str, verb: str = "sample", **fields: object) -> None:
    """Runs the verb on the model and holds it to the promise; the line must hold every needle."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    written = lambda: sorted(str(found) for found in folder.rglob("*"))
    before, own = written(), ["--stage=0", f"--out={folder}/x.png"] if verb == "sample" else []
    ended = run(verb, *tiny_flags(folder, path, **fields), *own)
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert ended.out == "" and line.startswith(f"{verb}: ") and "Traceback" not in line
    assert [needle for needle in needles if needle not in line] == [], line
    assert written() == before


def change(folder: Path, name: str, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Edits the tensors of a file."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def fields(folder: Path, name: str, **values: object) -> None:
    """Sets fields of a JSON file."""
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def without(folder: Path, name: str, field: str) -> None:
    """Takes a field out of a JSON file."""
    content = json.loads((folder / name).read_text())
    del content[field]
    (folder / name).write_text(json.dumps(content))


def infect(tensors: dict[str, np.ndarray], name: str = "conv_in.weight") -> None:
    tensors[name][0, 0, 0, 0] = np.nan


def cut(folder: Path, name: str = UNET) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")


def other_kind(folder: Path) -> None:
    """As Stable Diffusion 3 and Flux are laid out."""
    fields(folder, sources.INDEX, _class_name="FluxPipeline", unet=None, transformer=["diffusers", "FluxTransformer2DModel"])


LARGER = np.zeros((8, 4, 5, 5), np.float32)  # another kernel
FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {  # how it is spoilt, what the line must hold
    "truncated": (cut, (UNET, "not a readable safetensors file", "download it again", PATH)),
    "empty file": (lambda f: (f / VAE).write_bytes(b""), (VAE, "not a readable safetensors file", "download it again")),
    "missing tensor": (
        lambda f: change(f, UNET, lambda t: t.pop("conv_in.bias")),
        ("broken/unet", "1 missing: conv_in.bias", "of two models", PATH),
    ),
    "further tensor": (
        lambda f: change(f, UNET, lambda t: t.update(stray=np.zeros(1, np.float32))),
        ("broken/unet", "1 unexpected: stray", PATH),
    ),
    "wrong shape": (
        lambda f: change(f, UNET, lambda t: t.update({"conv_in.weight": LARGER})),
        ("broken/unet", "conv_in.weight (5, 5, 4, 8) instead of (3, 3, 4, 8)", PATH),
    ),
    "not a number": (lambda f: change(f, UNET, infect), ("broken/unet", "1 not finite: conv_in.weight", PATH)),
    "no number in the VAE": (
        lambda f: change(f, VAE, lambda t: infect(t, "encoder.conv_in.weight")),
        ("broken/vae", "1 not finite: encoder.conv_in.weight", PATH),
    ),
    "broken vocabulary": (
        lambda f: (f / "tokenizer" / "vocab.json").write_text("{"),
        ("broken/tokenizer/vocab.json", "not a JSON object", "download it again", PATH),
    ),
    "VAE's weights as UNet": (lambda f: shutil.copy(f / VAE, f / UNET), ("broken/unet", "missing", "unexpected", PATH)),
    "VAE's folder as UNet": (
        lambda f: (shutil.rmtree(f / "unet"), shutil.copytree(f / "vae", f / "unet")),
        ("broken/unet", "AutoencoderKL", "UNet2DConditionModel", PATH),
    ),
    "a transformer, no UNet": (other_kind, ("FluxPipeline", "no unet", "SDXL base", PATH)),
    "a UNet told classes": (
        lambda f: fields(f, "unet/config.json", class_embed_type="timestep"),
        ("broken/unet", "class_embed_type", PATH),
    ),
    "nine channels": (lambda f: fields(f, "unet/config.json", in_channels=9), ("9 channels", "inpainting", PATH)),
    "pickles only": (pickled, ("broken/unet", "diffusion_pytorch_model.bin", "a pickle", 'python -c "', "save_pretrained")),
    "no index": (lambda f: (f / sources.INDEX).unlink(), ("broken", sources.INDEX, PATH)),
    "index cut": (lambda f: (f / sources.INDEX).write_text('{"unet": ['), (sources.INDEX, "not a JSON object", PATH)),
    "index of another shape": (lambda f: (f / sources.INDEX).write_text("[1, 2]"), (sources.INDEX, "not a JSON object", PATH)),
    "config of another shape": (lambda f: (f / "unet/config.json").write_text("[1]"), ("config.json", "JSON", PATH)),
    "config without fields": (lambda f: (f / "vae/config.json").write_text("{}"), ("vae", "lacks block_out_channels", PATH)),
    "terminal SNR zero": (
        lambda f: fields(f, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
        ("rescale_betas_zero_snr", "alpha(1) = 0", "--config.model"),
    ),
    "no limit of tokens": (
        lambda f: fields(f, WORDS_CONFIG, model_max_length=10**30),
        ("broken/tokenizer", "model_max_length", "1000000000000000000000000000000", "text_encoder", "8 positions", PATH),
    ),
    "limit of tokens missing": (
        lambda f: without(f, WORDS_CONFIG, "model_max_length"),
        ("broken/tokenizer", "model_max_length", "text_encoder", "8 positions", PATH),
    ),
    "token beyond the table": (
        lambda f: fields(f, "tokenizer/vocab.json", **{"<toy>": 5000}),
        ("broken/tokenizer", "'<toy>'", "5000", "text_encoder", "rows", PATH),
    ),
}
TYPES = (  # file, field, a value of another kind, what the line says beside file, field and value
    ("unet/config.json", "sample_size", "64", "whole number"),
    ("unet/config.json", "sample_size", [4, 8], "whole number"),
    ("unet/config.json", "sample_size", True, "whole number"),
    ("unet/config.json", "attention_head_dim", "8", "whole number"),
    ("unet/config.json", "attention_head_dim", [2, 2, 2], "2 levels"),
    ("unet/config.json", "cross_attention_dim", [8, 8], "whole number"),
    ("unet/config.json", "block_out_channels", [8, 16, 16], "3 levels"),
    ("unet/config.json", "block_out_channels", 8, "list of whole numbers"),
    ("unet/config.json", "block_out_channels", [8, "16"], "list of whole numbers"),
    ("unet/config.json", "transformer_layers_per_block", [1], "2 levels"),
    ("unet/config.json", "transformer_layers_per_block", [[1], [1, 1]], "whole number"),
    ("unet/config.json", "down_block_types", "DownBlock2D", "list of words"),
    ("unet/config.json", "norm_num_groups", 3, "divide"),
    ("unet/config.json", "norm_num_groups", None, "whole number"),
    ("unet/config.json", "use_linear_projection", "no", "true or false"),
    ("unet/config.json", "in_channels", 0, "whole number"),
    ("vae/config.json", "scaling_factor", None, "number above 0"),
    ("vae/config.json", "scaling_factor", 0, "number above 0"),
    ("vae/config.json", "scaling_factor", "0.18215", "number above 0"),
    ("vae/config.json", "block_out_channels", 8, "list of whole numbers"),
    ("vae/config.json", "act_fn", "relu", "silu"),
    ("vae/config.json", "in_channels", 1, "3"),
    ("text_encoder/config.json", "eos_token_id", None, "whole number"),
    ("text_encoder/config.json", "eos_token_id", [555], "whole number"),
    ("text_encoder/config.json", "max_position_embeddings", None, "whole number"),
    ("text_encoder/config.json", "num_attention_heads", 3, "divide"),
    ("text_encoder/config.json", "layer_norm_eps", "1e-5", "number above 0"),
    ("text_encoder/config.json", "hidden_act", ["gelu"], "word"),
    ("text_encoder/config.json", "architectures", "CLIPTextModel", "list of words"),
    ("scheduler/scheduler_config.json", "beta_start", "0.00085", "number above 0"),
    ("scheduler/scheduler_config.json", "beta_end", [1], "number above 0"),
    ("scheduler/scheduler_config.json", "prediction_type", 1, "word"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "1000", "whole number"),
    ("tokenizer/tokenizer_config.json", "model_max_length", "77", "number"),
    ("tokenizer/tokenizer_config.json", "model_max_length", None, "number"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 0, "number"),
    ("tokenizer/tokenizer_config.json", "pad_token", 0, "token"),
    ("tokenizer/tokenizer_config.json", "added_tokens_decoder", [1], "added_tokens_decoder"),
    ("tokenizer/special_tokens_map.json", "pad_token", ["!"], "token"),
    ("tokenizer/vocab.json", "a", "7", "number"),
    ("model_index.json", "force_zeros_for_empty_prompt", "yes", "true or false"),
)


@pytest.mark.parametrize(("name", "field", "value", "kind"), TYPES, ids=[f"{row[1]}={row[2]!r}" for row in TYPES])
def test_a_field_of_another_kind_is_refused(models, tmp_path, name, field, value, kind):
    """As a converter or a hand may leave it."""
    broken = Path(shutil.copytree(models.folder, tmp_path / "broken"))
    fields(broken, name, **{field: value})
    refused(tmp_path, broken, f"broken/{name}", field, kind, PATH)


OBJECTS = ("tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json", "vae/config.json")


@pytest.mark.parametrize("name", [*OBJECTS, "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "", "\xff", "[" * 100_000], ids=["cut", "list", "empty", "latin", "deep"])
def test_a_config_that_is_no_object_is_refused(models, tmp_path, name, text):
    broken = Path(shutil.copytree(models.folder, tmp_path / "broken"))
    (broken / name).write_text(text, encoding="latin-1")
    refused(tmp_path, broken, f"broken/{name}", "JSON", PATH)


def test_whole_numbers_may_be_written_as_decimals_and_squares_as_pairs(models, tmp_path):
    """JSON knows one kind of number, and diffusers writes sizes as pairs too."""
    folder = Path(shutil.copytree(models.folder, tmp_path / "same"))
    fields(folder, "unet/config.json", sample_size=[4.0, 4.0], norm_num_groups=4.0, transformer_layers_per_block=[1, 1])
    fields(folder, WORDS_CONFIG, model_max_length=8.0)
    assert (
        run("sample", *tiny_flags(tmp_path, folder), "--stage=0", "--steps=1", "--count=1", f"--out={tmp_path}/x.png").code == 0
    )


@pytest.mark.parametrize(("spoil", "needles"), FOLDERS.values(), ids=FOLDERS)
def test_a_spoilt_folder_is_refused(models, tmp_path, spoil, needles):
    broken = Path(shutil.copytree(models.folder, tmp_path / "broken"))
    spoil(broken)
    refused(tmp_path, broken, *needles)


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda p: cut(p.parent, p.name), ("one.safetensors", "not a readable safetensors file", PATH)),
    "a pickle under the name": (
        lambda p: p.write_bytes(b"\x80\x04."),
        ("one.safetensors", "not a readable", "download it again"),
    ),
    "a VAE": (
        lambda p: change(p.parent, p.name, lambda t: [t.pop(n) for n in list(t) if not n.startswith(single_file.VAE)]),
        (f"{PATH}=", "not a single file of SD 1.x", "UNet, VAE and text encoders"),
    ),
    "no VAE in it": (
        lambda p: change(p.parent, p.name, lambda t: [t.pop(n) for n in list(t) if n.startswith(single_file.VAE)]),
        ("one.safetensors", "vae", "first_stage_model.", PATH),
    ),
    "missing tensor": (
        lambda p: change(p.parent, p.name, lambda t: t.pop(f"{single_file.UNET}input_blocks.0.0.bias")),
        ("one.safetensors", "unet", "1 missing: conv_in.bias", PATH),
    ),
    "wrong shape": (
        lambda p: change(p.parent, p.name, lambda t: t.update({f"{single_file.UNET}out.2.bias": np.zeros(9, np.float32)})),
        ("one.safetensors", "unet", "conv_out.bias (9,) instead of (4,)", PATH),
    ),
    "a stray tensor": (
        lambda p: change(p.parent, p.name, lambda t: t.update({f"{single_file.UNET}lora.up": np.zeros(9, np.float32)})),
        ("one.safetensors", "left over", "lora.up", PATH),
    ),
}


@pytest.mark.parametrize(("spoil", "needles"), FILES.values(), ids=FILES)
def test_a_spoilt_single_file_is_refused(models, tmp_path, spoil, needles):
    path = Path(shutil.copy(models.file, tmp_path / "one.safetensors"))
    spoil(path)
    refused(tmp_path, path, *needles, model__like=models.folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ""])
def test_a_pickle_is_refused_with_the_command_that_converts_it(models, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(b"\x80\x04cnever\nopened\n.")
    refused(tmp_path, path, f"{PATH}={path}", "a pickle may run code", 'python -c "', "from_single_file", "save_pretrained")


def test_a_missing_model_is_refused(tmp_path):
    for name in ("none", "none.safetensors", "some/where/none"):
        refused(tmp_path, tmp_path / name, str(tmp_path / name), "does not exist", PATH)


def test_a_hub_id_without_network_and_cache_is_refused(tmp_path):
    refused(
        tmp_path, "artist/fine-tune", f"{PATH}=artist/fine-tune", "the cache", "does not hold", "run once with a network", PATH
    )


def test_a_single_file_whose_configs_are_on_the_hub_names_the_other_flag(models, tmp_path):
    refused(tmp_path, models.file, "stable-diffusion-v1-5", "run once with a network", LIKE)
    refused(tmp_path, models.file, "artist/fine-tune", "run once with a network", LIKE, model__like="artist/fine-tune")


def test_a_wrong_folder_beside_a_single_file_is_refused(models, tmp_path):
    refused(tmp_path, models.file, str(tmp_path / "none"), "does not exist", LIKE, model__like=tmp_path / "none")
    refused(tmp_path, models.file, "is a file", LIKE, model__like=models.file)
    other = Path(shutil.copytree(models.folder, tmp_path / "other"))
    fields(other, "unet/config.json", use_linear_projection=True)
    refused(tmp_path, models.file, "family v1", "a folder of v2", LIKE, model__like=other)


WORDS = {
    "model__prediction_type": ("score", ("--config.model.prediction_type='score'", "epsilon", "v_prediction")),
    "conditioning__original_size": ("(512,)", ("--config.conditioning.original_size=(512,)", "two numbers of pixels")),
    "conditioning__crop": ("(0, -8)", ("--config.conditioning.crop=(0, -8)", "must be in [0, 65536]")),
    "conditioning__target_size": ("(512.5, 512)", ("--config.conditioning.target_size=(512.5, 512)", "two numbers")),
}


@pytest.mark.parametrize("verb", ["sample", "distill"])
@pytest.mark.parametrize(("name", "row"), WORDS.items(), ids=WORDS)
def test_a_wrong_word_on_how_it_is_read_is_refused(models, tmp_path, verb, name, row):
    value, needles = row
    refused(tmp_path, models.folder, *needles, verb=verb, **{name: value})


def test_distill_refuses_a_wrong_model_before_it_makes_its_folder(models, tmp_path):
    broken = Path(shutil.copytree(models.folder, tmp_path / "broken"))
    cut(broken)
    refused(tmp_path, broken, UNET, "download it again", verb="distill")
