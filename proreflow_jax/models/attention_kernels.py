"""How networks are computed on a machine: the forms of softmax attention, which one is taken, what is recomputed.

All forms compute the same attention. `Compute` is bound when a network is built (`network.make_unet(config, compute)`), so
each block knows its form without globals, and two networks of one process may differ. It holds the mesh because a splash
kernel is opaque to the partitioner: `jax.shard_map` gives each device its own rows and heads.

Forms, on heads (b, s, h, d): "xla" whole scores in float32; "chunked" exact softmax over blocks of queries, one block's
scores alive at a time, forward and backward; "cached" the same one head at a time, in blocks whose scores stay in a CPU's
cache; "cudnn" NVIDIA's fused kernel; "narrow" our own TPU kernel, heads up to 128 wide at their true width, a whole sequence in
VMEM (`narrow_kernel`); "splash" Pallas' fused TPU kernel, whose heads come padded to full lanes from the projections themselves
(`attention.padded_heads`).

A bias belongs to a key and is the same for every query. cuDNN's kernel, whose biases are whole scores, takes it in numbers
more of each head: queries hold ones there, keys the bias (`marked`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from proreflow_jax.models import narrow_kernel
from proreflow_jax.models.layers import ATTENTION, Compute
from proreflow_jax.models.narrow_body import LANES, block

FORMS = ("auto", "xla", "chunked", "cached", "cudnn", "narrow", "splash")
FUSED = {"tpu": ("narrow", "splash"), "gpu": ("cudnn",), "cpu": ("cached",)}  # kernels of a platform; "auto" takes the first
FUSED_TOKENS = 1024  # self-attention from here on goes to them; below, scores are small
WIDEST = 256  # largest padded head width: its blocks fit a TPU's VMEM
BLOCK = 1024  # queries and keys that splash holds at once; 2,048 exceeds v5e's VMEM
CUDNN_STEP = 8  # head widths come in multiples of it
CUDNN_WIDEST = 128  # head width that cuDNN's kernels take on every card that has them
SMALL_SCORES = 256 << 20  # bytes of one device's scores; "auto" makes larger ones in blocks
CHUNK_SCORES = 64 << 20  # bytes of scores that one block of queries may take
MARKS = 3  # lanes of one bias: 3 x 8 bits of bfloat16 make up a float32
CACHED_ROWS = 256  # queries of all images in one block
CACHED_LEAST, CACHED_MOST = 32, 128  # queries of one image there
CACHED_BLOCKS = 4  # blocks that a CPU's cores compute side by side: one's sums while another's product is under way


def choose_attention(
    compute: Compute, tokens: int, keys: int, heads: int, width: int, batch: int, dtype: Any, *, splash: bool = True
) -> str:
    """The form of one attention of `tokens` queries, with `width` numbers a head and `batch` rows over all devices.

    "auto": the platform's own form from FUSED_TOKENS where it takes that width, length and dtype, of cross-attention "narrow"
    alone; else whole scores; blocks where those of self-attention exceed SMALL_SCORES on a device. A kernel named in the config
    is taken in auto's place; "xla", "chunked" and "cached" are taken everywhere. `splash`: whether that form is there.
    """
    form = compute.attention
    if form in ("xla", "chunked", "cached"):
        return form
    if tokens < FUSED_TOKENS:
        return "xla"
    alone = tokens == keys
    fits = {
        "cached": alone,
        "narrow": narrow_kernel.fits(width, max(tokens, keys), dtype),
        "splash": alone and splash and lanes(width) <= WIDEST and block(tokens, BLOCK) >= BLOCK // 4,
        "cudnn": alone and width % CUDNN_STEP == 0 and width <= CUDNN_WIDEST and jnp.dtype(dtype).itemsize == 2,
    }
    kernels = FUSED.get(compute.platform, ()) if form == "auto" else (form,)
    taken = next((kernel for kernel in kernels if fits[kernel]), "")
    if taken or not alone:
        return taken or "xla"
    ways = compute.mesh.shape["data"] * compute.mesh.shape["fsdp"] if compute.mesh else 1
    return "chunked" if 4 * batch * heads * tokens * keys > SMALL_SCORES * ways else "xla"


def lanes(width: int) -> int:
    """A head's width in full lanes: 40, 64, 80 -> 128; 160 -> 256."""
    return -(-width // LANES) * LANES


def marked(
    q: Float[Array, "*s l"], k: Float[Array, "*t l"], bias: Float[np.ndarray, "..."], first: int
) -> tuple[Float[Array, "*s l"], Float[Array, "*t l"]]:
    """(q, k) whose products are larger by each key's bias; lanes `first` to first + MARKS of both are zeros so far.

    The bias lies there in parts of q's dtype, whose sum is the float32. `bias`: as k without its last axis, or of fewer axes.
    """
    lane, parts, left = np.arange(q.shape[-1]), np.zeros((*bias.shape, q.shape[-1]), np.float32), bias.astype(np.float32)
    for i in range(MARKS):
        part = left.astype(q.dtype).astype(np.float32)
        parts[..., first + i], left = part, left - part
    ones = ((lane >= first) & (lane < first + MARKS)).astype(q.dtype)
    return q + ones, k + parts.astype(q.dtype)


def whole_scores(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    form: str,
    bias: Float[np.ndarray, " t"] | None = None,
) -> Float[Array, "b s h d"]:
    """Attention by "xla", "cudnn", "chunked" or "cached"; a key's bias is added to all its scores."""
    if form in ("chunked", "cached"):
        return (_chunked if form == "chunked" else _cached)(q, k, v, bias)
    kernel = "cudnn" if form == "cudnn" else None
    if bias is None:
        return jax.nn.dot_product_attention(q, k, v, implementation=kernel)
    if kernel is None:
        return jax.nn.dot_product_attention(q, k, v, bias=bias[None, None, None].astype(np.float32))
    width = q.shape[-1]  # cuDNN's biases are whole scores, and of even lengths
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, CUDNN_STEP),)) for x in (q, k, v))
    q, k = marked(q, k, bias[:, None] * width**0.5, width)
    return jax.nn.dot_product_attention(q, k, v, scale=width**-0.5, implementation=kernel)[..., :width]


