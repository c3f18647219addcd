"""The FID's feature network: Inception-v3 as TensorFlow published it on 2015-12-05, its resize included.

Names are those of the published conversion (pt_inception-2015-12-05, read by pytorch-fid and torch-fidelity alike). It differs
from the Inception of textbooks: average pools leave the padding out of the mean, and Mixed_7c takes a maximum where Mixed_7b
takes an average. Everything is float32 at the highest precision: at a TPU's default the features would be bfloat16's.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from proreflow_jax import UserError
from proreflow_jax.models import network

NAME = "inception-2015-12-05"  # named beside every number that rests on it
SIZE = 299  # pixels, height and width, that the network sees
FEATURES, CLASSES = 2048, 1008
EXACT = jax.lax.Precision.HIGHEST
UNUSED = "num_batches_tracked"  # a counter of torch's batch norm, in some files
MEND = "convert the published file to .safetensors again, or name another --config.evaluate.inception"

Kernel = tuple[int, int]
Conv = tuple[str, int, Kernel, int]  # name, channels out, kernel, stride; padded by half the kernel unless it strides
Branch = tuple[str | Conv | tuple[Conv, ...], ...]  # pools by name, convolutions, and forks; the results of a fork are joined


def conv(name: str, outputs: int, kernel: Kernel | int = 1, stride: int = 1) -> Conv:
    """A row of the tables below."""
    return (name, outputs, (kernel, kernel) if isinstance(kernel, int) else kernel, stride)


def block_a(pool: int) -> tuple[Branch, ...]:
    """Mixed_5b to 5d, 35x35."""
    return (
        (conv("branch1x1", 64),),
        (conv("branch5x5_1", 48), conv("branch5x5_2", 64, 5)),
        (conv("branch3x3dbl_1", 64), conv("branch3x3dbl_2", 96, 3), conv("branch3x3dbl_3", 96, 3)),
        ("average", conv("branch_pool", pool)),
    )


def block_b() -> tuple[Branch, ...]:
    """Mixed_6a, 35x35 -> 17x17."""
    return (
        (conv("branch3x3", 384, 3, 2),),
        (conv("branch3x3dbl_1", 64), conv("branch3x3dbl_2", 96, 3), conv("branch3x3dbl_3", 96, 3, 2)),
        ("halve",),
    )


def block_c(width: int) -> tuple[Branch, ...]:
    """Mixed_6b to 6e, 17x17."""
    row, column, double = (1, 7), (7, 1), "branch7x7dbl_"
    return (
        (conv("branch1x1", 192),),
        (conv("branch7x7_1", width), conv("branch7x7_2", width, row), conv("branch7x7_3", 192, column)),
        (
            conv(f"{double}1", width),
            conv(f"{double}2", width, column),
            conv(f"{double}3", width, row),
            conv(f"{double}4", width, column),
            conv(f"{double}5", 192, row),
        ),
        ("average", conv("branch_pool", 192)),
    )


def block_d() -> tuple[Branch, ...]:
    """Mixed_7a, 17x17 -> 8x8."""
    name = "branch7x7x3_"
    return (
        (conv("branch3x3_1", 192), conv("branch3x3_2", 320, 3, 2)),
        (conv(f"{name}1", 192), conv(f"{name}2", 192, (1, 7)), conv(f"{name}3", 192, (7, 1)), conv(f"{name}4", 192, 3, 2)),
        ("halve",),
    )


def block_e(pool: str) -> tuple[Branch, ...]:
    """Mixed_7b (pool "average") and 7c (pool "maximum"), 8x8."""
    fork = lambda name: (conv(f"{name}a", 384, (1, 3)), conv(f"{name}b", 384, (3, 1)))
    return (
        (conv("branch1x1", 320),),
        (conv("branch3x3_1", 384), fork("branch3x3_2")),
        (conv("branch3x3dbl_1", 448), conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
        (pool, conv("branch_pool", 192)),
    )


BLOCKS = {  # name: (channels in, branches)
    "Mixed_5b": (192, block_a(32)),
    "Mixed_5c": (256, block_a(64)),
    "Mixed_5d": (288, block_a(64)),
    "Mixed_6a": (288, block_b()),
    "Mixed_6b": (768, block_c(128)),
    "Mixed_6c": (768, block_c(160)),
    "Mixed_6d": (768, block_c(160)),
    "Mixed_6e": (768, block_c(192)),
    "Mixed_7a": (768, block_d()),
    "Mixed_7b": (1280, block_e("average")),
    "Mixed_7c": (2048, block_e("maximum")),
}
BORDER = ((1, 1), (1, 1))
POOLS: dict[str, Callable] = {
    "average": partial(nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding=BORDER, count_include_pad=False),
    "maximum": partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding=BORDER),
    "halve": partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2)),
}


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm by its running statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int, padding: Kernel, rngs: nnx.Rngs) -> None:
        around = [(p, p) for p in padding]
        self.conv = nnx.Conv(inputs, outputs, kernel, stride, padding=around, use_bias=False, precision=EXACT, rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class Block(nnx.Module):
    """Branches of a row of BLOCKS side by side, joined along the channels."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...], rngs: nnx.Rngs) -> None:
        self.branches = branches
        for branch in branches:
            width = inputs
            for step in branch:
                for name, outputs, kernel, stride in _convs(step):
                    padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
                    setattr(self, name, ConvNorm(width, outputs, kernel, stride, padding, rngs))
                width = sum(row[1] for row in _convs(step)) or width

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return jnp.concatenate([self._follow(branch, x) for branch in self.branches], axis=-1)

    def _follow(self, branch: Branch, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for step in branch:
            parts = [getattr(self, name)(x) for name, *_ in _convs(step)]
            x = jnp.concatenate(parts, axis=-1) if parts else POOLS[step](x)
        return x


def _convs(step: str | Conv | tuple[Conv, ...]) -> tuple[Conv, ...]:
    if isinstance(step, str):
        return ()
    return (step,) if isinstance(step[0], str) else step


class Inception(nnx.Module):
    """Images -> the 2,048 features of the last pool."""

    def __init__(self, resize: str, rngs: nnx.Rngs) -> None:
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, (0, 0), rngs)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, (0, 0), rngs)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1, (1, 1), rngs)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1, (0, 0), rngs)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, (0, 0), rngs)
        for name, (inputs, branches) in BLOCKS.items():
            setattr(self, name, Block(inputs, branches, rngs))
        # The published file holds this layer, and conversion is total. FID does not use class scores.
        self.fc = nnx.Linear(FEATURES, CLASSES, precision=EXACT, rngs=rngs)

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        x = prepare_inception(images, self.resize)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = POOLS["halve"](x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(axis=(1, 2))


def tf1_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "o i"]:
    """Bilinear as in TensorFlow 1 (align_corners=False): pixel i is taken from i * scale, half a pixel off the centre.

    Positions are float32, as there. Source: `resize_bilinear_op.cc`; torch-fidelity's interpolate_compat_tensorflow.
    """
    return _linear(np.arange(outputs, dtype=np.float32) * np.float32(inputs / outputs), inputs)


