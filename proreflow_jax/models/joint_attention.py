"""Attention of the MMDiT: image patches and text tokens, each projected by weights of its own, see each other and themselves.

On a TPU both go into `narrow_kernel` as they are, tokens in lanes, and their norms with them. Elsewhere they lie side by side,
the image first.

Equal tokens stay equal, since nothing tells where a text token stands. So the last text token may stand for `repeated` equal
ones: softmax weighs it by their number, which is a bias of log(repeated) on its scores. That is exact, and Stable Diffusion 3
without T5 reads 256 rows of zeros.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax.models import attention, attention_kernels, narrow_kernel
from proreflow_jax.models.layers import PLAIN, Compute
from proreflow_jax.models.narrow_body import EPSILON


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
        form = attention_kernels.choose_attention(
            self.compute, tokens, tokens, self.heads, self.width, x.shape[0], x.dtype, splash=False
        )
        return self._narrow(x, text) if form == "narrow" else self._whole(x, text, form)

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
        bias = None
        if text is not None and self.repeated > 1:
            bias = np.zeros(q.shape[1], np.float32)
            bias[-1] = math.log(self.repeated)
        out = attention.heads_attention(q, k, v, self.heads, form=form, bias=bias)
        image, words = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](image), self.to_add_out(words) if hasattr(self, "to_add_out") and text is not None else None

    def _narrow(self, x: Array, text: Array | None) -> tuple[Array, Array | None]:
        """Heads of tokens in full lanes, each stream in arrays of its own."""
        streams = self._streams(x, text)
        parts = [
            [attention.narrow_heads(layer, narrow_kernel.fill(h), self.heads) for layer in layers] for h, layers, _ in streams
        ]
        (q, k, v), biases = (
            zip(*column, strict=True) for column in zip(*(zip(*part, strict=True) for part in parts), strict=True)
        )
        weight = lambda norm: jnp.broadcast_to(norm.scale[...].astype(jnp.float32)[:, None], (self.heads, self.width, 1))
        norms = [tuple(weight(norm) for norm in row if norm) for row in zip(*(norms for *_, norms in streams), strict=True)]
        lasts = [1] if text is None else [1, self.repeated]
        tokens = tuple(narrow_kernel.Part(h.shape[1], last) for (h, *_), last in zip(streams, lasts, strict=True))
        layers = narrow_kernel.Layers(sum(biases, ()), sum(norms, ()))
        out = attention_kernels.narrow(q, k, v, layers, tokens, self.compute)
        rows = zip(self._outputs(), out, tokens, strict=False)  # the last block drops its text's
        image, *words = (attention.joined_narrow(layer, heads[..., : part.tokens]) for layer, heads, part in rows)
        return image, words[0] if words else None

    def _outputs(self) -> list[nnx.Linear]:
        return [self.to_out[0], *([self.to_add_out] if hasattr(self, "to_add_out") else [])]

    def _normed(self, x: Float[Array, "b s c"], norm: nnx.RMSNorm | None) -> Float[Array, "b s c"]:
        return x if norm is None else norm(x.reshape(*x.shape[:2], self.heads, -1)).reshape(x.shape)
