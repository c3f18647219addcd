"""The SD family's UNet (diffusers' UNet2DConditionModel), built from its config.json.

SD 1.5, 2.1 and SDXL are one architecture with other numbers: `architecture` reads the numbers and refuses unknown ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.models.attention import Transformer2D
from proreflow_jax.models.layers import (
    PLAIN,
    Compute,
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    conv,
    group_norm,
    rerun,
    sinusoid,
)

KNOWN = {  # field -> the values this architecture has, diffusers' default first; anything else is another network
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


class Level(NamedTuple):
    """One resolution of the UNet."""

    width: int
    heads: int
    depth: int  # transformer blocks per attention, 0: none
    resnets: int


class Architecture(NamedTuple):
    """Everything that tells one UNet of the family from another."""

    inputs: int
    outputs: int
    levels: tuple[Level, ...]
    mid_depth: int
    context: int
    groups: int
    epsilon: float
    linear: bool
    flip: bool
    shift: float
    extra: tuple[int, int]  # (width of each time id's features, inputs of add_embedding); (0, 0): none


def architecture(config: dict) -> Architecture:
    """Reads a UNet's config.json. Raises ValueError, one line, for a network of another kind."""
    for field, values in KNOWN.items():
        if config.get(field, values[0]) not in values:
            known = ", ".join(map(repr, values))
            raise UserError(f"unet config: {field}={config[field]!r} is not supported, known: {known}")
    widths = config["block_out_channels"]
    n = len(widths)
    spread = lambda value: list(value) if isinstance(value, (list, tuple)) else [value] * n
    heads = spread(config.get("num_attention_heads") or config["attention_head_dim"])
    depths = spread(config.get("transformer_layers_per_block", 1))
    resnets = spread(config.get("layers_per_block", 2))
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    down, up = config["down_block_types"], config["up_block_types"]
    for field in ("down_block_types", "up_block_types"):
        if unknown := [kind for kind in config[field] if kind not in kinds]:
            raise UserError(f"unet config: {field} has {unknown[0]!r}, which is not supported, known: {sorted(kinds)}")
    if [kinds[k] for k in down] != [kinds[k] for k in reversed(up)]:
        raise UserError(f"unet config: up_block_types {list(up)} do not mirror down_block_types {list(down)}")
    levels = zip(widths, heads, [d * kinds[k] for d, k in zip(depths, down, strict=True)], resnets, strict=True)
    added = config.get("addition_embed_type") == "text_time"
    return Architecture(
        inputs=config["in_channels"],
        outputs=config["out_channels"],
        levels=tuple(Level(*row) for row in levels),
        mid_depth=depths[-1],
        context=config["cross_attention_dim"],
        groups=config.get("norm_num_groups", 32),
        epsilon=config.get("norm_eps", 1e-5),
        linear=config.get("use_linear_projection", False),
        flip=config.get("flip_sin_to_cos", True),
        shift=float(config.get("freq_shift", 0)),
        extra=(config["addition_time_embed_dim"], config["projection_class_embeddings_input_dim"]) if added else (0, 0),
    )


