"""Configurations of a model trained here from scratch, in diffusers' and transformers' words, and its folder on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proreflow_jax.pretrained import weights

VERSION = "0.30.0"  # the folder layout's; diffusers only reports it
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
END_ID = -1  # the end token is the vocabulary's last


def vae_config(sizes: Mapping[str, Any], resolution: int) -> dict:
    """config.json of an AutoencoderKL; sizes: block_out_channels, layers_per_block, latent_channels, norm_num_groups."""
    levels = len(sizes["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(sizes["block_out_channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": sizes["latent_channels"],
        "layers_per_block": sizes["layers_per_block"],
        "norm_num_groups": sizes["norm_num_groups"],
        "sample_size": resolution,
        "force_upcast": False,
    }


def unet_config(sizes: Mapping[str, Any], text: Mapping[str, Any], latent: tuple[int, int, int]) -> dict:
    """config.json of a UNet2DConditionModel; latent is (h, w, c)."""
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "in_channels": latent[2],
        "out_channels": latent[2],
        "sample_size": latent[0],
        "cross_attention_dim": text["hidden_size"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()},
    }


def text_config(sizes: Mapping[str, Any], vocabulary: int) -> dict:
    """config.json of a CLIPTextModel. The vocabulary ends with the start and the end token."""
    end = vocabulary + END_ID
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": sizes["length"],
        "vocab_size": vocabulary,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": sizes["hidden_size"],
        "dtype": "float32",
        **{name: sizes[name] for name in names},
    }


def scheduler_config(betas: Mapping[str, Any]) -> dict:
    """scheduler_config.json of the stock DDIMScheduler, with the spacing that this project's windows have."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "beta_schedule": betas["beta_schedule"],
        "beta_start": betas["beta_start"],
        "beta_end": betas["beta_end"],
        "trained_betas": None,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,  # silences a warning of diffusers; without effect on trailing spacing
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": False,
    }


def write_pipeline(
    folder: Path, configs: Mapping[str, dict], params: Mapping[str, Mapping[str, Any]], scheduler: dict, dtype: Any = np.float32
) -> None:
    """Writes unet/, vae/, text_encoder/, scheduler/ and model_index.json into `folder`; the tokenizer is the caller's.

    Args:
      folder: exists.
      configs, params: by component; parameters in our layout.
      scheduler: scheduler_config.json.
      dtype: of the tensors written.
    """
    for name, config in configs.items():
        (folder / name).mkdir()
        _json(folder / name / "config.json", config)
        weights.save_tensors(folder / name / weights.file_name(name), weights.to_torch(params[name], dtype))
    (folder / "scheduler").mkdir()
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {name: list(kind) for name, kind in CLASSES.items()}
    index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": VERSION}
    index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "image_encoder": [None, None]}
    index |= {"requires_safety_checker": False}
    _json(folder / "model_index.json", index)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
