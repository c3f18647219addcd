"""Single files of Stable Diffusion 3 and 3.5 against diffusers' own reader: names, bits, members, text encoders."""

import inspect
import json
import logging
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
import tiny_sd3  # noqa: E402
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: E402
from diffusers.loaders import single_file_utils as oracle  # noqa: E402
from fake_hub import FakeHub, connect  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from verb import tiny_config  # noqa: E402

from proreflow_jax import UserError  # noqa: E402
from proreflow_jax.pretrained import config_fields, joint_file, own_vae, pipeline, single_file, sources, weights  # noqa: E402
from proreflow_jax.run import find_model  # noqa: E402

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
PROJECTION = "text_projection.weight"


def with_identity(folder: Path) -> Path:
    """The first CLIP's projection as in the published models."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {PROJECTION: np.eye(len(tensors[PROJECTION]), dtype=np.float32)}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the three members, the smallest without T5."""
    home = tmp_path_factory.mktemp("models")
    return {m: with_identity(tiny_sd3.write(home / m, m, t5=m != "3-medium")) for m in tiny_sd3.MEMBERS}


def components(folder: Path) -> list[str]:
    return [name for name in PARTS if (folder / name).is_dir()]


def config(folder: Path, name: str) -> dict:
    return config_fields.read_config(folder / name, name)


def single(folder: Path, dtype=np.float32, without: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """What a single file of a folder holds."""
    file = {}
    for name in components(folder):
        if name not in without:
            tensors = {key: np.asarray(value, dtype) for key, value in weights.read_tensors(folder / name).items()}
            file |= single_file.to_original(name, tensors, config(folder, name), "sd3")
    return file


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    weights.save_tensors(path, tensors)
    return path


def same(one, other) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def line(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("member", tiny_sd3.MEMBERS)
def test_a_file_gives_back_every_bit(models, tmp_path, member, dtype):
    folder = models[member]
    path = write(tmp_path / "model.safetensors", single(folder, dtype))
    source = sources.open_file(path, folder)
    for name in components(folder):
        stored = {key: np.asarray(value, dtype) for key, value in weights.read_tensors(folder / name).items()}
        same(dict(source.tensors(name)), stored)


@pytest.mark.parametrize("member", tiny_sd3.MEMBERS)
def test_the_transformers_names_and_numbers_are_diffusers_own(models, member):
    folder = models[member]
    stored = weights.read_tensors(folder / "transformer")
    file = single_file.to_original("transformer", stored, config(folder, "transformer"), "sd3")
    assert all(name.startswith("model.diffusion_model.") for name in file)
    theirs = oracle.convert_sd3_transformer_checkpoint_to_diffusers({k: torch.from_numpy(v) for k, v in file.items()})
    same({name: value.contiguous().numpy() for name, value in theirs.items()}, dict(stored))


@pytest.mark.parametrize("member", ["3.5-medium", "3.5-large"])
def test_diffusers_opens_the_file_and_draws_the_same(models, tmp_path, member):
    folder = models[member]
    path = write(tmp_path / "model.safetensors", single(folder))
    alone = SD3Transformer2DModel.from_single_file(str(path), config=str(folder), subfolder="transformer")
    stored = weights.read_tensors(folder / "transformer")
    same({name: value.numpy() for name, value in alone.state_dict().items()}, dict(stored))
    own = tiny_sd3.stock(folder)
    given = {"text_encoder_3": own.text_encoder_3}  # of a file's own T5 diffusers 0.42 with transformers 5 loses the table
    theirs = StableDiffusion3Pipeline.from_single_file(str(path), config=str(folder), local_files_only=True, **given)
    for pipe in (theirs, own):
        pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 16, 4, 4), generator=torch.Generator().manual_seed(0))
    draw = lambda pipe: pipe(["a digit"], num_inference_steps=2, latents=noise, output_type="np").images
    assert np.array_equal(draw(theirs), draw(own))


@pytest.mark.parametrize("both", [False, True])
def test_t5s_table_has_two_names(models, both):
    """Older versions of transformers wrote either, or both."""
    folder = models["3.5-medium"]
    stored = dict(weights.read_tensors(folder / "text_encoder_3"))
    file = single_file.to_original("text_encoder_3", stored, config(folder, "text_encoder_3"), "sd3")
    same(dict(oracle.convert_sd3_t5_checkpoint_to_diffusers(file)), stored)
    prefix = "text_encoders.t5xxl.transformer."
    file[f"{prefix}encoder.embed_tokens.weight"] = file[f"{prefix}shared.weight"]
    if not both:
        del file[f"{prefix}shared.weight"]
    same(dict(single_file.from_original("text_encoder_3", file, config(folder, "text_encoder_3"), "sd3")), stored)


