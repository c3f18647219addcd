"""Configurations of a model trained here from scratch, in diffusers' and transformers' words, and its folder on disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proreflow_jax.pretrained import weights

VERSION = "0.30.0"  # the folder layout's; diffusers only reports it
ABSENT = (None, None)  # a component that the pipeline can do without
CLASSES = {  # by the component that is distilled
    "unet": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        **dict.fromkeys(("feature_extractor", "safety_checker", "image_encoder"), ABSENT),
        "requires_safety_checker": False,
    },
    "transformer": {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), ("transformers", "CLIPTextModelWithProjection")),
        **dict.fromkeys(("tokenizer", "tokenizer_2"), ("transformers", "CLIPTokenizer")),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        **dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"), ABSENT),
    },
}
END_ID = -1  # the end token is the vocabulary's last


def vae_config(sizes: Mapping[str, Any], resolution: int, quant_convs: bool = True) -> dict:
    """config.json of an AutoencoderKL; sizes: block_out_channels, layers_per_block, latent_channels, norm_num_groups.

    quant_convs: the two 1 x 1 convolutions beside the latents, which Stable Diffusion 3 has no more.
    """
    levels = len(sizes["block_out_channels"])
    without = {} if quant_convs else {"use_quant_conv": False, "use_post_quant_conv": False}
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
        **without,
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
        **_listed(sizes),
    }


def transformer_config(sizes: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], latent: tuple[int, int, int]) -> dict:
    """config.json of an SD3Transformer2DModel; latent is (h, w, c), texts are the blocks of its CLIPs.

    Their states lie side by side and are as wide as the transformer reads them: no T5 is wider.
    """
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": VERSION,
        "in_channels": latent[2],
        "out_channels": latent[2],
        "sample_size": latent[0],
        "caption_projection_dim": sizes["attention_head_dim"] * sizes["num_attention_heads"],
        "joint_attention_dim": sum(text["hidden_size"] for text in texts),
        "pooled_projection_dim": sum(text["projection_dim"] for text in texts),
        **_listed(sizes),
    }


def _listed(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tuples as JSON's lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}


def text_config(sizes: Mapping[str, Any], vocabulary: int, activation: str = "quick_gelu") -> dict:
    """config.json of a CLIPTextModel, or of one with a projection where the sizes have a projection_dim.

    The vocabulary ends with the start and the end token.
    """
    end = vocabulary + END_ID
    projected = "projection_dim" in sizes
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": sizes["length"],
        "vocab_size": vocabulary,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": sizes["projection_dim" if projected else "hidden_size"],
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


def flow_scheduler_config(shift: float) -> dict:
    """scheduler_config.json of the stock FlowMatchEulerDiscreteScheduler with one fixed shift."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "shift": shift,
    }


def write_pipeline(
    folder: Path, configs: Mapping[str, dict], params: Mapping[str, Mapping[str, Any]], scheduler: dict, dtype: Any = np.float32
) -> None:
    """Writes a folder for each component, scheduler/ and model_index.json into `folder`; tokenizers are the caller's.

    Args:
      folder: exists.
      configs, params: by component, one of them "unet" or "transformer"; parameters in our layout.
      scheduler: scheduler_config.json.
      dtype: of the tensors written.
    """
    for name, config in configs.items():
        (folder / name).mkdir()
        _json(folder / name / "config.json", config)
        weights.save_tensors(folder / name / weights.file_name(name), weights.to_torch(params[name], dtype))
    (folder / "scheduler").mkdir()
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    classes = CLASSES["transformer" if "transformer" in configs else "unet"]
    _json(folder / "model_index.json", {**classes, "_diffusers_version": VERSION})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
