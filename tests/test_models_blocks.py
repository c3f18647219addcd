"""Every block of the family equals its torch original on shared random weights (float32)."""

import jax.numpy as jnp
import pytest
import torch
from diffusers.models import attention as torch_attention
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding as TorchTimestepEmbedding
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch_reference import draw, same, to_jax, twin
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from proreflow_jax.models import attention, clip, layers, vae


@pytest.fixture(autouse=True)
def _no_autograd():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("outputs", [8, 12])
def test_resnet_block_with_time_embedding(outputs):
    module = ResnetBlock2D(in_channels=8, out_channels=outputs, temb_channels=16, groups=4, eps=1e-5)
    ours = twin(module, lambda rngs: layers.ResnetBlock(8, outputs, 4, 1e-5, rngs, embedding=16))
    x, embedding = draw(2, 8, 5, 6), draw(2, 16, seed=2)
    same(ours(to_jax(x), to_jax(embedding)), module(x, embedding))


def test_resnet_block_of_the_vae_has_no_embedding():
    module = ResnetBlock2D(in_channels=8, out_channels=4, temb_channels=None, groups=2, eps=1e-6)
    ours = twin(module, lambda rngs: layers.ResnetBlock(8, 4, 2, 1e-6, rngs))
    x = draw(2, 8, 5, 6)
    same(ours(to_jax(x)), module(x, None))


def test_norm_epsilon_matters_and_is_the_given_one():
    """Inputs as small as sqrt(epsilon), so another epsilon would show."""
    module = ResnetBlock2D(in_channels=4, out_channels=4, temb_channels=None, groups=2, eps=1e-3)
    ours = twin(module, lambda rngs: layers.ResnetBlock(4, 4, 2, 1e-3, rngs))
    x = 0.03 * draw(1, 4, 5, 6)
    same(ours(to_jax(x)), module(x, None))


def test_group_norm_far_from_zero():
    """Activations whose mean is ten times their spread: the variance must not drown in its own rounding."""
    module = torch.nn.GroupNorm(2, 8, eps=1e-6)
    ours = twin(module, lambda rngs: layers.group_norm(8, 2, 1e-6, rngs))
    x = 10 + draw(2, 8, 9, 9)
    same(ours(to_jax(x)), module(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_downsample(size, symmetric):
    """The UNet pads by one on every side, the VAE's encoder only below and to the right."""
    module = Downsample2D(6, use_conv=True, out_channels=6, padding=int(symmetric), name="op")
    ours = twin(module, lambda rngs: layers.Downsample(6, rngs, symmetric=symmetric))
    x = draw(2, 6, *size)
    same(ours(to_jax(x)), module(x))


@pytest.mark.parametrize("shape", [None, (6, 10), (5, 9), (6, 9)])
def test_upsample_to_even_and_odd_sizes(shape):
    module = Upsample2D(4, use_conv=True, out_channels=4)
    ours = twin(module, lambda rngs: layers.Upsample(4, rngs))
    x = draw(2, 4, 3, 5)
    same(ours(to_jax(x), shape=shape), module(x, shape))


@pytest.mark.parametrize("context", [None, 10])
def test_self_and_cross_attention(context):
    module = TorchAttention(query_dim=12, heads=3, dim_head=4, cross_attention_dim=context)
    ours = twin(module, lambda rngs: attention.Attention(12, 3, rngs, context=context))
    x, states = draw(2, 7, 12), None if context is None else draw(2, 5, context, seed=2)
    same(ours(to_jax(x), states if states is None else to_jax(states)), module(x, states))


def test_attention_of_the_vae():
    deprecated = dict(residual_connection=True, bias=True, upcast_softmax=True, _from_deprecated_attn_block=True)
    module = TorchAttention(8, heads=1, dim_head=8, eps=1e-6, norm_num_groups=4, rescale_output_factor=1, **deprecated)
    ours = twin(module, lambda rngs: vae.SpatialAttention(8, 1, rngs, groups=4, epsilon=1e-6))
    x = draw(2, 8, 4, 3)
    same(ours(to_jax(x)), module(x))


def test_geglu_feed_forward():
    module = torch_attention.FeedForward(8, activation_fn="geglu")
    ours = twin(module, lambda rngs: attention.FeedForward(8, rngs))
    x = draw(2, 5, 8)
    same(ours(to_jax(x)), module(x))


def test_transformer_block():
    module = torch_attention.BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)
    ours = twin(module, lambda rngs: attention.TransformerBlock(8, 2, 6, rngs))
    x, context = draw(2, 9, 8), draw(2, 5, 6, seed=2)
    same(ours(to_jax(x), to_jax(context)), module(x, encoder_hidden_states=context))


@pytest.mark.parametrize("linear", [False, True])
def test_transformer_2d_with_convolution_or_linear_projection(linear):
    module = Transformer2DModel(
        2, 4, in_channels=8, num_layers=2, norm_num_groups=4, cross_attention_dim=6, use_linear_projection=linear
    )
    ours = twin(module, lambda rngs: attention.Transformer2D(8, 2, 2, 6, 4, linear, rngs))
    x, context = draw(2, 8, 3, 4), draw(2, 5, 6, seed=2)
    reference = module(x, encoder_hidden_states=context, return_dict=False)[0]
    same(ours(to_jax(x), to_jax(context)), reference)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_sinusoid_of_whole_and_fractional_timesteps(flip, shift):
    timesteps = torch.tensor([0.0, 1.0, 17.5, 999.0])
    reference = Timesteps(32, flip, shift)(timesteps)
    same(layers.sinusoid(to_jax(timesteps), 32, flip, shift), reference)


def test_time_embedding():
    module = TorchTimestepEmbedding(8, 16)
    ours = twin(module, lambda rngs: layers.TimestepEmbedding(8, 16, rngs))
    x = draw(3, 8)
    same(ours(to_jax(x)), module(x))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_layer_is_causal_and_equal(activation):
    config = dict(hidden_size=12, num_attention_heads=3, intermediate_size=20, hidden_act=activation)
    reference = CLIPTextConfig(**config)
    reference._attn_implementation = "eager"
    module = CLIPEncoderLayer(reference)
    ours = twin(module, lambda rngs: clip.Layer(config, rngs, causal=True))
    x = draw(2, 6, 12)
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    output = module(x, attention_mask=mask)
    output = output[0] if isinstance(output, tuple) else output
    same(ours(to_jax(x)), output)
    changed = to_jax(x).at[:, -1].add(1.0)
    assert jnp.array_equal(ours(changed)[:, :-1], ours(to_jax(x))[:, :-1])