def _resnet(a: Architecture, inputs: int, outputs: int, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(inputs, outputs, a.groups, a.epsilon, rngs, embedding=4 * a.levels[0].width)


def _transformer(a: Architecture, level: Level, depth: int, rngs: nnx.Rngs, compute: Compute) -> Transformer2D:
    return Transformer2D(level.width, level.heads, depth, a.context, a.groups, a.linear, rngs, compute)


def _joined(resnet: ResnetBlock, x: Array, skip: Array, embedding: Array) -> Array:
    return resnet(jnp.concatenate([x, skip], axis=-1), embedding)


class DownBlock(nnx.Module):
    """ResNet blocks, each followed by a transformer where the level has one, then a downsampler; keeps every state."""

    def __init__(self, a: Architecture, inputs: int, level: Level, last: bool, rngs: nnx.Rngs, compute: Compute) -> None:
        width, self.remat = level.width, compute.remat
        self.resnets = nnx.List([_resnet(a, inputs if i == 0 else width, width, rngs) for i in range(level.resnets)])
        if level.depth:
            self.attentions = nnx.List([_transformer(a, level, level.depth, rngs, compute) for _ in range(level.resnets)])
        if not last:
            self.downsamplers = nnx.List([Downsample(width, rngs)])

    def __call__(self, x: Array, embedding: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = rerun(self.remat, ResnetBlock.__call__, resnet, x, embedding)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """ResNet block, transformer, ResNet block at the lowest resolution."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs, compute: Compute) -> None:
        level, self.remat = a.levels[-1], compute.remat
        self.resnets = nnx.List([_resnet(a, level.width, level.width, rngs) for _ in range(2)])
        self.attentions = nnx.List([_transformer(a, level, a.mid_depth, rngs, compute)])

    def __call__(self, x: Array, embedding: Array, context: Array) -> Array:
        x = rerun(self.remat, ResnetBlock.__call__, self.resnets[0], x, embedding)
        x = self.attentions[0](x, context)
        return rerun(self.remat, ResnetBlock.__call__, self.resnets[1], x, embedding)


class UpBlock(nnx.Module):
    """ResNet blocks over the state joined with the skips, transformers as on the way down, then an upsampler."""

    def __init__(
        self, a: Architecture, inputs: int, skips: list[int], level: Level, last: bool, rngs: nnx.Rngs, compute: Compute
    ) -> None:
        width, n, self.remat = level.width, level.resnets + 1, compute.remat
        sources = [inputs] + [width] * (n - 1)
        pairs = zip(sources, skips, strict=True)
        self.resnets = nnx.List([_resnet(a, source + skip, width, rngs) for source, skip in pairs])
        if level.depth:
            self.attentions = nnx.List([_transformer(a, level, level.depth, rngs, compute) for _ in range(n)])
        if not last:
            self.upsamplers = nnx.List([Upsample(width, rngs, compute)])

    def __call__(self, x: Array, skips: list[Array], embedding: Array, context: Array) -> Array:
        for i, resnet in enumerate(self.resnets):
            x = rerun(self.remat, _joined, resnet, x, skips.pop(), embedding)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[1:3])
        return x


class UNet(nnx.Module):
    """Latents, timesteps and text states -> the network's raw output (epsilon, v, or what a student predicts)."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs, compute: Compute = PLAIN) -> None:
        self.a = a
        widths = [level.width for level in a.levels]
        embedding = 4 * widths[0]
        self.conv_in = conv(a.inputs, widths[0], 3, rngs)
        self.time_embedding = TimestepEmbedding(widths[0], embedding, rngs)
        if a.extra[1]:
            self.add_embedding = TimestepEmbedding(a.extra[1], embedding, rngs)
        last = len(widths) - 1
        blocks = enumerate(zip([widths[0], *widths], a.levels, strict=False))
        self.down_blocks = nnx.List([DownBlock(a, source, level, i == last, rngs, compute) for i, (source, level) in blocks])
        self.mid_block = MidBlock(a, rngs, compute)
        skips = [widths[0]]
        for i, level in enumerate(a.levels):
            skips += [level.width] * (level.resnets + (i != last))
        self.up_blocks = nnx.List([])
        source = widths[-1]
        for i, level in enumerate(reversed(a.levels)):
            taken = [skips.pop() for _ in range(level.resnets + 1)]
            self.up_blocks.append(UpBlock(a, source, taken, level, i == last, rngs, compute))
            source = level.width
        self.conv_norm_out = group_norm(widths[0], a.groups, a.epsilon, rngs)
        self.conv_out = conv(widths[0], a.outputs, 3, rngs)

    def _embed(self, x: Array, timesteps: Array, pooled: Array | None, time_ids: Array | None) -> Array:
        a = self.a
        features = sinusoid(timesteps, a.levels[0].width, a.flip, a.shift).astype(x.dtype)
        embedding = self.time_embedding(features)
        if a.extra[1]:  # SDXL: pooled text state and micro-conditioning
            ids = sinusoid(time_ids, a.extra[0], a.flip, a.shift).reshape(x.shape[0], -1)
            embedding = embedding + self.add_embedding(jnp.concatenate([pooled, ids.astype(x.dtype)], axis=-1))
        return embedding

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        timesteps: Float[Array, " b"],
        context: Float[Array, "b t d"],
        pooled: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b 6"] | None = None,
    ) -> Float[Array, "b h w o"]:
        embedding = self._embed(x, timesteps, pooled, time_ids)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, states = block(x, embedding, context)
            skips += states
        x = self.mid_block(x, embedding, context)
        for block in self.up_blocks:
            x = block(x, skips, embedding, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
