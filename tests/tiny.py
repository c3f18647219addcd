"""The smallest models that are whole: a diffusers folder with random weights, and toy networks that compile in no time.

Images are 8x8, latents 4x4x4, prompts 8 tokens. Weights are drawn by numpy into `Network.shapes`: drawing them through the
modules would compile for seconds.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax.flow.schedule import from_config, make_schedule
from proreflow_jax.models.network import Context, Network, make_text_encoder, make_unet, make_vae
from proreflow_jax.pretrained import pipeline, tokenizer, write_pipeline
from proreflow_jax.reflow.pairs import Frozen, Networks

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=QUICK)  # compiles in a third of the time, computes the same
RESOLUTION, LATENT, LENGTH, WIDTH = 8, (4, 4, 4), 8, 8
CAPTIONS = ("a handwritten digit zero", "a handwritten one", "the number two", "a three", "a photo of the digit four")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "length": LENGTH
}  # fmt: skip


def random_params(shapes: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near one: kernels / sqrt(fan in), scales near 1, biases near 0."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape)
        if name.endswith("bias"):
            values = 0.1 * values
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embedding" not in name or "linear" in name:
            values = values / np.sqrt(np.prod(shape[:-1]))
        return values.astype(np.float32)

    return {name: draw(name, shapes[name].shape) for name in sorted(shapes)}


def write_model(folder: Path, seed: int = 0, text_layers: int = 1) -> Path:
    """Writes a whole diffusers folder, tokenizer included, and returns it; `folder` may exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.write_tokenizer(folder / "tokenizer", *tokenizer.learn(CAPTIONS, 20), LENGTH)
    text = TEXT | {"num_hidden_layers": text_layers}
    made = {
        "unet": make_unet(write_pipeline.unet_config(UNET, TEXT, LATENT)),
        "vae": make_vae({**write_pipeline.vae_config(VAE, RESOLUTION), "scaling_factor": 0.5}),
        "text_encoder": make_text_encoder(write_pipeline.text_config(text, tokenizer.vocabulary_size(folder / "tokenizer"))),
    }
    params = {name: random_params(network.shapes, seed + i) for i, (name, network) in enumerate(made.items())}
    configs = {name: network.config for name, network in made.items()}
    write_pipeline.write_pipeline(folder, configs, params, write_pipeline.scheduler_config(BETAS))
    return folder


def load(folder: Path) -> tuple[pipeline.Pipeline, Networks]:
    """The folder as the verbs see it."""
    model = pipeline.load_pipeline(folder)
    return model, Networks(model.denoiser, model.condition, model.vae, from_config(model.scheduler), model.scaling)


def frozen(model: pipeline.Pipeline, seed: int = 0, vae: bool = False) -> Frozen:
    """What the jobs of a stage read, with the model's own UNet as the teacher."""
    params = jax.tree.map(jnp.asarray, model.params)
    empty = jnp.asarray(model.tokenizer.encode([""])[0])
    encoder = params["vae"] if vae else {}
    return Frozen(jax.tree.map(jnp.asarray, model.text), encoder, params["unet"], empty, jax.random.key(seed))


# Toys: a UNet of two matrices, a text encoder that is a table, an autoencoder that averages pixels.


def toy_networks() -> Networks:
    """Networks of a few operations each, with the signatures of the real ones."""
    shapes = {
        "unet": {
            "conv_in.weight": (4, 8),
            "conv_in.bias": (8,),
            "text.weight": (WIDTH, 8),
            "time.weight": (2, 8),
            "conv_out.weight": (8, 4),
        },
        "vae": {"encoder.weight": (12, 8), "decoder.weight": (4, 12)},
    }
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    network = lambda name, apply: Network({key: struct(shape) for key, shape in shapes[name].items()}, None, apply, {})
    return Networks(network("unet", toy_unet), toy_condition, network("vae", toy_vae), make_schedule(**BETAS), 0.5)


def toy_unet(params: Mapping[str, Any], z: Any, timestep: Any, context: Any, *added: None) -> Any:
    """A network with one hidden layer at every pixel, that knows time and text."""
    phase = timestep[:, None].astype(z.dtype) * 0.003
    hidden = z @ params["conv_in.weight"] + params["conv_in.bias"]
    side = context.mean(axis=1) @ params["text.weight"]
    side += jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1) @ params["time.weight"]
    return jnp.tanh(hidden + side[:, None, None, :].astype(z.dtype)) @ params["conv_out.weight"]


def toy_condition(params: Mapping[str, Any], ids: Any) -> Context:
    """One row of a table for each token."""
    return Context(params["text_encoder"]["table.weight"][ids])


def toy_vae(params: Mapping[str, Any], x: Any, method: str) -> Any:
    """2x2 patches of an 8x8 image as vectors, through one matrix."""
    b = x.shape[0]
    if method == "decode":
        return (x @ params["decoder.weight"]).reshape(b, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, 3)
    patches = x.reshape(b, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, 12)
    mean, log = jnp.split(patches @ params["encoder.weight"], 2, axis=-1)
    return mean, jnp.exp(jnp.tanh(log))


def toy_frozen(networks: Networks, seed: int = 0) -> Frozen:
    """Random weights for the toys' teacher, text encoder and autoencoder."""
    draw = lambda network, i: {k: jnp.asarray(v) for k, v in random_params(network.shapes, seed + i).items()}
    empty = jnp.arange(LENGTH, dtype=jnp.int32) + 40
    table = {"table.weight": jax.ShapeDtypeStruct((50, WIDTH), jnp.float32)}
    text = {"text_encoder": {k: jnp.asarray(v) for k, v in random_params(table, seed + 1).items()}}
    return Frozen(text, draw(networks.vae, 2), draw(networks.denoiser, 0), empty, jax.random.key(seed))


def rows(count: int, first: int = 0, seed: int = 0) -> dict[str, jax.Array]:
    """Inputs of `count` examples numbered from `first`; an example's contents depend on its number only."""
    draws = [np.random.default_rng([seed, i]) for i in range(first, first + count)]
    batch = {
        "index": np.arange(first, first + count, dtype=np.int32),
        "ids": np.stack([rng.integers(0, 40, LENGTH).astype(np.int32) for rng in draws]),
        "image": np.stack([rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3)).astype(np.uint8) for rng in draws]),
    }
    return {name: jnp.asarray(values) for name, values in batch.items()}
