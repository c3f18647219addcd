"""How networks are computed, and blocks that they share. Attribute names are the checkpoint's names; layout is NHWC.

Statistics of every norm are taken in float32 (nnx's norms do that), the tensors stay in the dtype they came in.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

ATTENTION = "attention"  # name of attention's outputs, for policies that keep them
LARGE = 1 << 21  # numbers of a weight from which CPUs compute some things another way
MOST_PRODUCTS = 1 << 26  # of pixels with a doubling's weights, which lie in memory at once there: 256 MiB
SAVED = jax.checkpoint_policies


def in_turn(blocks: Sequence[Any], call: Callable[[Any, PyTree], PyTree], h: PyTree) -> PyTree:
    """call(block, h) for one block after the other."""
    for block in blocks:
        h = call(block, h)
    return h


class Compute(NamedTuple):
    """A network's machine: static values from the config and the mesh."""

    attention: str = "xla"  # one of FORMS; "auto": by platform and shape, see `choose_attention`
    remat: str = "none"  # one of POLICIES: arrays that the backward pass recomputes
    platform: str = "cpu"  # of the devices that will run it: "cpu", "gpu", "tpu"
    mesh: Mesh | None = None  # axes data, fsdp (rows) and tensor (heads); None: one device
    repeat: Callable[..., Any] = in_turn  # how a row of equal blocks is run


PLAIN = Compute()


def _products(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Convolutions and products with weights are kept; scores are not, as their products have batch axes."""
    keeps_products = SAVED.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or keeps_products(primitive, *arguments, **parameters)


POLICIES: dict[str, Any] = {  # kept by the forward pass of each ResNet and transformer block, beside its inputs
    "none": None,  # all that the backward pass reads
    "products": SAVED.save_from_both_policies(_products, SAVED.save_only_these_names(ATTENTION)),
    "attention": SAVED.save_only_these_names(ATTENTION),
    "inputs": SAVED.nothing_saveable,
}


def rerun(remat: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs). The backward pass recomputes what POLICIES[remat] does not keep. Without one it costs nothing."""
    if remat == "none":
        return function(*inputs)
    return jax.checkpoint(function, policy=POLICIES[remat])(*inputs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(weight: Float[Array, "..."], mesh: Mesh) -> Float[Array, "..."]:
    """A weight whole on every device, where it is used; its gradient is whole too before it goes to wherever the state lies.

    Without it XLA multiplies by the pieces of a sharded weight in turn, which costs a transformer block 3.7 times the cycles;
    and works out its gradient in as many pieces as there are devices, narrower than the matrix unit: 1.7 to 1.8 times.
    """
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))


gather.defvjp(lambda weight, mesh: (gather(weight, mesh), None), lambda mesh, _, gradient: (gather(gradient, mesh),))


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride: int = 1, padding: int | str = -1) -> nnx.Conv:
    """A 2-D convolution with torch's symmetric padding, by default half the kernel."""
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


def weights_of(
    layer: nnx.Linear | nnx.Conv, x: Float[Array, "..."]
) -> tuple[Float[Array, "*size i o"], Float[Array, " o"] | None]:
    """(kernel, bias) as the layer itself would use them on x: in its dtype, gathered."""
    bias = None if layer.bias is None else layer.bias[...]
    _, kernel, bias = layer.promote_dtype((x, layer.kernel[...], bias), dtype=layer.dtype)
    return kernel, bias


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / 2 (1 + erf(x / sqrt 2)), as torch has it; jax.nn.gelu takes erfc, which is twice the work on a TPU."""
    half = 1 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5))
    return (0.5 * x * half).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """torch's approximate gelu, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def layer_norm(x: Float[Array, "b s c"], epsilon: float = 1e-6) -> Float[Array, "b s c"]:
    """Layer normalisation without weights, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def sinusoid(timesteps: Float[Array, "*b"], width: int, flip: bool, shift: float) -> Float[Array, "*b w"]:
    """Sinusoidal features of (fractional) timesteps, cosines first when `flip` (diffusers' flip_sin_to_cos)."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angle = timesteps.astype(jnp.float32)[..., None] * frequency
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, axis=-1)