def torch_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "o i"]:
    """Bilinear as in torch's `F.interpolate(align_corners=False)`: centres on centres, no smoothing where it shrinks."""
    half = np.float32(0.5)
    centres = (np.arange(outputs, dtype=np.float32) + half) * np.float32(inputs / outputs) - half
    return _linear(np.maximum(centres, 0), inputs)


def _linear(positions: Float[np.ndarray, " o"], inputs: int) -> Float[np.ndarray, "o i"]:
    rows, low = np.arange(len(positions)), np.minimum(positions.astype(np.int64), inputs - 1)
    matrix = np.zeros((len(positions), inputs), np.float32)
    np.add.at(matrix, (rows, low), 1 - (positions - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, inputs - 1)), positions - low)
    return matrix


def clean_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "o i"]:
    """Bicubic (a = -1/2) smoothed where it shrinks, as PIL resizes float images and clean-fid (Parmar et al. 2022) uses it."""
    scale = inputs / outputs
    offset = np.arange(inputs) + 0.5 - (np.arange(outputs)[:, None] + 0.5) * scale
    x = np.abs(offset) / max(scale, 1.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)


RESIZES = {  # name: (matrix, pixel that becomes 0, pixels from 0 to 1)
    "tf1": (tf1_matrix, 128.0, 128.0),  # the original; torch-fidelity
    "torch": (torch_matrix, 127.5, 127.5),  # pytorch-fid
    "clean": (clean_matrix, 128.0, 128.0),  # clean-fid, and GigaGAN's evaluation with it
}


def prepare_inception(images: UInt8[Array, "b h w 3"], resize: str) -> Float[Array, "b 299 299 3"]:
    """Images of any size as the network wants them: two small matrix products and a shift to about [-1, 1]."""
    matrix, middle, reach = RESIZES[resize]
    down, across = (jnp.asarray(matrix(length, SIZE)) for length in images.shape[1:3])
    x = jnp.einsum("oh,bhwc->bowc", down, images.astype(jnp.float32), precision=EXACT)
    return (jnp.einsum("pw,bowc->bopc", across, x, precision=EXACT) - middle) / reach


def make_inception(resize: str = "tf1") -> network.Network:
    """apply(params, images uint8 (b,h,w,3)) -> features (b,2048) float32.

    Args:
      resize: how images come to 299 x 299, a name of `RESIZES`.

    Raises ValueError for another name.
    """
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r} is none of {', '.join(RESIZES)}: change --config.evaluate.protocol")
    return network.network(lambda rngs: Inception(resize, rngs), {"name": NAME, "resize": resize})
