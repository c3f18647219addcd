"""Attention of the SD family: multi-head attention, the transformer block, and its spatial wrapper."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from proreflow_jax.models import layers


def heads_attention(
    q: Float[Array, "b s c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    heads: int,
    mask: Bool[Array, "1 1 s t"] | None = None,
) -> Float[Array, "b s c"]:
    """Softmax attention of already projected tensors; scores in float32, width c / heads per head."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    out = jax.nn.dot_product_attention(split(q), split(k), split(v), mask=mask)
    return out.reshape(q.shape)


class Attention(nnx.Module):
    """Self-attention, or cross-attention when `context` is given. The VAE's has biases and its own group norm."""

    def __init__(
        self, width: int, heads: int, rngs: nnx.Rngs, context: int | None = None, groups: int = 0, epsilon: float = 1e-6
    ) -> None:
        self.heads = heads
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
        h = heads_attention(self.to_q(h), self.to_k(source), self.to_v(source), self.heads)
        return self.to_out[0](h)


class GEGLU(nnx.Module):
    """x -> a * gelu(b), where (a, b) are the halves of one projection."""

    def __init__(self, width: int, inner: int, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s i"]:
        a, b = jax.numpy.split(self.proj(x), 2, axis=-1)
        return a * jax.nn.gelu(b, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU and a projection back; torch's list has a dropout between, hence the index 2."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.net = nnx.List([GEGLU(width, 4 * width, rngs), nnx.Module(), nnx.Linear(4 * width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a layer norm and a skip."""

    def __init__(self, width: int, heads: int, context: int, rngs: nnx.Rngs) -> None:
        norm = lambda: nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(width, heads, rngs)
        self.attn2 = Attention(width, heads, rngs, context=context)
        self.ff = FeedForward(width, rngs)

    def __call__(self, x: Float[Array, "b s c"], context: Float[Array, "b t d"]) -> Float[Array, "b s c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections (1x1 convs in SD 1.5, linear later)."""

    def __init__(self, width: int, heads: int, depth: int, context: int, groups: int, linear: bool, rngs: nnx.Rngs) -> None:
        project = lambda: nnx.Linear(width, width, rngs=rngs) if linear else layers.conv(width, width, 1, rngs)
        self.norm = layers.group_norm(width, groups, 1e-6, rngs)
        self.proj_in, self.proj_out = project(), project()
        self.transformer_blocks = nnx.List([TransformerBlock(width, heads, context, rngs) for _ in range(depth)])

    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b t d"]) -> Float[Array, "b h w c"]:
        h = self.proj_in(self.norm(x))  # a 1x1 convolution and a linear layer over channels are the same map
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.reshape(x.shape))
