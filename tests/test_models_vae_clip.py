"""The autoencoder and the text encoder equal diffusers' AutoencoderKL and transformers' CLIP text models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch_reference import draw, quick_jit, randomise, same, tensors, to_jax
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from proreflow_jax.models import network
from proreflow_jax.pretrained import config_fields, weights

VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
)
CLIP = dict(
    vocab_size=60,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=9,
    projection_dim=7,
    bos_token_id=58,
)
IDS = [[58, 3, 4, 59, 59, 59, 59, 59, 59], [58, 50, 3, 3, 20, 1, 0, 7, 59], [58, 5, 59, 0, 0, 0, 0, 0, 0]]


def make(maker, module, config, prefix=""):
    """(our network, our parameters) with the module's weights after they were drawn at random."""
    ours = maker(config)
    found = {prefix + name: value for name, value in tensors(randomise(module)).items()}
    params = weights.from_torch(found, ours.shapes, type(module).__name__)
    return ours, {name: jnp.asarray(value) for name, value in params.items()}


@pytest.mark.parametrize("quant", [True, False])
def test_vae_encode_and_decode(quant):
    """Mean and standard deviation of the latents, and the decoded image; images of 8 x 12."""
    module = AutoencoderKL(**VAE, use_quant_conv=quant, use_post_quant_conv=quant)
    ours, params = make(network.make_vae, module, dict(module.config))
    assert ("quant_conv.weight" in params) == quant
    images, latents = draw(2, 3, 8, 12), draw(2, 4, 4, 6, seed=2)
    with torch.no_grad():
        expected = module.encode(images).latent_dist
        decoded = module.decode(latents).sample
    mean, std = quick_jit(lambda p, x: ours.apply(p, x, method="encode"))(params, to_jax(images))
    same(mean, expected.mean)
    same(std, expected.std)
    same(quick_jit(lambda p, x: ours.apply(p, x, method="decode"))(params, to_jax(latents)), decoded)


def test_vae_of_sd_3_has_16_channels_a_shift_and_no_quant_convs():
    """Our latents are diffusers' less the shift, so that a pipeline only scales them: (latents - shift) scale."""
    shift, plain = 0.0609, dict(use_quant_conv=False, use_post_quant_conv=False)
    module = AutoencoderKL(**(VAE | dict(latent_channels=16)), shift_factor=shift, **plain)
    ours, params = make(network.make_vae, module, dict(module.config))
    images, latents = draw(2, 3, 8, 12), draw(2, 16, 4, 6, seed=2)
    with torch.no_grad():
        expected = module.encode(images).latent_dist
        decoded = module.decode(latents + shift).sample
    mean, std = quick_jit(lambda p, x: ours.apply(p, x, method="encode"))(params, to_jax(images))
    same(mean, expected.mean - shift)
    same(std, expected.std)
    same(quick_jit(lambda p, x: ours.apply(p, x, method="decode"))(params, to_jax(latents)), decoded)


def test_vae_log_variance_is_clipped_as_in_diffusers():
    module = AutoencoderKL(**VAE)
    ours, params = make(network.make_vae, module, dict(module.config))
    moved = params | {"quant_conv.bias": jnp.array([0.0] * 4 + [100.0] * 2 + [-100.0] * 2)}
    _, std = quick_jit(lambda p, x: ours.apply(p, x, method="encode"))(moved, to_jax(draw(1, 3, 4, 4)))
    np.testing.assert_allclose(std[..., :2], np.exp(10.0), rtol=1e-5)
    np.testing.assert_allclose(std[..., 2:], np.exp(-15.0), rtol=1e-5)


