"""CLIP's text encoder (transformers' CLIPTextModel and CLIPTextModelWithProjection), built from its config.json."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from proreflow_jax import UserError
from proreflow_jax.models.attention import heads_attention
from proreflow_jax.models.layers import gelu

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


class TextStates(NamedTuple):
    """The outputs of a text encoder that the family's UNets take."""

    last: Float[Array, "b s d"]  # after the final norm: SD 1.5 and 2.1
    penultimate: Float[Array, "b s d"]  # before the last layer, no norm: SDXL
    pooled: Float[Array, "b p"]  # state at the end token, projected where the model has a projection


class SelfAttention(nnx.Module):
    """Multi-head attention with biases; causal for texts."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, causal: bool) -> None:
        self.heads, self.causal = heads, causal
        linear = lambda: nnx.Linear(width, width, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        s = x.shape[1]
        mask = jnp.tril(jnp.ones((s, s), bool))[None, None] if self.causal else None
        h = heads_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask)
        return self.out_proj(h)


class MLP(nnx.Module):
    """Two linear layers around the config's activation."""

    def __init__(self, width: int, inner: int, activation: str, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.fc1 = nnx.Linear(width, inner, rngs=rngs)
        self.fc2 = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: dict, rngs: nnx.Rngs, causal: bool) -> None:
        width, epsilon = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.layer_norm1 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.self_attn = SelfAttention(width, config["num_attention_heads"], rngs, causal)
        self.layer_norm2 = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = MLP(width, config["intermediate_size"], config.get("hidden_act", "quick_gelu"), rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    """Token plus position embedding."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        width = config["hidden_size"]
        begin = jax.nn.initializers.normal(0.02)
        keep = lambda arrays, **_: arrays  # else nnx.Embed answers in the dtype it was drawn in, not in its weights'
        table = lambda rows: nnx.Embed(rows, width, embedding_init=begin, promote_dtype=keep, rngs=rngs)
        self.token_embedding = table(config["vocab_size"])
        self.position_embedding = table(config.get("max_position_embeddings", 77))

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: dict, rngs: nnx.Rngs, causal: bool = True) -> None:
        self.layers = nnx.List([Layer(config, rngs, causal) for _ in range(config["num_hidden_layers"])])


class TextTransformer(nnx.Module):
    """Embeddings, layers, final norm: the names that the Hub's files carry behind `text_model.`."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        self.final_layer_norm = nnx.LayerNorm(config["hidden_size"], epsilon=config.get("layer_norm_eps", 1e-5), rngs=rngs)


class CLIPText(nnx.Module):
    """Token ids (b, s) -> TextStates. Has a projection when the config names CLIPTextModelWithProjection."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
            raise UserError(f"text encoder: hidden_act={config['hidden_act']!r} is unknown, known: {sorted(ACTIVATIONS)}")
        self.end = config.get("eos_token_id", 2)
        self.text_model = TextTransformer(config, rngs)
        if "CLIPTextModelWithProjection" in (config.get("architectures") or ()):
            self.text_projection = nnx.Linear(config["hidden_size"], config["projection_dim"], use_bias=False, rngs=rngs)

    def __call__(self, ids: Int[Array, "b s"]) -> TextStates:
        model = self.text_model
        x = penultimate = model.embeddings(ids)
        for layer in model.encoder.layers:
            penultimate, x = x, layer(x)
        last = model.final_layer_norm(x)
        # Old configs say eos_token_id=2 although the end token is the largest id of the vocabulary.
        end = jnp.argmax(ids if self.end == 2 else ids == self.end, axis=-1)
        pooled = last[jnp.arange(ids.shape[0]), end]
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        return TextStates(last, penultimate, pooled)
