"""T5's encoder (transformers' T5EncoderModel, version 1.1), built from its config.json.

Raffel et al. 2020 (arXiv 1910.10683), sec. 2.1: RMS norms before each sublayer, no biases, scores that are not scaled and get a
learned number for every distance instead, the first layer's for all. Version 1.1 has gated gelus (Shazeer 2020).

The sum that runs through the layers grows beyond float16 and loses digits in bfloat16: it stays in float32, as does what each
feed-forward adds to it. All else is computed in the weights' dtype.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.models.layers import gelu_tanh

KNOWN = {  # field -> (transformers' default, the value this encoder has); anything else is another network
    "model_type": ("t5", "t5"),
    "feed_forward_proj": ("relu", "gated-gelu"),
    "dense_act_fn": ("gelu_new", "gelu_new"),
    "is_gated_act": (True, True),
    "is_decoder": (False, False),
}
BUCKETS, DISTANCE, EPSILON = 32, 128, 1e-6  # transformers' defaults


def check(config: dict) -> None:
    """Raises ValueError, one line, for the config.json of an encoder of another kind."""
    for field, (default, known) in KNOWN.items():
        if (value := config.get(field, default)) != known:
            raise UserError(f"T5 config: {field}={value!r} is not supported, known: {known!r} (T5 version 1.1)")


def buckets(tokens: int, count: int, longest: int) -> Int[np.ndarray, "s s"]:
    """The bucket of each (query, key): the first half for keys before the query and itself, the second for those behind.

    Of each half, one bucket a token up to its middle, then logarithmic ones up to the distance `longest`.
    """
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    half = count // 2
    exact, away = half // 2, np.abs(distance)
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(longest / exact))
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int64), half - 1)
    return half * (distance > 0) + np.where(away < exact, away, far)


class SelfAttention(nnx.Module):
    """Multi-head attention without biases; the first layer's holds the numbers of the distances."""

    def __init__(self, config: dict, first: bool, rngs: nnx.Rngs) -> None:
        width, self.heads = config["d_model"], config["num_heads"]
        inner = self.heads * config["d_kv"]
        linear = lambda inputs, outputs: nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = linear(width, inner), linear(width, inner), linear(width, inner), linear(inner, width)
        if first:
            self.longest = config.get("relative_attention_max_distance", DISTANCE)
            self.relative_attention_bias = _table(config.get("relative_attention_num_buckets", BUCKETS), self.heads, rngs)

    def bias(self, tokens: int) -> Float[Array, "1 h s s"]:
        """What is added to the scores."""
        table = self.relative_attention_bias
        rows = table(jnp.asarray(buckets(tokens, table.num_embeddings, self.longest)))
        return jnp.transpose(rows, (2, 0, 1))[None].astype(jnp.float32)

    def __call__(self, x: Float[Array, "b s c"], bias: Float[Array, "1 h s s"]) -> Float[Array, "b s c"]:
        heads = lambda layer: layer(x).reshape(*x.shape[:2], self.heads, -1).astype(jnp.float32)  # scores are as large as sums
        out = jax.nn.dot_product_attention(heads(self.q), heads(self.k), heads(self.v), bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1).astype(x.dtype))


class AttentionLayer(nnx.Module):
    """Norm, attention, skip; the skip is the caller's."""

    def __init__(self, config: dict, first: bool, rngs: nnx.Rngs) -> None:
        self.SelfAttention = SelfAttention(config, first, rngs)
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b s c"], bias: Float[Array, "1 h s s"]) -> Float[Array, "b s c"]:
        return self.SelfAttention(_normed(self.layer_norm, x), bias)


class GatedGELU(nnx.Module):
    """gelu(wi_0 x) wi_1 x, and wo of it in float32."""

    def __init__(self, width: int, inner: int, rngs: nnx.Rngs) -> None:
        linear = lambda inputs, outputs: nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
        self.wi_0, self.wi_1, self.wo = linear(width, inner), linear(width, inner), linear(inner, width)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        gate, values = (layer(x).astype(jnp.float32) for layer in (self.wi_0, self.wi_1))
        return self.wo(gelu_tanh(gate) * values)


class FeedForwardLayer(nnx.Module):
    """Norm and feed-forward; the skip is the caller's."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        self.DenseReluDense = GatedGELU(config["d_model"], config["d_ff"], rngs)  # the name is of T5's first version
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.DenseReluDense(_normed(self.layer_norm, x))


class Block(nnx.Module):
    """Attention, then feed-forward; `layer` is torch's list of both."""

    def __init__(self, config: dict, first: bool, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List([AttentionLayer(config, first, rngs), FeedForwardLayer(config, rngs)])

    def __call__(self, x: Float[Array, "b s c"], bias: Float[Array, "1 h s s"]) -> Float[Array, "b s c"]:
        x = x + self.layer[0](x, bias)
        return x + self.layer[1](x)


class Stack(nnx.Module):
    """The blocks and the final norm."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        self.block = nnx.List([Block(config, i == 0, rngs) for i in range(config["num_layers"])])
        self.final_layer_norm = _norm(config, rngs)


class T5Encoder(nnx.Module):
    """Token ids (b, s) -> last states (b, s, d) in the weights' dtype. Every token sees all, padding too, as in SD 3."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        self.shared = _table(config["vocab_size"], config["d_model"], rngs)
        self.encoder = Stack(config, rngs)

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        x = self.shared(ids).astype(jnp.float32)
        bias = self.encoder.block[0].layer[0].SelfAttention.bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return _normed(self.encoder.final_layer_norm, x)


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    keep = lambda arrays, **_: arrays  # else nnx.Embed answers in the dtype it was drawn in, not in its weights'
    return nnx.Embed(rows, width, promote_dtype=keep, rngs=rngs)


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config["d_model"], epsilon=config.get("layer_norm_epsilon", EPSILON), rngs=rngs)


def _normed(norm: nnx.RMSNorm, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
    """In float32, then in the weights' dtype."""
    return norm(x).astype(norm.scale.dtype)
