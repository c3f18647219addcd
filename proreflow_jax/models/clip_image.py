"""CLIP's image tower (transformers' CLIPVisionModelWithProjection), built from its config.json, as ViT-L/14 and ViT-g/14.

Its layers are the text encoder's without the causal mask. `pre_layrnorm` is spelt as in the Hub's files.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.models.clip import ACTIVATIONS, Encoder
from proreflow_jax.models.network import Network, network

DEFAULTS = dict(  # transformers leaves these numbers out of a config.json
    hidden_act="quick_gelu",
    hidden_size=768,
    image_size=224,
    intermediate_size=3072,
    layer_norm_eps=1e-5,
    num_attention_heads=12,
    num_channels=3,
    num_hidden_layers=12,
    patch_size=32,
    projection_dim=512,
)


class Embeddings(nnx.Module):
    """Images -> patches by a strided convolution, behind a learned class token; positions added."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        width, patch = config["hidden_size"], config["patch_size"]
        begin = jax.nn.initializers.normal(0.02)
        keep = lambda arrays, **_: arrays  # else nnx.Embed answers in the dtype it was drawn in, not in its weights'
        cut = dict(kernel_size=(patch, patch), strides=patch, padding="VALID", use_bias=False)
        self.rows = (config["image_size"] // patch) ** 2 + 1
        self.class_embedding = nnx.Param(begin(rngs.params(), (width,)))
        self.patch_embedding = nnx.Conv(config["num_channels"], width, **cut, rngs=rngs)
        self.position_embedding = nnx.Embed(self.rows, width, embedding_init=begin, promote_dtype=keep, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
        first = self.class_embedding.get_value()
        patches = self.patch_embedding(images.astype(first.dtype))
        b, _, _, d = patches.shape
        tokens = jnp.concatenate([jnp.broadcast_to(first, (b, 1, d)), patches.reshape(b, -1, d)], axis=1)
        return tokens + self.position_embedding(jnp.arange(self.rows))[None]


class VisionTransformer(nnx.Module):
    """Embeddings, layers and norms: the names that the Hub's files carry behind `vision_model.`."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        norm = lambda: nnx.LayerNorm(config["hidden_size"], epsilon=config["layer_norm_eps"], rngs=rngs)
        self.embeddings = Embeddings(config, rngs)
        self.pre_layrnorm = norm()
        self.encoder = Encoder(config, rngs, causal=False)
        self.post_layernorm = norm()


class CLIPImage(nnx.Module):
    """Normalised images (b, h, w, c) -> the projected state of the class token (b, p)."""

    def __init__(self, config: dict, rngs: nnx.Rngs) -> None:
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"image encoder: hidden_act={config['hidden_act']!r} is unknown, known: {sorted(ACTIVATIONS)}")
        self.taken = (config["image_size"], config["image_size"], config["num_channels"])
        self.vision_model = VisionTransformer(config, rngs)
        self.visual_projection = nnx.Linear(config["hidden_size"], config["projection_dim"], use_bias=False, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        if images.shape[1:] != self.taken:
            raise UserError(f"image encoder: images of {images.shape[1:]}, its config.json says {self.taken} (h, w, c)")
        model = self.vision_model
        x = model.pre_layrnorm(model.embeddings(images))
        for layer in model.encoder.layers:
            x = layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0]))


def make_image_encoder(config: dict) -> Network:
    """apply(params, images (b,h,w,c)) -> (b,p), not normalised to length one; images as `evaluation.clip_score` prepares them.

    config: of a CLIPVisionModelWithProjection, or `vision_config` of a CLIPModel; numbers left out are transformers' defaults.
    Raises ValueError for an unknown hidden_act.
    """
    config = DEFAULTS | config
    return network(lambda rngs: CLIPImage(config, rngs), config)