def test_a_file_without_text_encoders_takes_them_from_the_folder_beside_it(models, tmp_path):
    folder = models["3.5-medium"]
    path = write(tmp_path / "model.safetensors", single(folder, without=PARTS[2:]))
    source = sources.open_file(path, folder)
    assert sources.encoders_beside(path) == list(PARTS[2:]) and source.beside == set(PARTS[2:])
    for name in PARTS:
        same(dict(source.tensors(name)), dict(weights.read_tensors(folder / name)))
    assert source.place("text_encoder") == folder / "text_encoder" and source.place("vae") == path / "vae"


def test_a_file_without_t5_is_a_model_without_t5(models, tmp_path, caplog):
    folder = models["3.5-medium"]
    path = write(tmp_path / "model.safetensors", single(folder, without=("text_encoder_3",)))
    with caplog.at_level(logging.INFO):
        source = sources.open_file(path, folder)
    assert "it holds no T5" in caplog.text and sources.encoders_beside(path) == []
    assert source.components == list(PARTS[:4]) and not source.beside
    assert pipeline.load_pipeline(source).tokenizer.length == 2 * tiny_sd3.LENGTH


def test_one_clip_without_the_other_is_refused(models, tmp_path):
    folder = models["3.5-medium"]
    path = write(tmp_path / "model.safetensors", single(folder, without=("text_encoder_2",)))
    said = line(sources.open_file, path, folder)
    assert "no text_encoder_2" in said and "text_encoders.clip_g.transformer." in said and "--config.model.path" in said


def test_a_file_and_a_folder_of_two_members_are_refused(models, tmp_path):
    path = write(tmp_path / "model.safetensors", single(models["3.5-large"]))
    said = line(sources.open_file, path, models["3.5-medium"])
    assert str(path) in said and "num_layers=2" in said and "one with 3" in said and "--config.model.like" in said
    path = write(tmp_path / "model.safetensors", single(models["3-medium"]))
    assert "qk_norm=None" in line(sources.open_file, path, models["3.5-large"])


def test_a_projection_that_tools_leave_out_is_refused(models, tmp_path):
    folder = Path(shutil.copytree(models["3-medium"], tmp_path / "own"))
    tensors = dict(weights.read_tensors(folder / "text_encoder"))
    tensors[PROJECTION] = 2 * tensors[PROJECTION]
    said = line(single_file.to_original, "text_encoder", tensors, config(folder, "text_encoder"), "sd3")
    assert "text_projection" in said and "identity" in said


def test_one_of_a_file_is_not_read_either(models, tmp_path):
    """As diffusers and ComfyUI: SD 3 reads the pooled state of its first CLIP as it is."""
    folder = models["3-medium"]
    stray = {f"text_encoders.clip_l.transformer.{PROJECTION}": np.full((8, 8), 3, np.float32)}
    path = write(tmp_path / "model.safetensors", single(folder) | stray)
    assert np.array_equal(sources.open_file(path, folder).tensors("text_encoder")[PROJECTION], np.eye(8, dtype=np.float32))


def test_what_has_no_place_is_refused_by_name(models):
    folder = models["3.5-medium"]
    stored, fields = weights.read_tensors(folder / "transformer"), config(folder, "transformer")
    said = line(single_file.to_original, "transformer", {**stored, "stray.weight": np.zeros(1)}, fields, "sd3")
    assert "stray.weight" in said
    file = single(folder) | {"model.diffusion_model.joint_blocks.9.x_block.attn.qkv.weight": np.zeros((48, 16), np.float32)}
    assert "joint_blocks.9" in line(single_file.from_original, "transformer", file, fields, "sd3")


FULL = {  # member -> (blocks, width, qk norm, blocks with dual attention, positions)
    "sd3-medium": (24, 1536, False, (), 192),
    "sd3.5-medium": (24, 1536, True, range(13), 384),
    "sd3.5-large": (38, 2432, True, (), 192),
}


