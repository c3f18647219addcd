"""The CLIP score: images prepared as by transformers, numbers as its CLIPModel gives them, and the running mean."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch_reference import quick_jit, randomise, same, tensors
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from proreflow_jax.evaluation import clip_score, moments
from proreflow_jax.models import clip_image, network
from proreflow_jax.pretrained import weights

TEXT = dict(
    vocab_size=60,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=9,
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=59,
)
VISION = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(transformers' CLIPModel with random weights, the folder that it wrote)."""
    folder = tmp_path_factory.mktemp("clip")
    module = randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)), seed=1)
    module.save_pretrained(folder)
    return module, folder


def pictures(*sizes, seed=0):
    """One uint8 image for each (h, w): noise over a gradient, so that every filter shows."""
    rng = np.random.default_rng(seed)
    ramp = lambda h, w: np.add.outer(np.linspace(0, 120, h), np.linspace(0, 80, w))[..., None]
    return [(ramp(h, w) + rng.integers(0, 56, (h, w, 3))).astype(np.uint8) for h, w in sizes]


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (224, 224), (480, 640), (427, 640), (300, 227), (224, 227), (31, 97)])
def test_images_are_prepared_bit_for_bit_as_by_transformers(size):
    """Larger, smaller and of the right size; square, wide and tall, with odd numbers of pixels to crop."""
    (image,) = pictures(size)
    (expected,) = CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="np")["pixel_values"]
    (found,) = clip_score.prepare_clip([image])
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.transpose(1, 2, 0))


def test_a_batch_of_images_is_prepared_one_by_one():
    batch = np.stack(pictures((40, 30), (40, 30)))
    assert np.array_equal(clip_score.prepare_clip(batch, 16)[1], clip_score.prepare_clip(batch[1:], 16)[0])


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)])
def test_other_kinds_of_images_are_refused(image):
    with pytest.raises(ValueError, match=r"uint8"):
        clip_score.prepare_clip([image])


def pairs(n, seed=0):
    """(prepared images, ids) of n pairs for the small model: images of large spots, prompts of all lengths."""
    rng = np.random.default_rng(seed)
    spots = rng.integers(0, 256, (n, 2, 2, 3), np.uint8).repeat(12, 1).repeat(16, 2)
    ids = rng.integers(0, 58, (n, 9))
    ids[:, 0] = 58
    for row in ids:
        row[rng.integers(1, 9) :] = 59
    return clip_score.prepare_clip(spots, 16), ids


def torch_cosines(module, images, ids):
    """cos(image i, text i) by transformers, without its temperature."""
    with torch.no_grad():
        found = module(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2)))
    return (found.logits_per_image / module.logit_scale.exp()).diagonal().detach()


def test_scores_are_a_hundred_times_the_cosine_of_transformers_and_never_negative(published):
    module, folder = published
    clip = clip_score.load_clip(folder)
    images, ids = pairs(24)
    cosines = torch_cosines(module, images, ids)
    assert 0 < (cosines < 0).sum() < 24  # both kinds are among them
    scores = quick_jit(clip_score.make_scores(clip.text, clip.image))
    found = scores(clip.params, images, ids)
    same(found, 100 * cosines.clamp(min=0), 1e-4)
    assert np.all(np.asarray(found)[cosines < 0] == 0)
    zeros = np.where(np.cumsum(ids == 59, axis=1) > 1, 0, ids)  # as OpenCLIP pads: what follows the end token is not seen
    assert np.array_equal(scores(clip.params, images, zeros), found)


def test_bfloat16_towers_score_nearly_the_same(published):
    module, folder = published
    clip = clip_score.load_clip(folder)
    images, ids = pairs(24)
    params = network.cast({name: jnp.asarray(value) for name, value in clip.params.items()}, jnp.bfloat16)
    found = quick_jit(clip_score.make_scores(clip.text, clip.image))(params, images, ids)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 100 * torch_cosines(module, images, ids).clamp(min=0), atol=3.0)


def test_the_error_of_the_mean_is_that_of_a_sample():
    """Far from zero, in two parts, as a run leaves them."""
    values = 1e6 + np.random.default_rng(0).standard_normal((1000, 1))
    seen = moments.merge_moments(moments.moments_of(values[:300]), moments.moments_of(values[300:]))
    assert clip_score.standard_error(seen) == pytest.approx(values.std(ddof=1) / math.sqrt(1000), rel=1e-7)
    with pytest.raises(ValueError, match=r"1 examples .* raise --config\.evaluate\.examples"):
        clip_score.standard_error(moments.moments_of(values[:1]))


