"""The SD family's autoencoder (diffusers' AutoencoderKL), built from its config.json."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax.models import strips
from proreflow_jax.models.attention import Attention
from proreflow_jax.models.layers import PLAIN, Compute, Downsample, ResnetBlock, Upsample, conv, group_norm

EPSILON = 1e-6


class SpatialAttention(Attention):
    """One-head attention over the pixels of a feature map, with a skip."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x + super().__call__(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


class MidBlock(nnx.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, width: int, groups: int, rngs: nnx.Rngs, compute: Compute) -> None:
        self.resnets = nnx.List([ResnetBlock(width, width, groups, EPSILON, rngs) for _ in range(2)])
        self.attentions = nnx.List([SpatialAttention(width, 1, rngs, groups=groups, epsilon=EPSILON, compute=compute)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Block(nnx.Module):
    """ResNet blocks, then a down- or upsampler unless it is the last of its side."""

    def __init__(self, inputs: int, width: int, count: int, groups: int, resample: str, rngs: nnx.Rngs) -> None:
        sources = [inputs] + [width] * (count - 1)
        self.resnets = nnx.List([ResnetBlock(source, width, groups, EPSILON, rngs) for source in sources])
        if resample == "down":
            self.downsamplers = nnx.List([Downsample(width, rngs, symmetric=False)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample(width, rngs)])

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x

    def over_strips(self, parts: strips.Strips) -> strips.Strips:
        """The same of a decoder's block, over strips."""
        for block in self.resnets:
            parts = strips.resnet(block, parts)
        for resample in getattr(self, "upsamplers", ()):
            parts = strips.upsample(resample, parts)
        return parts


class Encoder(nnx.Module):
    """Images -> moments of the latents (mean and log-variance, before quant_conv)."""

    def __init__(self, config: dict, rngs: nnx.Rngs, compute: Compute) -> None:
        widths, groups = config["block_out_channels"], config.get("norm_num_groups", 32)
        count, last = config.get("layers_per_block", 1), len(widths) - 1
        self.conv_in = conv(config.get("in_channels", 3), widths[0], 3, rngs)
        pairs = enumerate(zip([widths[0], *widths], widths, strict=False))
        kind = lambda i: "none" if i == last else "down"
        self.down_blocks = nnx.List([Block(source, width, count, groups, kind(i), rngs) for i, (source, width) in pairs])
        self.mid_block = MidBlock(widths[-1], groups, rngs, compute)
        self.conv_norm_out = group_norm(widths[-1], groups, EPSILON, rngs)
        self.conv_out = conv(widths[-1], 2 * config["latent_channels"], 3, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 m"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (after post_quant_conv) -> images."""

    def __init__(self, config: dict, rngs: nnx.Rngs, compute: Compute) -> None:
        widths, groups = config["block_out_channels"][::-1], config.get("norm_num_groups", 32)
        count, last = config.get("layers_per_block", 1) + 1, len(widths) - 1
        self.conv_in = conv(config["latent_channels"], widths[0], 3, rngs)
        self.mid_block = MidBlock(widths[0], groups, rngs, compute)
        pairs = enumerate(zip([widths[0], *widths], widths, strict=False))
        kind = lambda i: "none" if i == last else "up"
        self.up_blocks = nnx.List([Block(source, width, count, groups, kind(i), rngs) for i, (source, width) in pairs])
        self.conv_norm_out = group_norm(widths[-1], groups, EPSILON, rngs)
        self.conv_out = conv(widths[-1], config.get("out_channels", 3), 3, rngs)

    def __call__(self, x: Float[Array, "b h8 w8 l"], count: int = 1) -> Float[Array, "b h w c"]:
        """count: strips of a picture, from the level on where they have rows enough."""
        x, blocks = self.mid_block(self.conv_in(x)), list(self.up_blocks)
        while blocks and (count == 1 or x.shape[1] % count or x.shape[1] < count * strips.LEAST_ROWS):
            x = blocks.pop(0)(x)
        if not blocks:
            return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        parts = strips.cut(x, count)
        for block in blocks:
            parts = block.over_strips(parts)
        return strips.join(strips.convolve(self.conv_out, self.conv_norm_out, parts))


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1] <-> unscaled latents; multiply latents by the config's scaling_factor before diffusion.

    The config's shift_factor (SD 3) is taken off by `encode` and put back by `decode`.
    """

    def __init__(self, config: dict, rngs: nnx.Rngs, compute: Compute = PLAIN) -> None:
        latents, self.shift = config["latent_channels"], config.get("shift_factor") or 0.0
        self.compute, self.widths = compute, tuple(config["block_out_channels"])
        self.encoder = Encoder(config, rngs, compute)
        self.decoder = Decoder(config, rngs, compute)
        if config.get("use_quant_conv", True):
            self.quant_conv = conv(2 * latents, 2 * latents, 1, rngs)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = conv(latents, latents, 1, rngs)

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h8 w8 l"], Float[Array, "b h8 w8 l"]]:
        """Images -> (mean, standard deviation) of the unscaled latents."""
        moments = self.encoder(images)
        moments = self.quant_conv(moments) if hasattr(self, "quant_conv") else moments
        mean, logvar = jnp.split(moments, 2, axis=-1)
        mean = mean - self.shift if self.shift else mean
        return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b h8 w8 l"]) -> Float[Array, "b h w c"]:
        """Unscaled latents -> images, about in [-1, 1]; some at a time, in strips or whole, as `strips.choose_rows` says."""
        (b, h, w, _), scale = latents.shape, 2 ** (len(self.widths) - 1)
        largest = scale * h * scale * w * max(self.widths[:2]) * latents.dtype.itemsize  # behind the last upsampler
        rows, count = strips.choose_rows(self.compute, b // strips.ways(self.compute, b), scale * h, largest)

        def one(z: Float[Array, "n h8 w8 l"]) -> Float[Array, "n h w c"]:
            z = z + self.shift if self.shift else z
            return self.decoder(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z, count)

        return strips.in_rows(one, latents, rows, self.compute)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Reconstruction through the mean."""
        return self.decode(self.encode(images)[0])
