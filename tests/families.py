"""Tiny Stable Diffusions of all three families, made and saved by diffusers and transformers themselves, random weights.

What tells the families apart is as in the published models; only sizes are small: images 8x8, latents 4x4x4, prompts of 8
tokens. Nothing of this package writes any file here but the words of the vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch_reference import randomise
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from verb import PROMPTS

from proreflow_jax.pretrained import tokenizer

SIDE, LATENT, LENGTH = 8, (4, 4, 4), 8
FAMILIES = ("v1", "v2", "xl")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
ATTENTION_FIRST = {  # SD 1.x and 2.x: no attention at the lowest resolution but in the middle
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
ATTENTION_LAST = {  # SDXL: none at the highest
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
CLIP = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
OPEN_CLIP = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 24, "num_hidden_layers": 2}
POOLED, TIME = 12, 8  # SDXL: width of the pooled state, of each of the six numbers


class Family(NamedTuple):
    """What a family's pipeline is made of."""

    unet: dict[str, Any]
    text: tuple[dict[str, Any], ...]  # of each text encoder
    pads: tuple[str, ...]  # of each tokenizer
    scaling: float  # of the VAE
    scheduler: Any


MADE = {
    "v1": Family(
        unet={**ATTENTION_FIRST, "cross_attention_dim": 8, "attention_head_dim": 2},
        text=({**CLIP, "hidden_act": "quick_gelu"},),
        pads=(tokenizer.END,),
        scaling=0.18215,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    ),
    "v2": Family(
        unet={**ATTENTION_FIRST, "cross_attention_dim": 12, "attention_head_dim": (2, 4), "use_linear_projection": True},
        text=({**OPEN_CLIP, "hidden_act": "gelu"},),
        pads=("!",),
        scaling=0.18215,
        scheduler=DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
    ),
    "xl": Family(
        unet={
            **ATTENTION_LAST,
            "cross_attention_dim": 20,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME,
            "projection_class_embeddings_input_dim": POOLED + 6 * TIME,
        },
        text=({**CLIP, "hidden_act": "quick_gelu"}, {**OPEN_CLIP, "hidden_act": "gelu", "projection_dim": POOLED}),
        pads=(tokenizer.END, "!"),
        scaling=0.13025,
        scheduler=EulerDiscreteScheduler(**BETAS),
    ),
}


def make(family: str, seed: int = 0, safety: bool = False) -> DiffusionPipeline:
    """A stock pipeline of family "v1", "v2" or "xl"; with `safety`, a checker and its feature extractor (v1, v2)."""
    torch.manual_seed(seed)  # for what is drawn before it is drawn anew
    made = MADE[family]
    vocabulary, merges = tokenizer.learn(PROMPTS, 60)
    words = [CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=pad) for pad in made.pads]
    kinds = [CLIPTextModel, CLIPTextModelWithProjection][: len(words)]
    encoders = [kind(_text(sizes, vocabulary)) for kind, sizes in zip(kinds, made.text, strict=True)]
    ends = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(latent_channels=LATENT[2], scaling_factor=made.scaling, sample_size=SIDE, **ends, **BLOCKS)
    parts = {
        "vae": randomise(vae, seed + 1),
        "unet": randomise(UNet2DConditionModel(sample_size=LATENT[0], **BLOCKS, **made.unet), seed + 2),
        "text_encoder": randomise(encoders[0], seed + 3),
        "tokenizer": words[0],
        "scheduler": made.scheduler,
    }
    if family == "xl":
        second = {"text_encoder_2": randomise(encoders[1], seed + 4), "tokenizer_2": words[1]}
        return StableDiffusionXLPipeline(**parts, **second, force_zeros_for_empty_prompt=True, add_watermarker=False)
    checker = {"safety_checker": _checker(seed + 5) if safety else None, "requires_safety_checker": safety}
    return StableDiffusionPipeline(**parts, **checker, feature_extractor=_extractor() if safety else None)


def write(folder: Path, family: str, seed: int = 0, safety: bool = False) -> Path:
    """Makes one, saves it as diffusers does, and returns the folder; all but the UNet has the same values in half precision."""
    pipe = make(family, seed, safety)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if network := getattr(pipe, name, None):
            network.half().float()
    pipe.save_pretrained(folder)
    return Path(folder)


def _text(sizes: dict[str, Any], vocabulary: dict[str, int]) -> CLIPTextConfig:
    """eos_token_id=2 is what the published encoders have: the end token is then found as the largest id."""
    return CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2, **sizes)


def _checker(seed: int) -> StableDiffusionSafetyChecker:
    vision = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes = {"projection_dim": 4, "vision_config": {**vision, "image_size": SIDE, "patch_size": 4}}
    return randomise(StableDiffusionSafetyChecker(CLIPConfig(**sizes)), seed)


def _extractor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
