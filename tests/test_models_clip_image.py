"""CLIP's image tower equals transformers' CLIPVisionModelWithProjection, small and at the true size of the published ones."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from full_size import QUICK, Drawn, errors, fill, normal, timed
from torch_reference import draw, quick_jit, randomise, same, tensors, to_jax
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from proreflow_jax.models import network
from proreflow_jax.models.clip_image import make_image_encoder
from proreflow_jax.pretrained import weights

SMALL = dict(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=14,
    patch_size=4,
    projection_dim=7,
)
TOLERANCE = 1e-4


def make(**changes):
    """(torch's module, our network, our parameters) with shared random weights."""
    module = randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL | changes)))
    ours = make_image_encoder(SMALL | changes)
    params = weights.from_torch(tensors(module), ours.shapes, "image tower")
    return module, ours, {name: jnp.asarray(value) for name, value in params.items()}


def reference(module, images):
    with torch.no_grad():
        return module(images).image_embeds


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings_equal_transformers(activation):
    """14 px in patches of 4: the last 2 px are left out, as torch's strided convolution does."""
    module, ours, params = make(hidden_act=activation)
    images = draw(3, 3, 14, 14)
    same(quick_jit(ours.apply)(params, to_jax(images)), reference(module, images), TOLERANCE)


def test_names_are_those_of_transformers_and_bare_parameters_keep_theirs():
    """Both ways: the parameters in torch's layout are the state dict again."""
    module, ours, params = make()
    assert ours.shapes["vision_model.embeddings.class_embedding"].shape == (12,)
    back, expected = weights.to_torch(params), tensors(module)
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[name], expected[name]) for name in expected)


def test_position_ids_of_old_files_are_ignored():
    module, ours, params = make()
    old = tensors(module) | {"vision_model.embeddings.position_ids": np.arange(10)[None]}
    assert weights.from_torch(old, ours.shapes, "old").keys() == params.keys()


def test_numbers_left_out_of_a_config_are_those_of_transformers():
    """Its config.json names only what differs from the default, ViT-B/32."""
    full = CLIPVisionConfig().to_dict()
    assert make_image_encoder({}).config == {name: full[name] for name in make_image_encoder({}).config}


def test_patches_see_each_other_in_both_directions():
    """No causal mask: the class token, which comes first, changes with the last patch."""
    _, ours, params = make()
    images = to_jax(draw(1, 3, 14, 14))
    moved = images.at[:, 8:12, 8:12].add(1.0)
    first, second = (quick_jit(ours.apply)(params, x) for x in (images, moved))
    assert float(jnp.abs(first - second).max()) > 1e-2


def test_bfloat16_weights_compute_in_bfloat16():
    module, ours, params = make()
    images = draw(2, 3, 14, 14)
    found = quick_jit(ours.apply)(network.cast(params, jnp.bfloat16), to_jax(images))
    assert found.dtype == jnp.bfloat16
    same(found, reference(module, images), 2e-2)


def test_images_of_another_size_are_refused():
    _, ours, params = make()
    with pytest.raises(ValueError, match=r"\(16, 16, 3\).*\(14, 14, 3\)"):
        ours.apply(params, jnp.zeros((1, 16, 16, 3)))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        make_image_encoder(SMALL | dict(hidden_act="relu"))


def test_init_gives_the_shapes_that_were_promised():
    ours = make_image_encoder(SMALL)
    params = quick_jit(ours.init)(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == {n: s.shape for n, s in ours.shapes.items()}
    assert all(bool(jnp.isfinite(value).all()) for value in params.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "parameters"),
    [
        ((1024, 4096, 24, 16, 768, "quick_gelu"), 303_966_208),
        ((1408, 6144, 40, 16, 1024, "gelu"), 1_012_645_632),
    ],
    ids=["ViT-L-14", "ViT-g-14"],
)
def test_equals_transformers_at_true_size(row, parameters, capsys):
    """One image of 224 px; weights drawn by name, torch's freed before ours. ViT-g: a minute on one core, 5 GB where
    MALLOC_MMAP_THRESHOLD_=65536 makes glibc give back what was freed."""
    columns = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim", "hidden_act")
    config = dict(zip(columns, row, strict=True), patch_size=14)
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    shapes, images = fill(module), normal("images", (1, 3, 224, 224))
    expected = reference(module, torch.from_numpy(images)).numpy()
    del module
    ours = make_image_encoder(config)
    params = weights.from_torch(Drawn(shapes), ours.shapes, "true size")
    for name in ours.shapes:
        params[name] = jnp.asarray(params[name])
    assert sum(value.size for value in params.values()) == parameters
    embed = lambda params, images: {"embeds": ours.apply(params, images)}
    found, compile_s, run_s = timed(embed, QUICK, params, jnp.asarray(images.transpose(0, 2, 3, 1)))
    error = errors(found, {"embeds": expected})["embeds"]
    with capsys.disabled():
        sys.stdout.write(f"\n{row}: relative error {error:.1e}, compiled in {compile_s:.0f} s, ran {run_s:.0f} s")
    assert error <= TOLERANCE