def _chunked(q: Array, k: Array, v: Array, bias: np.ndarray | None) -> Array:
    """One block of queries after the other; the backward pass makes each block's scores again."""
    b, s, h, d = q.shape
    size = max(1, min(s, CHUNK_SCORES // (4 * b * h * k.shape[1])))
    count = -(-s // size)
    rows = jnp.pad(q, ((0, 0), (0, count * size - s), (0, 0), (0, 0))).reshape(b, count, size, h, d)
    bias = None if bias is None else bias[None, None, None].astype(np.float32)
    one = jax.checkpoint(lambda part: jax.nn.dot_product_attention(part, k, v, bias=bias))
    out = jax.lax.map(one, jnp.moveaxis(rows, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * size, h, d)[:, :s]


def _cached(q: Array, k: Array, v: Array, bias: np.ndarray | None) -> Array:
    """One head after the other, each in blocks of queries of all images; the quotient of softmax is taken behind the product.

    Whole scores go through memory once for every pass over them: four times the time on a CPU, where no kernel fuses them.
    """
    b, s, h, d = q.shape
    size = min(s, CACHED_MOST, max(CACHED_ROWS // b, CACHED_LEAST))
    blocks = min(CACHED_BLOCKS, -(-s // size))
    count = -(-s // (size * blocks))
    rows = jnp.pad(d**-0.5 * q, ((0, 0), (0, count * blocks * size - s), (0, 0), (0, 0)))
    rows = jnp.transpose(rows.reshape(b, count, blocks, size, h, d), (4, 1, 2, 0, 3, 5))
    keys, values = jnp.transpose(k, (2, 0, 3, 1)), jnp.transpose(v, (2, 0, 1, 3))

    @jax.checkpoint
    def block(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias.astype(np.float32)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        return jax.lax.map(lambda parts: jnp.stack([block(part, k, v) for part in parts]), q)

    out = jax.lax.map(head, (rows, keys, values))
    return jnp.transpose(out, (3, 1, 2, 4, 0, 5)).reshape(b, count * blocks * size, h, d)[:, :s]


def splash(
    q: Float[Array, "b h s l"], k: Float[Array, "b h s l"], v: Float[Array, "b h s l"], compute: Compute
) -> Float[Array, "b h s l"]:
    """Pallas' TPU kernel on queries that are scaled already, each device on its own rows and heads; interpreted off TPU."""
    heads, interpret = q.shape[1], compute.platform != "tpu"
    return _on_each(compute, q, lambda ways: _kernel(heads // ways, q, interpret))(q, k, v)


def narrow(
    q: narrow_kernel.Parts,
    k: narrow_kernel.Parts,
    v: narrow_kernel.Parts,
    layers: narrow_kernel.Layers,
    parts: tuple[narrow_kernel.Part, ...],
    compute: Compute,
) -> narrow_kernel.Parts:
    """`narrow_kernel.attend`, each device on its own rows and heads; interpreted off TPU."""
    setting = narrow_kernel.Setting(parts, compute.platform != "tpu")
    attend = lambda *arrays: narrow_kernel.attend(*arrays, setting)
    return _on_each(compute, q[0], lambda _: attend, layers)(q, k, v)


def _on_each(compute: Compute, like: Array, make: Callable[[int], Callable[..., Any]], *columns: Any) -> Callable[..., Any]:
    """make(devices of the heads) as a function of arrays (b, h, ..), of which each device has its rows and heads.

    columns: further arguments, (h, ..), of which each device has its heads.
    """
    mesh = compute.mesh
    if mesh is None or mesh.size == 1:
        return lambda *split: make(1)(*split, *columns)
    rows = ("data", "fsdp") if like.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    ways = mesh.shape["tensor"] if like.shape[1] % mesh.shape["tensor"] == 0 else 1
    heads = "tensor" if ways > 1 else None
    spec, column = PartitionSpec(rows, heads), PartitionSpec(heads)
    specs = lambda split: (*(spec for _ in split), *(column for _ in columns))
    run = lambda *split: jax.shard_map(make(ways), mesh=mesh, in_specs=specs(split), out_specs=spec, check_vma=False)
    return lambda *split: run(*split)(*split, *columns)


def _kernel(heads: int, like: Array, interpret: bool) -> Callable[[Array, Array, Array], Array]:
    """(b, h, s, l) x 3 -> (b, h, s, l), every token seeing all; `heads` and rows of one device.

    Small blocks have one kernel for all three gradients, 5 products in place of 7: each of its blocks of keys leaves a part of
    the queries' gradient to be summed, so they are as long as a v5e's VMEM lets them be. Larger ones do not fit it.
    """
    tokens, width = like.shape[-2:]
    n = block(tokens, BLOCK)
    if width * like.dtype.itemsize <= LANES * 2:
        queries, keys = (block(tokens, n // 2), 2 * n) if tokens % (2 * n) == 0 else (n, n)
        backward = dict(block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=n, use_fused_bwd_kernel=True)
    else:
        backward = dict(block_q_dkv=n, block_kv_dkv=n, block_kv_dkv_compute=n, block_q_dq=n, block_kv_dq=n)
    kernel = pallas.make_splash_mha_single_device(
        pallas.splash_attention_mask.MultiHeadMask([pallas.splash_attention_mask.FullMask((tokens, tokens))] * heads),
        block_sizes=pallas.BlockSizes(block_q=n, block_kv=n, **backward),
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    return jax.vmap(kernel)
