"""A decoder's levels over strips of its pictures, which fill a TPU's registers where few pictures lie on a chip.

A register has eight rows, and XLA's convolutions put eight pictures there. Of fewer pictures XLA makes strips for each
convolution, and copies the pictures before and behind it. Here a picture is cut once, into eight strips, and decoded alone: an
eighth of the memory of eight, which one of 1,024 x 1,024 pixels needs on a chip of 16 GB.

The strips stay one picture. The rows at a strip's ends are computed from the neighbours' rows, by the same products as all
others, and a norm's statistics are the whole picture's. So there are no seams: the result is the whole picture's, up to the
order in which sums are taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from proreflow_jax.models.layers import Compute, ResnetBlock, Upsample, parity_kernels, weights_of

SUBLANES = 8  # rows of a TPU's register
LEAST_ROWS = 16  # of a strip; two of them are computed twice
LARGEST = 1 << 30  # bytes of a chip's largest array: eight pictures of 512 x 512 pixels in bfloat16 with 256 channels
Sums = tuple[Float[Array, "n c"], Float[Array, "n c"]]  # of x and of its square, over a strip's pixels


class Strips(NamedTuple):
    """Pictures in `count` strips each, side by side in n = pictures x count."""

    x: Float[Array, "h w n c"]
    sums: Sums
    count: int


def choose_rows(compute: Compute, pictures: int, height: int, one: int) -> tuple[int, int]:
    """(pictures that a chip decodes at once, strips of each). The first divides `pictures`.

    On a TPU eight whole pictures, or one in eight strips; small pictures are not cut. Else as many as keep the largest array
    within LARGEST, one at least.

    Args:
      pictures: on a chip.
      height: pixels of a picture.
      one: bytes of the largest array that one picture makes.
    """
    fits = [n for n in range(1, pictures + 1) if pictures % n == 0 and n * one <= max(LARGEST, one)]
    if compute.platform != "tpu" or height < SUBLANES * LEAST_ROWS:
        return max(fits), 1
    return (SUBLANES, 1) if SUBLANES in fits else (1, SUBLANES)


def ways(compute: Compute, batch: int) -> int:
    """Devices that a batch is split over: those of data and fsdp if they divide it, else 1."""
    count = compute.mesh.shape["data"] * compute.mesh.shape["fsdp"] if compute.mesh else 1
    return count if batch % count == 0 else 1


def in_rows(one: Callable[[Array], Array], z: Float[Array, "b ..."], rows: int, compute: Compute) -> Float[Array, "b ..."]:
    """one(z), `rows` of each device at a time, one group after the other."""
    devices = ways(compute, len(z))
    groups = len(z) // (devices * rows)
    if groups == 1:
        return one(z)
    parts = z.reshape(devices, groups, rows, *z.shape[1:]).swapaxes(0, 1).reshape(groups, devices * rows, *z.shape[1:])
    if devices > 1:  # each device's own rows
        place = NamedSharding(compute.mesh, PartitionSpec(None, ("data", "fsdp")))
        parts = jax.lax.with_sharding_constraint(parts, place)
    out = jax.lax.map(one, parts)
    return out.reshape(groups, devices, rows, *out.shape[2:]).swapaxes(0, 1).reshape(len(z), *out.shape[2:])


def cut(x: Float[Array, "b h w c"], count: int) -> Strips:
    """Pictures -> strips of h / count rows."""
    b, h, w, c = x.shape
    x = x.reshape(b, count, h // count, w, c).transpose(2, 3, 0, 1, 4).reshape(h // count, w, b * count, c)
    return Strips(x, _sums(x), count)


def join(strips: Strips) -> Float[Array, "b h w c"]:
    """Strips -> pictures."""
    h, w, n, c = strips.x.shape
    x = strips.x.reshape(h, w, n // strips.count, strips.count, c).transpose(2, 3, 0, 1, 4)
    return x.reshape(n // strips.count, strips.count * h, w, c)


def resnet(block: ResnetBlock, strips: Strips) -> Strips:
    """`block` of the pictures; of the VAE's blocks, which know no time."""
    x = strips.x
    if hasattr(block, "conv_shortcut"):
        kernel, bias = weights_of(block.conv_shortcut, x)
        x = x @ kernel[0, 0] + bias
    return convolve(block.conv2, block.norm2, convolve(block.conv1, block.norm1, strips), x)