def test_vae_files_with_the_attention_names_of_old(tmp_path):
    """SD 1.5's VAE on the Hub says query, key, value, proj_attn; diffusers renames them at reading, so do we."""
    module = randomise(AutoencoderKL(**VAE))
    module.save_config(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in tensors(module).items():
        for today, then in names.items():
            name = name.replace(f"attentions.0.{today}.", f"attentions.0.{then}.")
        old[name] = value
    assert sum("proj_attn" in name for name in old) == 4
    weights.save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", old)
    reloaded = AutoencoderKL.from_pretrained(tmp_path)
    ours = network.make_vae(config_fields.read_config(tmp_path, "vae"))
    params = weights.to_torch(weights.from_torch(weights.read_tensors(tmp_path), ours.shapes, "old vae"))
    expected = tensors(reloaded)
    assert params.keys() == expected.keys()
    assert all(np.array_equal(params[name], expected[name]) for name in expected)


@pytest.mark.parametrize("end", [2, 59])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text_states(activation, end):
    """Last, penultimate and pooled states; end=2 is the legacy config whose end token is the largest id."""
    config = CLIPTextConfig(**CLIP, hidden_act=activation, eos_token_id=end)
    module = CLIPTextModel(config)
    ours, params = make(network.make_text_encoder, module, config.to_dict())
    with torch.no_grad():
        expected = module(torch.tensor(IDS), output_hidden_states=True)
    states = quick_jit(ours.apply)(params, jnp.array(IDS))
    same(states.last, expected.last_hidden_state)
    same(states.penultimate, expected.hidden_states[-2])
    same(states.pooled, expected.pooler_output)


def test_clip_end_token_that_is_not_the_largest_id():
    """With eos_token_id given, the first such token pools, though a larger id stands in the prompt."""
    config = CLIPTextConfig(**CLIP, eos_token_id=40)
    module = CLIPTextModel(config)
    ours, params = make(network.make_text_encoder, module, config.to_dict())
    ids = [[58, 59, 3, 40, 40, 40, 40, 40, 40], [58, 40, 59, 1, 2, 3, 4, 5, 40]]
    with torch.no_grad():
        expected = module(torch.tensor(ids))
    same(quick_jit(ours.apply)(params, jnp.array(ids)).pooled, expected.pooler_output)


@pytest.mark.parametrize("end", [2, 59])
def test_clip_with_projection(end):
    config = CLIPTextConfig(**CLIP, eos_token_id=end, architectures=["CLIPTextModelWithProjection"])
    module = CLIPTextModelWithProjection(config)
    ours, params = make(network.make_text_encoder, module, config.to_dict())
    with torch.no_grad():
        expected = module(torch.tensor(IDS), output_hidden_states=True)
    states = quick_jit(ours.apply)(params, jnp.array(IDS))
    same(states.pooled, expected.text_embeds)
    same(states.penultimate, expected.hidden_states[-2])
    same(states.last, expected.last_hidden_state)


def test_clip_shorter_prompts_take_the_first_positions():
    config = CLIPTextConfig(**CLIP)
    module = CLIPTextModel(config)
    ours, params = make(network.make_text_encoder, module, config.to_dict())
    with torch.no_grad():
        expected = module(torch.tensor(IDS)[:, :4])
    same(quick_jit(ours.apply)(params, jnp.array(IDS)[:, :4]).last, expected.last_hidden_state)


@pytest.mark.parametrize("projected", [False, True])
def test_clip_files_with_and_without_the_prefix_and_position_ids(projected):
    """transformers 5 names are short for CLIPTextModel; the Hub's files say text_model. and hold position_ids."""
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    config = CLIPTextConfig(**CLIP, architectures=[kind.__name__])
    found = tensors(randomise(kind(config)))
    short = {name.removeprefix("text_model."): value for name, value in found.items()}
    projection = {name: short.pop(name) for name in list(short) if name.startswith("text_projection")}
    assert bool(projection) == projected
    shapes = network.make_text_encoder(config.to_dict()).shapes
    positions = {"embeddings.position_ids": np.arange(9)[None]}
    long = {f"text_model.{name}": value for name, value in (short | positions).items()}
    first = weights.from_torch(short | projection, shapes, "short")
    second = weights.from_torch(long | projection, shapes, "long")
    assert first.keys() == second.keys() == shapes.keys()
    assert all(np.array_equal(first[name], second[name]) for name in shapes)


def test_clip_in_bfloat16():
    config = CLIPTextConfig(**CLIP)
    module = CLIPTextModel(config)
    ours, params = make(network.make_text_encoder, module, config.to_dict())
    with torch.no_grad():
        expected = module(torch.tensor(IDS))
    states = quick_jit(lambda p, ids: ours.apply(network.cast(p, jnp.bfloat16), ids))(params, jnp.array(IDS))
    assert states.last.dtype == states.pooled.dtype == jnp.bfloat16
    same(states.last, expected.last_hidden_state, 2e-2)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        network.make_text_encoder(CLIP | dict(hidden_act="relu"))


def test_init_gives_the_shapes_that_were_promised():
    """Every network can be born from a key: finite, of the shapes stated, and not all equal."""
    ours = network.make_text_encoder(CLIP)
    init = quick_jit(ours.init)
    params = init(jax.random.key(0))
    assert {name: value.shape for name, value in params.items()} == {n: s.shape for n, s in ours.shapes.items()}
    assert all(bool(jnp.isfinite(value).all()) for value in params.values())
    other, name = init(jax.random.key(1)), "text_model.encoder.layers.0.mlp.fc1.weight"
    assert not jnp.array_equal(params[name], other[name])
