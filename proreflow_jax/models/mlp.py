"""A model whose latents are single vectors: a residual network in the UNet's place, one-hot prompts, no autoencoder.

Calls and shapes are the UNet's, so that everything above the networks runs unchanged: latents are (b, 1, 1, d).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from proreflow_jax.models.clip import TextStates
from proreflow_jax.models.layers import TimestepEmbedding, sinusoid
from proreflow_jax.models.network import Network, network


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, gain: float = 1.0, use_bias: bool = True) -> nnx.Linear:
    init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
    return nnx.Linear(inputs, outputs, kernel_init=init, use_bias=use_bias, rngs=rngs)


class Block(nnx.Module):
    """h + two(silu(one(norm(h) moved and scaled by the embedding)))."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.emb = _linear(width, 2 * width, rngs, 0.5)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_bias=False, use_scale=False, rngs=rngs)
        self.one, self.two = _linear(width, width, rngs), _linear(width, width, rngs, 0.3)

    def __call__(self, h: Float[Array, "b w"], embedding: Float[Array, "b w"]) -> Float[Array, "b w"]:
        shift, gain = jnp.split(self.emb(embedding), 2, axis=1)
        return h + self.two(jax.nn.silu(self.one(self.norm(h) * (1 + gain) + shift)))


class MLP(nnx.Module):
    """config: in_channels (d), cross_attention_dim (classes and the empty prompt), width, blocks, features (of the time)."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        d, width, self.features = config["in_channels"], config["width"], config["features"]
        self.time_embedding = TimestepEmbedding(self.features, width, rngs)
        self.class_embedding = _linear(config["cross_attention_dim"], width, rngs, config["cross_attention_dim"] ** 0.5, False)
        self.conv_in, self.conv_out = _linear(d, width, rngs), _linear(width, d, rngs, 0.1)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(config["blocks"])])

    def __call__(
        self, z: Float[Array, "b h w d"], timesteps: Float[Array, " b"], states: Float[Array, "b s n"], *_: Any
    ) -> Float[Array, "b h w d"]:
        time = self.time_embedding(sinusoid(timesteps, self.features, True, 0.0).astype(z.dtype))
        embedding = jax.nn.silu(time + self.class_embedding(states[:, 0]))
        h = self.conv_in(z.reshape(z.shape[0], -1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.conv_out(jax.nn.silu(h)).reshape(z.shape)


def make_mlp(config: dict) -> Network:
    """apply(params, latents (b, 1, 1, d), timesteps (b,), context (b, 1, classes + 1)) -> (b, 1, 1, d)."""
    return network(lambda rngs: MLP(config, rngs), config)


def make_one_hot(classes: int) -> Network:
    """A text encoder without parameters: ids (b, 1) -> one-hot states (b, 1, classes)."""

    def apply(params: Any, ids: Int[Array, "b 1"]) -> TextStates:
        states = jax.nn.one_hot(ids, classes)
        return TextStates(states, states, states[:, 0])

    return Network({}, lambda key: {}, apply, {"hidden_size": classes, "max_position_embeddings": 1})


def make_no_autoencoder() -> Network:
    """An autoencoder without parameters, whose latents are the images."""

    def apply(params: Any, x: Array, method: str) -> Array | tuple[Array, Array]:
        return x if method == "decode" else (x, jnp.zeros_like(x))

    return Network({}, lambda key: {}, apply, {"block_out_channels": [1], "scaling_factor": 1.0})
