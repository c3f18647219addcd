"""Blocks that the UNet and the VAE share. Attribute names are the checkpoint's names; layout is NHWC.

Statistics of every norm are taken in float32 (nnx's norms do that), the tensors stay in the dtype they came in.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax.models.kernels import Compute, gather


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride: int = 1, padding: int | str = -1) -> nnx.Conv:
    """A 2-D convolution with torch's symmetric padding (half the kernel unless told)."""
    pad = size // 2 if padding == -1 else padding
    return nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=pad, rngs=rngs)


def group_norm(channels: int, groups: int, epsilon: float, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation with torch's meaning of its numbers."""
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=epsilon, rngs=rngs)


def gathering(module: nnx.Module, compute: Compute) -> nnx.Module:
    """The module; where the state is sharded, each layer gathers its own weights, unless layers are split (tensor)."""
    if compute.mesh is not None and compute.mesh.shape["fsdp"] > 1 and compute.mesh.shape["tensor"] == 1:
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.Linear | nnx.Conv):
                layer.promote_dtype = partial(_gathered, compute.mesh, layer.promote_dtype)
    return module


def _gathered(mesh: jax.sharding.Mesh, promote: Any, arrays: tuple[Array | None, ...], **dtype: Any) -> tuple[Any, ...]:
    inputs, *weights = arrays
    return promote((inputs, *(w if w is None else gather(w, mesh) for w in weights)), **dtype)


def weights_of(linear: nnx.Linear, x: Float[Array, "..."]) -> tuple[Float[Array, "i o"], Float[Array, " o"] | None]:
    """(kernel, bias) as the layer itself would use them on x: in its dtype, gathered."""
    bias = None if linear.bias is None else linear.bias[...]
    _, kernel, bias = linear.promote_dtype((x, linear.kernel[...], bias), dtype=linear.dtype)
    return kernel, bias


def sinusoid(timesteps: Float[Array, "*b"], width: int, flip: bool, shift: float) -> Float[Array, "*b w"]:
    """Sinusoidal features of (fractional) timesteps, cosines first when `flip` (diffusers' flip_sin_to_cos)."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angle = timesteps.astype(jnp.float32)[..., None] * frequency
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with a SiLU between: timestep features (b, i) -> embedding (b, o)."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.linear_1 = nnx.Linear(inputs, outputs, rngs=rngs)
        self.linear_2 = nnx.Linear(outputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, twice, around a skip; the time embedding is added between (absent in the VAE)."""

    def __init__(
        self, inputs: int, outputs: int, groups: int, epsilon: float, rngs: nnx.Rngs, embedding: int | None = None
    ) -> None:
        self.norm1 = group_norm(inputs, groups, epsilon, rngs)
        self.conv1 = conv(inputs, outputs, 3, rngs)
        if embedding is not None:
            self.time_emb_proj = nnx.Linear(embedding, outputs, rngs=rngs)
        self.norm2 = group_norm(outputs, groups, epsilon, rngs)
        self.conv2 = conv(outputs, outputs, 3, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, rngs)

    def __call__(self, x: Float[Array, "b h w i"], embedding: Float[Array, "b e"] | None = None) -> Float[Array, "b h w o"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.time_emb_proj(jax.nn.silu(embedding))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nnx.Module):
    """Halves height and width. The UNet pads by 1 on every side, the VAE's encoder by (0, 1)."""

    def __init__(self, channels: int, rngs: nnx.Rngs, symmetric: bool = True) -> None:
        padding = 1 if symmetric else ((0, 1), (0, 1))
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, cropped to `shape` (height, width) where the skip is odd, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, 3, rngs)

    def __call__(self, x: Float[Array, "b h w c"], shape: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        wide = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        if shape is not None:  # one short of twice at odd sizes: torch's nearest pixels are the doubled ones, cropped
            wide = wide[:, : shape[0], : shape[1]]
        return self.conv(wide)