@pytest.mark.parametrize("name", clip_score.NAMED)
def test_published_networks_have_the_sizes_stated(name):
    """Counted without allocating; transformers, given the same config.json, has the same names and shapes."""
    config = clip_score.named_config(name)
    text, image = clip_score.tower_configs(config)
    shapes = {**network.make_text_encoder(text).shapes, **clip_image.make_image_encoder(image).shapes}
    assert sum(math.prod(value.shape) for value in shapes.values()) == clip_score.NAMED[name].parameters
    with torch.device("meta"):
        module = CLIPModel(CLIPConfig(**config))
    expected = {n: tuple(value.shape) for n, value in module.state_dict().items() if n != "logit_scale"}
    found = {n: tuple(value.shape[i] for i in np.argsort(weights.order(n, len(value.shape)))) for n, value in shapes.items()}
    assert found == expected


@pytest.mark.parametrize(
    "config",
    [
        dict(text_config=dict(hidden_size=24), vision_config=dict(patch_size=14), projection_dim=6),
        dict(text_config=dict(projection_dim=9), vision_config=dict(projection_dim=9)),
        dict(text_config=dict(hidden_size=24), text_config_dict=dict(hidden_size=16), vision_config_dict=dict(patch_size=14)),
        dict(text_config=None, vision_config=None),
    ],
)
def test_towers_are_read_from_a_config_as_by_transformers(config):
    """What a config leaves out, and old files that say text_config_dict; projections have the model's width."""
    text, image = clip_score.tower_configs(config)
    width = config.get("projection_dim", 512)
    full = CLIPConfig(**config)
    assert text.pop("architectures") == ["CLIPTextModelWithProjection"]
    assert text == {name: full.text_config.to_dict()[name] for name in text} | dict(projection_dim=width)
    assert image == {name: full.vision_config.to_dict()[name] for name in image} | dict(projection_dim=width)


def test_old_files_with_position_ids_are_read(published, tmp_path):
    """OpenAI's on the Hub hold both towers' position_ids."""
    module, folder = published
    old = {f"{tower}_model.embeddings.position_ids": np.arange(9)[None] for tower in ("text", "vision")}
    weights.save_tensors(tmp_path / "model.safetensors", tensors(module) | old)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    first, second = clip_score.load_clip(folder).params, clip_score.load_clip(tmp_path).params
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_network_is_called_by_its_numbers_or_its_folder(published, tmp_path, monkeypatch):
    folder = published[1]
    assert clip_score.load_clip(folder).name == folder.name
    config = clip_score.named_config("laion/CLIP-ViT-g-14-laion2B-s12B-b42K")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(weights, "from_torch", lambda *_: {"logit_scale": 0})  # two gigabytes are not made here
    monkeypatch.setattr(weights, "read_tensors", lambda _: {})
    assert clip_score.load_clip(tmp_path).name == "ViT-g/14"
    config["vision_config"]["num_hidden_layers"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert clip_score.load_clip(tmp_path).name == tmp_path.name
    with pytest.raises(ValueError, match="'ViT-g/14' is unknown"):
        clip_score.named_config("ViT-g/14")


def test_folders_that_cannot_be_read_are_refused_in_one_line(published, tmp_path):
    module, folder = published
    with pytest.raises(FileNotFoundError, match="name the folder of a CLIPModel"):
        clip_score.load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").touch()
    with pytest.raises(FileNotFoundError, match="only OpenCLIP's"):
        clip_score.load_clip(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    lines = []
    with pytest.raises(FileNotFoundError, match="holds no .*model.safetensors") as caught:
        clip_score.load_clip(tmp_path)
    lines.append(str(caught.value))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickle.*from transformers import CLIPModel") as caught:
        clip_score.load_clip(tmp_path)
    lines.append(str(caught.value))
    half = {name: value for name, value in tensors(module).items() if not name.startswith("vision_model.encoder.layers.1")}
    weights.save_tensors(tmp_path / "model.safetensors", half)
    with pytest.raises(ValueError, match="16 missing: vision_model.encoder.layers.1") as caught:
        clip_score.load_clip(tmp_path)
    lines.append(str(caught.value))
    with pytest.raises(FileNotFoundError, match="holds neither vocab.json") as caught:
        clip_score.read_tokenizer(tmp_path)
    for line in (*lines, str(caught.value)):
        assert "--config.evaluate.clip" in line and "--config.model" not in line and "\n" not in line