def convolve(layer: nnx.Conv, norm: nnx.GroupNorm, strips: Strips, skip: Float[Array, "h w n c"] | None = None) -> Strips:
    """A 3x3 convolution of SiLU(norm(x)), and the skip added to it."""
    enter = _normed(norm, strips)
    kernel, bias = weights_of(layer, strips.x)
    ends = enter(jax.lax.optimization_barrier(jnp.concatenate([strips.x[:2], strips.x[-2:]])))
    above, below = _neighbours(ends[:1], ends[-1:], strips.count)
    out = _convolution(enter(strips.x), kernel, (1, 1)) + bias
    top = _convolution(jnp.concatenate([above, ends[:2]]), kernel, (0, 0)) + bias
    low = _convolution(jnp.concatenate([ends[-2:], below]), kernel, (0, 0)) + bias
    if skip is not None:
        out, top, low = out + skip, top + skip[:1], low + skip[-1:]
    sums = jax.tree.map(
        lambda all_, *rows: all_ - rows[0] - rows[1] + rows[2] + rows[3], *map(_sums, (out, out[:1], out[-1:], top, low))
    )
    return Strips(out.at[:1].set(top).at[-1:].set(low), sums, strips.count)


def upsample(module: Upsample, strips: Strips) -> Strips:
    """`module` of the pictures: doubled, then a 3x3 convolution."""
    x, count = strips.x, strips.count
    h, w, n, _ = x.shape
    kernel, bias = weights_of(module.conv, x)
    above, below = _neighbours(x[:1], x[-1:], count)
    ends = jnp.concatenate([above, x[:1]]), jnp.concatenate([x[-1:], below])

    def one(i: int, j: int, kernel: Array) -> Array:
        columns = (1 - j, j)
        out = _convolution(x, kernel, (1 - i, i), columns) + bias
        end = _convolution(ends[i], kernel, (0, 0), columns) + bias
        return out.at[-1:].set(end) if i else out.at[:1].set(end)

    kernels = parity_kernels(kernel, x.dtype)
    rows = [jnp.stack([one(i, j, kernels[i][j]) for j in range(2)], axis=2) for i in range(2)]  # (h, w, 2, n, c) each
    doubled = jnp.stack(rows, axis=1).reshape(2 * h, 2 * w, n, -1)
    return Strips(doubled, _sums(doubled), count)


def _normed(norm: nnx.GroupNorm, strips: Strips) -> Callable[[Array], Array]:
    """SiLU(norm(x)) as a function of some rows x; statistics are those of whole pictures."""
    (h, w, n, c), groups = strips.x.shape, norm.num_groups
    total = h * w * strips.count * (c // groups)
    mean, square = (v.reshape(n // strips.count, strips.count, groups, -1).sum(axis=(1, 3)) / total for v in strips.sums)
    spread = lambda v: jnp.repeat(jnp.repeat(v, c // groups, axis=1), strips.count, axis=0)  # (b, groups) -> (n, c)
    scale = spread(jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + norm.epsilon)) * norm.scale[...].astype(jnp.float32)
    shift = norm.bias[...].astype(jnp.float32) - spread(mean) * scale
    return lambda x: jax.nn.silu((x.astype(jnp.float32) * scale + shift).astype(x.dtype))


def _sums(x: Float[Array, "h w n c"]) -> Sums:
    x = x.astype(jnp.float32)
    return x.sum(axis=(0, 1)), (x * x).sum(axis=(0, 1))


def _neighbours(first: Array, last: Array, count: int) -> tuple[Float[Array, "1 w n c"], Float[Array, "1 w n c"]]:
    """The rows above and below each strip, from the strips' first and last rows; zeros beyond the picture."""
    _, w, n, c = first.shape
    apart = lambda row: row.reshape(1, w, n // count, count, c)
    moved = lambda row, before, after: jnp.pad(row, ((0, 0),) * 3 + ((before, after), (0, 0))).reshape(1, w, n, c)
    return moved(apart(last)[:, :, :, :-1], 1, 0), moved(apart(first)[:, :, :, 1:], 0, 1)


def _convolution(x: Array, kernel: Array, rows: tuple[int, int], columns: tuple[int, int] = (1, 1)) -> Any:
    words = ("HWNC", "HWIO", "HWNC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), (rows, columns), dimension_numbers=words)
