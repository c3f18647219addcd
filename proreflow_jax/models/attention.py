"""Attention of the SD family: multi-head attention, the transformer block, and its spatial wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from proreflow_jax.models import attention_kernels, layers, narrow_body, narrow_kernel
from proreflow_jax.models.layers import ATTENTION, PLAIN, Compute, rerun


def heads_attention(
    q: Float[Array, "b s c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    heads: int,
    mask: Bool[Array, "1 1 s t"] | None = None,
    form: str = "xla",
    *,
    bias: Float[np.ndarray, " t"] | None = None,
) -> Float[Array, "b s c"]:
    """Softmax attention of already projected tensors; scores in float32, width c / heads per head. A mask needs "xla"."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    out = (
        attention_kernels.whole_scores(q, k, v, form, bias)
        if mask is None
        else jax.nn.dot_product_attention(q, k, v, mask=mask)
    )
    return checkpoint_name(out.reshape(*q.shape[:2], -1), ATTENTION)


def narrow_heads(
    linear: nnx.Linear, x: Float[Array, "b s c"], heads: int
) -> tuple[Float[Array, "b h d s"], Float[Array, "h d 1"] | None]:
    """A linear layer's result without its bias, heads in front, tokens in lanes; and the bias in float32, if there is one."""
    w, bias = layers.weights_of(linear, x)
    column = None if bias is None else bias.astype(jnp.float32).reshape(heads, -1, 1)
    return jnp.einsum("bsc,chd->bhds", x, w.reshape(x.shape[-1], heads, -1)), column


def joined_narrow(linear: nnx.Linear, x: Float[Array, "b h d s"]) -> Float[Array, "b s c"]:
    """A linear layer over such heads, side by side."""
    w, bias = layers.weights_of(linear, x)
    return jnp.einsum("bhds,hdc->bsc", x, w.reshape(*x.shape[1:3], -1)) + bias


def padded_heads(linear: nnx.Linear, x: Float[Array, "b s c"], heads: int, scale: float = 1.0) -> Float[Array, "b h s l"]:
    """A linear layer's result times `scale`, as heads of full lanes: the weights get the zero columns."""
    w, bias = layers.weights_of(linear, x)
    w = pad_lanes(scale * w.reshape(x.shape[-1], heads, -1))  # scaling the result would be a pass over it
    out = jnp.einsum("bsc,chl->bhsl", x, w, preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + scale * pad_lanes(bias.reshape(heads, -1))[:, None]
    return out.astype(x.dtype)


def joined_heads(linear: nnx.Linear, x: Float[Array, "b h s l"], width: int) -> Float[Array, "b s c"]:
    """A linear layer over padded heads of true width `width`, side by side: its weights get zero rows."""
    w, bias = layers.weights_of(linear, x)
    w = jnp.pad(w.reshape(x.shape[1], width, -1), ((0, 0), (0, x.shape[-1] - width), (0, 0)))
    return jnp.einsum("bhsl,hlc->bsc", x, w) + bias


def pad_lanes(x: Array) -> Array:
    width = x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, attention_kernels.lanes(width) - width),))