class Constant(nnx.Variable):
    """An array of the checkpoint that no training changes: torch's buffer."""


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
    """Nearest-neighbour doubling, cropped to `shape` (height, width) where the skip is odd, then a 3x3 convolution.

    Doubling is computed at the small size. A 3x3 kernel over doubled pixels sees 2x2 different ones, by the parity of row and
    column, so four kernels of summed weights do 4/9 of the work. Summing large weights takes a CPU longer than that saves; it
    sums the pixels' products with each of the nine weights, 1/4 of the work (elsewhere the sums' bytes would cost as much). A
    VAE, whose pictures have many pixels for its weights, has no `compute` here.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs, compute: Compute | None = None) -> None:
        self.conv = conv(channels, channels, 3, rngs)
        on_cpu = compute is not None and compute.platform == "cpu"
        self.large_on_cpu = on_cpu and math.prod(self.conv.kernel_shape) >= LARGE

    def __call__(self, x: Float[Array, "b h w c"], shape: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        if shape in (None, (2 * h, 2 * w)):
            few = self.large_on_cpu and 9 * x.size <= MOST_PRODUCTS
            return self._by_products(x) if few else self._by_kernels(x)
        wide = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        height, width = shape
        return self.conv(wide[:, :height, :width])  # torch's nearest pixels at odd sizes are the doubled ones, cropped

    def _by_products(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        kernel, bias = weights_of(self.conv, x)
        pixels = jnp.broadcast_to(x.reshape(1, -1, c), (9, b * h * w, c))
        products = jnp.matmul(pixels, kernel.reshape(9, c, -1), preferred_element_type=jnp.float32)
        rows = summed_parities(products.reshape(3, 3, b, h, w, -1))
        return interleaved([[one.astype(x.dtype) + bias for one in summed_parities(row)] for row in rows])

    def _by_kernels(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        kernel, bias = weights_of(self.conv, x)
        kernels = parity_kernels(kernel, x.dtype)
        convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        one = lambda i, j: convolve(x, kernels[i][j], padding=((1 - i, i), (1 - j, j))) + bias
        return interleaved([[one(i, 0), one(i, 1)] for i in range(2)])


def interleaved(parts: list[list[Float[Array, "b h w c"]]]) -> Float[Array, "b h2 w2 c"]:
    """[row's parity][column's parity] -> the picture of twice the height and width."""
    b, h, w, _ = parts[0][0].shape
    return jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2).reshape(b, 2 * h, 2 * w, -1)


def summed_parities(products: Float[Array, "3 ..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Products with a kernel's three weights along the third axis -> its sums over doubled pixels: even places, odd ones."""
    before, here, after = products
    sides = lambda first, last: [(first, last) if axis == 2 else (0, 0) for axis in range(before.ndim)]
    even = jnp.pad(before[:, :, :-1], sides(1, 0)) + (here + after)
    return even, (before + here) + jnp.pad(after[:, :, 1:], sides(0, 1))


def parity_kernels(kernel: Float[Array, "3 3 i o"], dtype: Any) -> list[list[Float[Array, "2 2 i o"]]]:
    """[row's parity][column's parity]: the kernels over pixels that make up a 3x3 kernel over doubled pixels."""
    rows = _parities(kernel.astype(jnp.float32), 0)
    return [[part.astype(dtype) for part in _parities(row, 1)] for row in rows]


def _parities(kernel: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A kernel of 3 along `axis` over doubled pixels -> the two of 2 over the pixels: for even places, for odd ones."""
    before, here, after = jnp.split(kernel, 3, axis)
    return jnp.concatenate([before, here + after], axis), jnp.concatenate([before + here, after], axis)
