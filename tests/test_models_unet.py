"""Whole UNets of the family equal diffusers' UNet2DConditionModel: outputs, gradients, bfloat16; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch_reference import draw, error, quick_jit, randomise, same, tensors, to_jax

from proreflow_jax.models import network, unet
from proreflow_jax.pretrained import weights

BLOCKS = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    norm_num_groups=4,
    cross_attention_dim=12,
    in_channels=4,
    out_channels=4,
)
LINEAR = dict(use_linear_projection=True, layers_per_block=1)
ADDED = dict(addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=10 + 6 * 6)
KINDS = {
    "SD 1.5": BLOCKS | dict(layers_per_block=2, attention_head_dim=2, sample_size=8),
    "SD 2.1": BLOCKS | LINEAR | dict(attention_head_dim=(2, 4)),
    "SDXL": BLOCKS
    | LINEAR
    | ADDED
    | dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=[1, 2, 3],
    ),
}
SMALL = {  # for gradients, whose compilation is dear
    "SD 1.5": KINDS["SD 1.5"] | dict(layers_per_block=1),
    "SDXL": KINDS["SD 2.1"] | ADDED | dict(transformer_layers_per_block=[1, 2]),
}
SIZES = {"SD 1.5": (8, 6), "SD 2.1": (7, 5), "SDXL": (8, 8)}
REFUSED = dict(
    down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    mid_block_type=None,
    class_embed_type="timestep",
    num_class_embeds=10,
    act_fn="gelu",
    encoder_hid_dim_type="text_proj",
    addition_embed_type="image",
    time_embedding_type="fourier",
    time_cond_proj_dim=256,
    timestep_post_act="silu",
    time_embedding_act_fn="silu",
    resnet_time_scale_shift="scale_shift",
    resnet_skip_time_act=True,
    resnet_out_scale_factor=2.0,
    mid_block_scale_factor=2,
    downsample_padding=0,
    center_input_sample=True,
    conv_in_kernel=1,
    attention_type="gated",
    dual_cross_attention=True,
    only_cross_attention=[True, True],
    cross_attention_norm="layer_norm",
    reverse_transformer_layers_per_block=[1, 1],
)


def make(config):
    """(torch UNet, our network, our parameters) with the same random weights."""
    module = randomise(UNet2DConditionModel(**config))
    ours = network.make_unet(dict(module.config))
    params = weights.from_torch(tensors(module), ours.shapes, "tiny unet")
    return module, ours, {name: jnp.asarray(value) for name, value in params.items()}


def inputs(kind):
    """Positional inputs in torch's layout: latents, timesteps (one of them fractional), context, SDXL's two more."""
    latents = draw(2, 4, *SIZES[kind])
    fixed = (latents, torch.tensor([999.0, 249.5]), draw(2, 5, 12, seed=2))
    sizes = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0], [512.0, 512.0, 8.0, 0.0, 768.0, 512.0]])
    return (*fixed, draw(2, 10, seed=3), sizes) if kind == "SDXL" else fixed


def reference(module, x, timesteps, context, *extra):
    """diffusers' output."""
    added = dict(zip(("text_embeds", "time_ids"), extra, strict=True)) if extra else None
    return module(x, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    """SD 2.1's latents are 7 x 5: skips of odd size; one timestep of each pair is fractional."""
    module, ours, params = make(KINDS[kind])
    given = inputs(kind)
    with torch.no_grad():
        expected = reference(module, *given)
    same(quick_jit(ours.apply)(params, *map(to_jax, given)), expected)


def in_bfloat16(ours):
    """The forward pass as the training step runs it: times and sizes stay float32, all else is bfloat16."""

    def apply(params, x, timesteps, *states):
        states = [value.astype(jnp.bfloat16) for value in states[:2]] + list(states[2:])
        return ours.apply(network.cast(params, jnp.bfloat16), x.astype(jnp.bfloat16), timesteps, *states)

    return apply


def test_bfloat16_is_near_float32():
    module, ours, params = make(KINDS["SD 2.1"])
    given = inputs("SD 2.1")
    with torch.no_grad():
        expected = reference(module, *given)
    same(quick_jit(in_bfloat16(ours))(params, *map(to_jax, given)), expected, 2e-2)


def test_bfloat16_stays_bfloat16():
    """No convolution of SDXL falls back to float32: one float32 input would promote all that follows."""
    ours = network.make_unet(SMALL["SDXL"])
    jaxpr = jax.make_jaxpr(in_bfloat16(ours))(ours.shapes, *map(to_jax, inputs("SDXL")))
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    lines = [line for line in str(jaxpr).splitlines() if "conv_general_dilated[" in line]
    assert lines and all("bf16[" in line for line in lines)


def gradients(apply, params, r, given):
    """Gradients of <apply(params, x, ...), r> by the parameters and by x."""
    weighed = lambda params, x, *rest: (apply(params, x, *rest) * r).sum()
    return quick_jit(jax.grad(weighed, argnums=(0, 1)))(params, *given)


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_by_every_parameter_and_by_the_input(kind):
    module, ours, params = make(SMALL[kind])
    given = inputs(kind)
    given[0].requires_grad_(True)
    expected = reference(module, *given)
    r = draw(*expected.shape, seed=4)
    (expected * r).sum().backward()

    by_params, by_input = gradients(ours.apply, params, to_jax(r), list(map(to_jax, given)))

    same(by_input, given[0].grad)
    found = {name: torch.tensor(value) for name, value in weights.to_torch(by_params).items()}
    wanted = {name: value.grad for name, value in module.named_parameters()}
    assert found.keys() == wanted.keys()
    far = {name: error(to_jax(found[name]), wanted[name]) for name in wanted}
    assert np.max(list(far.values())) <= 5e-4, sorted(far.items(), key=lambda row: -row[1])[:3]
    every = lambda tree: torch.cat([tree[name].flatten() for name in wanted])
    same(to_jax(every(found)), every(wanted))


@pytest.mark.parametrize("field, value", list(REFUSED.items()))
def test_networks_of_another_kind_are_refused(field, value):
    """Each of these changes the function, most of them without changing one weight's name."""
    with pytest.raises(ValueError, match=field) as caught:
        unet.architecture(KINDS["SD 1.5"] | {field: value})
    assert "\n" not in str(caught.value)


def test_up_blocks_must_mirror_down_blocks():
    kinds = KINDS["SD 1.5"] | dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(ValueError, match="do not mirror"):
        unet.architecture(kinds)


def test_fields_as_a_stock_config_spells_them_are_accepted():
    """The config of every kind as diffusers itself completes it, and as JSON would carry it."""
    for kind in KINDS.values():
        config = json.loads(json.dumps(dict(UNet2DConditionModel(**kind).config)))
        assert unet.architecture(config) == unet.architecture(kind)
