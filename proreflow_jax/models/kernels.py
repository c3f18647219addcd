"""How networks are computed on a machine: the forms of softmax attention, which one is taken, what is recomputed.

None of it changes what is computed. `Compute` is bound when a network is built (`network.make_unet(config, compute)`), so
each block knows its form without globals, and two networks in one process may differ. It holds the mesh because a splash
kernel is opaque to the partitioner: `jax.shard_map` gives each device its own rows and heads.

Forms, on heads (b, s, h, d): "xla" whole scores in float32; "chunked" exact softmax over blocks of queries, one block of scores
alive at a time, forward and backward; "cudnn" NVIDIA's fused kernel; "splash" Pallas' fused TPU kernel, whose heads come
padded to full lanes from the projections themselves (`attention.Attention`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash_kernels
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

FORMS = ("auto", "xla", "chunked", "cudnn", "splash")
ATTENTION = "attention"  # name of attention's outputs, for the policies of recomputation
SAVED = jax.checkpoint_policies
FUSED_TOKENS = 1024  # self-attention from here on goes to a fused kernel; below, scores are small
LANES = 128  # of a TPU's registers: the last axis of a kernel's operands comes in multiples of it
WIDEST = 256  # padded head width of which a splash kernel's blocks fit into VMEM
BLOCK = 1024  # queries and keys a splash kernel holds at once; 2,048 exceeds v5e's VMEM
SMALL_SCORES = 256 << 20  # bytes of one device's scores up to which they are made whole
CHUNK_SCORES = 64 << 20  # bytes of scores that one block of queries may take


class Compute(NamedTuple):
    """What a network is told of the machine it runs on; statics, from the config and the mesh."""

    attention: str = "xla"  # one of FORMS; "auto": by platform and shape, see `choose`
    remat: str = "none"  # one of POLICIES: what the backward pass recomputes
    platform: str = "cpu"  # of the devices that will run it: "cpu", "gpu", "tpu"
    mesh: Mesh | None = None  # axes data, fsdp (rows) and tensor (heads); None: one device


def _keep_products(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Saves convolutions and products with weights, not scores (whose products have batch axes)."""
    if primitive.name == "conv_general_dilated":
        return True
    return SAVED.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


POLICIES: dict[str, Any] = {  # what the forward pass keeps of each ResNet and transformer block beside its inputs
    "none": None,  # nothing is recomputed
    "products": SAVED.save_from_both_policies(_keep_products, SAVED.save_only_these_names(ATTENTION)),
    "attention": SAVED.save_only_these_names(ATTENTION),
    "inputs": SAVED.nothing_saveable,
}


def rerun(remat: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs); its backward pass computes again what POLICIES[remat] does not keep. Costs nothing forward."""
    if remat == "none":
        return function(*inputs)
    return jax.checkpoint(function, policy=POLICIES[remat])(*inputs)


def choose(
    compute: Compute, tokens: int, keys: int, heads: int, width: int, batch: int = 1, dtype: Any = jnp.float32
) -> str:
    """The form of one attention: tokens (s), keys (t), heads, width per head, rows of the whole batch.

    "auto": a fused kernel for self-attention from FUSED_TOKENS where platform, width and dtype have one; else whole scores up to
    SMALL_SCORES a device, and above them blocks. A form named in the config is taken for all such self-attentions that it can
    compute, cross-attention and small ones stay "xla" ("chunked" takes them all).
    """
    kind, large = compute.attention, tokens == keys >= FUSED_TOKENS
    fits = {"splash": _splash_fits(tokens, width), "cudnn": _cudnn_fits(width, dtype)}
    fused = {"tpu": "splash", "gpu": "cudnn"}.get(compute.platform, "") if kind == "auto" else kind
    if fused in fits and large and fits[fused]:
        return fused
    if kind in ("xla", "chunked"):
        return kind
    scores = 4 * batch * heads * tokens * keys // _ways(compute.mesh)
    return "chunked" if scores > SMALL_SCORES else "xla"


def _splash_fits(tokens: int, width: int) -> bool:
    return lanes(width) <= WIDEST and block(tokens) >= BLOCK // 4


def _cudnn_fits(width: int, dtype: Any) -> bool:
    return width % 8 == 0 and width <= 128 and jnp.dtype(dtype).itemsize == 2


def _ways(mesh: Mesh | None) -> int:
    return mesh.size if mesh is not None else 1


def lanes(width: int) -> int:
    """A head's width in full lanes: 40, 64, 80 -> 128; 160 -> 256."""
    return -(-width // LANES) * LANES


def block(tokens: int) -> int:
    """The largest block of whole lanes up to BLOCK that divides the tokens; 0: none."""
    return max((size for size in range(LANES, BLOCK + 1, LANES) if tokens % size == 0), default=0)


def plain(q: Float[Array, "b s h d"], k: Float[Array, "b t h d"], v: Float[Array, "b t h d"], form: str) -> Array:
    """"xla", "cudnn" or "chunked" attention of heads: (b, s, h, d)."""
    if form == "chunked":
        return _chunked(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if form == "cudnn" else None)


def _chunked(q: Float[Array, "b s h d"], k: Float[Array, "b t h d"], v: Float[Array, "b t h d"]) -> Float[Array, "b s h d"]:
    """Exact attention, one block of queries at a time; the backward pass makes each block's scores again."""
    b, s, h, d = q.shape
    size = max(1, min(s, CHUNK_SCORES // (4 * b * h * k.shape[1])))
    count = -(-s // size)
    rows = jnp.pad(q, ((0, 0), (0, count * size - s), (0, 0), (0, 0))).reshape(b, count, size, h, d)
    one = jax.checkpoint(lambda part: jax.nn.dot_product_attention(part, k, v))
    out = jax.lax.map(one, jnp.moveaxis(rows, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * size, h, d)[:, :s]


def splash(
    q: Float[Array, "b h s l"], k: Float[Array, "b h s l"], v: Float[Array, "b h s l"], compute: Compute
) -> Float[Array, "b h s l"]:
    """Pallas' TPU kernel on scaled queries, each device on its own rows and heads; interpreted off TPU, for tests."""
    b, heads, tokens, _ = q.shape
    mesh = compute.mesh
    if mesh is None or mesh.size == 1:
        return _splash_kernel(heads, tokens, compute.platform != "tpu")(q, k, v)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ("data", "fsdp") if b % ways == 0 else None
    across = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, across)
    local = heads // (mesh.shape["tensor"] if across else 1)
    kernel = _splash_kernel(local, tokens, compute.platform != "tpu")
    return jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _splash_kernel(heads: int, tokens: int, interpret: bool) -> Callable[..., Array]:
    """(b, h, s, l) x 3 -> (b, h, s, l): all tokens see all, without a mask."""
    size = block(tokens)
    sizes = splash_kernels.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size,
        block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
    mask = splash_kernels.splash_attention_mask.MultiHeadMask([splash_kernels.splash_attention_mask.FullMask((tokens, tokens))] * heads)
    made = splash_kernels.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION, interpret=interpret
    )
    return jax.vmap(made)
