"""Attention of the MMDiT: image patches and text tokens, each projected by weights of its own, see each other and themselves.

A sequence of both, the image first, has no length that a kernel's blocks divide. It is filled up where the kernel is splash;
nobody sees the filler (`attention_kernels.HIDDEN`), and its own rows are cut off.

Equal tokens stay equal, since nothing tells where a text token stands. So the last text token may stand for `repeated` equal
ones: softmax weighs it by their number, which is a bias of log(repeated) on its scores. That is exact, and Stable Diffusion 3
without T5 reads 256 rows of zeros.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax.models import attention, attention_kernels
from proreflow_jax.models.layers import PLAIN, Compute

EPSILON = 1e-6  # of the norms of queries and keys
Heads = Float[Array, "b h s l"]


class JointAttention(nnx.Module):
    """Attention over the image tokens, and over text tokens beside them if `text`; the last block drops its text rows.

    `normed`: queries and keys of each head go through an RMS norm (SD 3.5).
    """

    def __init__(
        self,
        heads: int,
        width: int,
        normed: bool,
        rngs: nnx.Rngs,
        *,
        text: bool = True,
        last: bool = False,
        repeated: int = 1,
        compute: Compute = PLAIN,
    ) -> None:
        self.heads, self.width, self.repeated, self.compute = heads, width, repeated, compute
        linear = lambda: nnx.Linear(heads * width, heads * width, rngs=rngs)
        norm = lambda: nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), nnx.List([linear()])
        if normed:
            self.norm_q, self.norm_k = norm(), norm()
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            if normed:
                self.norm_added_q, self.norm_added_k = norm(), norm()
            if not last:
                self.to_add_out = linear()

    def __call__(
        self, x: Float[Array, "b s c"], text: Float[Array, "b t c"] | None = None
    ) -> tuple[Float[Array, "b s c"], Float[Array, "b t c"] | None]:
        """(image rows, text rows); the latter are None in the last block and where there is no text."""
        tokens = x.shape[1] + (0 if text is None else text.shape[1])
        full = attention_kernels.filled(tokens)  # without whole blocks no platform takes its kernel
        form = attention_kernels.choose_attention(self.compute, full, full, self.heads, self.width, x.shape[0], x.dtype)
        if form == "splash" and attention_kernels.lanes(self.width) - self.width >= attention_kernels.MARKS:
            return self._splash(x, text)
        return self._whole(x, text, "chunked" if form == "splash" else form)  # full lanes have no room for biases

    def _streams(self, x: Array, text: Array | None) -> list[tuple[Array, list[nnx.Linear], list[nnx.RMSNorm | None]]]:
        """(tokens, layers of q, k, v, norms of q, k, v) of each stream."""
        norms = lambda *names: [getattr(self, name, None) for name in names] + [None]
        image = (x, [self.to_q, self.to_k, self.to_v], norms("norm_q", "norm_k"))
        if text is None:
            return [image]
        return [image, (text, [self.add_q_proj, self.add_k_proj, self.add_v_proj], norms("norm_added_q", "norm_added_k"))]

    def _whole(self, x: Array, text: Array | None, form: str) -> tuple[Array, Array | None]:
        """Heads at their true width."""
        parts = [
            [self._normed(layer(h), norm) for layer, norm in zip(layers, norms, strict=True)]
            for h, layers, norms in self._streams(x, text)
        ]
        q, k, v = (jnp.concatenate(rows, axis=1) for rows in zip(*parts, strict=True))
        bias = self._bias(q.shape[1], q.shape[1], text)
        out = attention.heads_attention(q, k, v, self.heads, form=form, bias=bias)
        image, words = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](image), self.to_add_out(words) if hasattr(self, "to_add_out") and text is not None else None

    def _splash(self, x: Array, text: Array | None) -> tuple[Array, Array | None]:
        """Heads in full lanes, tokens in full blocks."""
        parts = [
            [self._padded(layer, h, norm, i == 0) for i, (layer, norm) in enumerate(zip(layers, norms, strict=True))]
            for h, layers, norms in self._streams(x, text)
        ]
        tokens = sum(part[0].shape[2] for part in parts)
        full = attention_kernels.filled(tokens)
        fill = jnp.zeros((*parts[0][0].shape[:2], full - tokens, parts[0][0].shape[3]), x.dtype)
        q, k, v = (jnp.concatenate([*rows, fill], axis=2) for rows in zip(*parts, strict=True))
        if (bias := self._bias(tokens, full, text)) is not None:
            q, k = attention_kernels.marked(q, k, bias, self.width)
        out = attention_kernels.splash(q, k, v, self.compute)
        image, words = out[:, :, : x.shape[1]], out[:, :, x.shape[1] : tokens]
        joined = attention.joined_heads(self.to_out[0], image, self.width)
        return joined, attention.joined_heads(self.to_add_out, words, self.width) if hasattr(self, "to_add_out") else None

    def _bias(self, tokens: int, full: int, text: Array | None) -> np.ndarray | None:
        """What is added to all scores of each key; None: nothing anywhere."""
        bias = np.zeros(full, np.float32)
        bias[tokens:] = attention_kernels.HIDDEN
        if text is not None:
            bias[tokens - 1] = math.log(self.repeated)
        return bias if bias.any() else None

    def _normed(self, x: Float[Array, "b s c"], norm: nnx.RMSNorm | None) -> Float[Array, "b s c"]:
        return x if norm is None else norm(x.reshape(*x.shape[:2], self.heads, -1)).reshape(x.shape)

    def _padded(self, layer: nnx.Linear, x: Float[Array, "b s c"], norm: nnx.RMSNorm | None, query: bool) -> Heads:
        """A projection as heads in full lanes, through its norm; queries are scaled on the way."""
        scale = self.width**-0.5 if query else 1.0
        if norm is None:
            return attention.padded_heads(layer, x, self.heads, scale)
        h = attention.padded_heads(layer, x, self.heads).astype(jnp.float32)
        weight = attention.pad_lanes(scale * norm.scale[...].astype(jnp.float32))
        mean = jnp.square(h).sum(axis=-1, keepdims=True) / self.width  # the lanes behind the width are zeros
        return (h * jax.lax.rsqrt(mean + EPSILON) * weight).astype(x.dtype)