class Attention(nnx.Module):
    """Self-attention, or cross-attention when `context` is given. The VAE's has biases and its own group norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
        context: int | None = None,
        groups: int = 0,
        epsilon: float = 1e-6,
        compute: Compute = PLAIN,
    ) -> None:
        self.heads, self.compute = heads, compute
        bias = groups > 0
        if groups:
            self.group_norm = layers.group_norm(width, groups, epsilon, rngs)
        self.to_q = nnx.Linear(width, width, use_bias=bias, rngs=rngs)
        self.to_k = nnx.Linear(context or width, width, use_bias=bias, rngs=rngs)
        self.to_v = nnx.Linear(context or width, width, use_bias=bias, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "b s c"], context: Float[Array, "b t d"] | None = None) -> Float[Array, "b s c"]:
        h = self.group_norm(x) if hasattr(self, "group_norm") else x
        source = h if context is None else context
        b, s, c = h.shape
        width = c // self.heads
        form = attention_kernels.choose_attention(self.compute, s, source.shape[1], self.heads, width, b, h.dtype)
        if form == "narrow":
            return self._narrow(h, source)
        if form == "splash":
            q = padded_heads(self.to_q, h, self.heads, width**-0.5)
            k, v = (padded_heads(linear, source, self.heads) for linear in (self.to_k, self.to_v))
            return joined_heads(self.to_out[0], attention_kernels.splash(q, k, v, self.compute), width)
        return self.to_out[0](heads_attention(self.to_q(h), self.to_k(source), self.to_v(source), self.heads, form=form))

    def _narrow(self, x: Float[Array, "b s c"], source: Float[Array, "b t d"]) -> Float[Array, "b s c"]:
        """The attention of x's tokens to those of `source` by `narrow_kernel`."""
        queries = narrow_kernel.fill(x)
        keys = queries if source is x else narrow_kernel.fill_keys(source)
        made = [narrow_heads(self.to_q, queries, self.heads)]
        made += [narrow_heads(linear, keys, self.heads) for linear in (self.to_k, self.to_v)]
        q, k, v = ((heads,) for heads, _ in made)
        biases = narrow_kernel.Layers(tuple(bias for _, bias in made if bias is not None))
        (out,) = attention_kernels.narrow(q, k, v, biases, (narrow_body.Part(source.shape[1]),), self.compute)
        return joined_narrow(self.to_out[0], out[..., : x.shape[1]])


class GEGLU(nnx.Module):
    """x -> a * gelu(b), where (a, b) are the halves of one projection.

    Its weights are halved, not its result: the product fuses into the layer behind, and no gradient is padded. On a CPU halves
    are copies, so of large weights and few tokens the result is halved.
    """

    def __init__(self, width: int, inner: int, rngs: nnx.Rngs, compute: Compute = PLAIN) -> None:
        self.proj = nnx.Linear(width, 2 * inner, rngs=rngs)
        self.on_cpu = compute.platform == "cpu"

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s i"]:
        kernel, bias = layers.weights_of(self.proj, x)
        if self.on_cpu and kernel.size >= layers.LARGE and x.size < 2 * x.shape[-1] ** 2:
            a, b = jnp.split(x @ kernel + bias, 2, axis=-1)
            return a * layers.gelu(b)
        a, b = (x @ w + c for w, c in zip(jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2), strict=True))
        return a * layers.gelu(b)


class FeedForward(nnx.Module):
    """GEGLU and a projection back; torch's list has a dropout between, hence the index 2."""

    def __init__(self, width: int, rngs: nnx.Rngs, compute: Compute = PLAIN) -> None:
        self.net = nnx.List([GEGLU(width, 4 * width, rngs, compute), nnx.Module(), nnx.Linear(4 * width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a layer norm and a skip."""

    def __init__(self, width: int, heads: int, context: int, rngs: nnx.Rngs, compute: Compute = PLAIN) -> None:
        norm = lambda: nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(width, heads, rngs, compute=compute)
        self.attn2 = Attention(width, heads, rngs, context=context, compute=compute)
        self.ff = FeedForward(width, rngs, compute)

    def __call__(self, x: Float[Array, "b s c"], context: Float[Array, "b t d"]) -> Float[Array, "b s c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections (1x1 convs in SD 1.5, linear later)."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        context: int,
        groups: int,
        linear: bool,
        rngs: nnx.Rngs,
        compute: Compute = PLAIN,
    ) -> None:
        project = lambda: nnx.Linear(width, width, rngs=rngs) if linear else layers.conv(width, width, 1, rngs)
        self.norm = layers.group_norm(width, groups, 1e-6, rngs)
        self.proj_in, self.proj_out = project(), project()
        self.remat, self.repeat = compute.remat, compute.repeat
        self.transformer_blocks = nnx.List([TransformerBlock(width, heads, context, rngs, compute) for _ in range(depth)])

    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b t d"]) -> Float[Array, "b h w c"]:
        h = self.proj_in(self.norm(x))  # a 1x1 convolution and a linear layer over channels are the same map
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        one = lambda block, h: rerun(self.remat, TransformerBlock.__call__, block, h, context)
        h = self.repeat(self.transformer_blocks, one, h)
        return x + self.proj_out(h.reshape(x.shape))
