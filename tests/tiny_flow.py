"""A toy MMDiT's config and folder, as `pretrain` makes and writes it, with random weights; nothing here imports torch."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits_flow_base
from proreflow_jax.data import digits
from proreflow_jax.jobs import pretrain_networks
from proreflow_jax.pretrained import tokenizer, write_pipeline
from proreflow_jax.run import check_config

TOY = {
    "data.resolution": 8,
    "data.shift": 0,
    "vae.block_out_channels": (8, 8),
    "vae.norm_num_groups": 4,
    "vae.steps": 2,
    "vae.batch": 8,
    "vae.optimizer.warmup_steps": 0,
    "transformer.num_layers": 2,
    "transformer.num_attention_heads": 2,
    "transformer.attention_head_dim": 4,
    "transformer.pos_embed_max_size": 3,
    "text.hidden_size": 8,
    "text.num_hidden_layers": 1,
    "text.intermediate_size": 16,
    "text.projection_dim": 4,
    "text.merges": 20,
    "text_2.hidden_size": 6,
    "text_2.num_hidden_layers": 1,
    "text_2.intermediate_size": 12,
    "text_2.projection_dim": 5,
    "diffusion.steps": 4,
    "diffusion.batch": 8,
    "diffusion.optimizer.warmup_steps": 1,
    "flow.shift": 2.0,
    "samples.rows": 1,
    "samples.columns": 2,
    "samples.steps": 2,
    "checkpoint_every": 2,
    "log_every": 1,
}


def toy(folder: Path, name: str = "toy", **fields: object) -> ConfigDict:
    """The config of a toy's training in folder/runs, on folder/data; a field's dots are written as two underscores."""
    paths = {"name": name, "root": str(folder / "runs"), "data.path": str(folder / "data")}
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    return check_config.changed(digits_flow_base.get_config(), TOY | paths | fields)


def write_tokenizers(folder: Path) -> Path:
    """Both tokenizers of a toy, below the folder."""
    learned = tokenizer.learn([digits.caption(label, 0) for label in range(10)], TOY["text.merges"])
    for name in pretrain_networks.TOKENIZERS[pretrain_networks.TRANSFORMER]:
        tokenizer.write_tokenizer(folder / name, *learned, 10)
    return folder


def write_model(folder: Path) -> Path:
    """A toy's folder with random weights, none of them zero."""
    folder.mkdir(parents=True)
    config, rng = toy(folder), np.random.default_rng(0)
    diffusion = pretrain_networks.make_diffusion(config, write_tokenizers(folder))
    vae = pretrain_networks.make_autoencoder(config, {"scaling_factor": 2.0, "shift_factor": 0.25})
    networks = {"vae": vae, **diffusion.networks}
    drawn = lambda shape: (0.2 * rng.standard_normal(shape.shape)).astype(np.float32)
    params = {name: jax.tree.map(drawn, dict(one.shapes)) for name, one in networks.items()}
    params[diffusion.name] |= diffusion.constants
    configs = {name: one.config for name, one in networks.items()}
    write_pipeline.write_pipeline(folder, configs, params, diffusion.scheduler)
    return folder