class Listed(dict):
    """Names and shapes of a file, as `weights.Tensors` gives them."""

    metadata: dict[str, str] = {}

    def shape(self, name):
        return self[name]


def listed(blocks: int, width: int, normed: bool, dual, side: int) -> Listed:
    head = {
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "context_embedder.weight": (width, 4096),
        "y_embedder.mlp.0.weight": (width, 2048),
        "pos_embed": (1, side**2, width),
        "final_layer.linear.weight": (64, width),
    }
    for i in range(blocks):
        block = f"joint_blocks.{i}.x_block"
        head[f"{block}.attn.qkv.weight"] = (3 * width, width)
        head |= {f"{block}.attn.ln_q.weight": (64,)} if normed else {}
        head |= {f"{block}.attn2.qkv.weight": (3 * width, width)} if i in dual else {}
    return Listed({single_file.UNET + name: shape for name, shape in head.items()})


@pytest.mark.parametrize("member", FULL)
def test_published_members_are_known_by_names_and_shapes(member):
    stored = listed(*FULL[member])
    facts = joint_file.transformer_facts(stored, Path("a"))
    assert set(facts) <= set(inspect.signature(SD3Transformer2DModel.__init__).parameters)
    assert joint_file.member(stored, Path("a")) == member and member in find_model.HOMES
    assert single_file.family(stored) == "sd3"
    assert (facts["pos_embed_max_size"], facts["out_channels"]) == (FULL[member][4], 16)


def test_a_transformer_of_another_size_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^a is a Stable Diffusion 3 of another size \(7 blocks .*--config\.model\.like$"):
        joint_file.member(listed(7, 448, True, (), 96), Path("a"))
    stored = listed(7, 448, True, (), 96)
    del stored["model.diffusion_model.pos_embed"]
    with pytest.raises(UserError, match=r"^a is no whole Stable Diffusion 3: it lacks model\.diffusion_model\.pos_embed"):
        joint_file.member(stored, Path("a"))


def test_a_home_is_found_for_a_member(monkeypatch, tmp_path):
    path = write(tmp_path / "model.safetensors", {"x": np.zeros(1, np.float32)})
    monkeypatch.setattr(find_model, "Tensors", lambda paths: listed(*FULL["sd3.5-large"]))
    monkeypatch.setattr(sources, "file_family", lambda path: "sd3")
    assert find_model.home(path) == "stabilityai/stable-diffusion-3.5-large"


def test_the_hub_gives_a_whole_model_and_what_a_file_lacks(models, tmp_path, monkeypatch):
    """By a hub id all of it; beside a file without text encoders these alone, no transformer."""
    folder = models["3.5-medium"]
    path = write(tmp_path / "model.safetensors", single(folder, without=PARTS[2:]))
    with FakeHub() as server:
        server.add_folder("me/sd3", folder)
        server.add("me/gated", {"model_index.json": b"{}"}, gated=True)
        connect(monkeypatch, server.url, tmp_path / "home")
        source = find_model.find_base_model(tiny_config(tmp_path, path, model__like="me/sd3"))
        assert source.beside == set(PARTS[2:])
        fetched = {name.split("/")[0] for name in server.fetched("me/sd3") if name.endswith(".safetensors")}
        assert fetched == set(PARTS[2:])
        same(dict(source.tensors("text_encoder_3")), dict(weights.read_tensors(folder / "text_encoder_3")))
        whole = find_model.find_base_model(tiny_config(tmp_path, Path("me/sd3")))
        for name in components(folder):
            same(dict(whole.tensors(name)), dict(weights.read_tensors(folder / name)))
        said = line(find_model.find_base_model, tiny_config(tmp_path, path, model__like="me/gated"))
        assert "me/gated is gated: accept its terms at" in said and "HF_TOKEN" in said and "--config.model.like" in said


def test_another_vae_must_shift_its_latents_alike(models, tmp_path):
    folder = Path(shutil.copytree(models["3.5-medium"] / "vae", tmp_path / "vae"))
    fields = json.loads((folder / "config.json").read_text())
    source = sources.open_folder(models["3.5-large"])
    assert own_vae.with_own_vae(source, folder).vae is not None
    (folder / "config.json").write_text(json.dumps(fields | {"shift_factor": 0.1}))
    said = line(own_vae.with_own_vae, source, folder)
    assert "shifts its latents by 0.1" in said and "0.0609" in said and "--config.model.vae" in said
