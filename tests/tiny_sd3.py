"""Tiny Stable Diffusions 3 and 3.5, made and saved by diffusers and transformers themselves, random weights.

What tells the members apart is as in the published models: qk norm and dual attention in 3.5, a VAE of 16 channels with a
shift and without quant convs, two CLIPs with projections, T5 or none. Sizes are small: images 8x8, latents 4x4x16, 2x2 patches,
prompts of 8 tokens (CLIP; T5's length is the caller's, 512 at most). Nothing of this package writes any file here but the words
of CLIP's vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from families import CLIP, OPEN_CLIP
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch_reference import randomise
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from verb import PROMPTS

from proreflow_jax.pretrained import tokenizer

SIDE, LATENT, LENGTH = 8, (4, 4, 16), 8
STATES, POOLED = 24, 20  # widths of the joint context and of the pooled states of both CLIPs
SCALING, SHIFT_FACTOR, SHIFT = 1.5305, 0.0609, 3.0
TRANSFORMER = {
    "sample_size": LATENT[0],
    "patch_size": 2,
    "in_channels": LATENT[2],
    "out_channels": LATENT[2],
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": STATES,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 5,  # patches a side; the crop of 2 or 3 is not at the table's edge
}
MEMBERS: dict[str, dict[str, Any]] = {
    "3-medium": {},
    "3.5-medium": {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3.5-large": {"qk_norm": "rms_norm"},
}
T5 = {"d_model": STATES, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT[2],
    "sample_size": SIDE,
    "scaling_factor": SCALING,
    "shift_factor": SHIFT_FACTOR,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make(member: str = "3.5-medium", t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """A stock pipeline of "3-medium", "3.5-medium" or "3.5-large"; without T5, its encoder and tokenizer are None."""
    torch.manual_seed(seed)  # for what is drawn before it is drawn anew
    vocabulary, merges = tokenizer.learn(PROMPTS, 60)
    words = lambda pad: CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=pad)
    third = t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        transformer=randomise(SD3Transformer2DModel(**(TRANSFORMER | MEMBERS[member])), seed + 2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=randomise(AutoencoderKL(**VAE), seed + 1),
        text_encoder=_clip({**CLIP, "hidden_act": "quick_gelu", "projection_dim": 8}, vocabulary, seed + 3),
        tokenizer=words(tokenizer.END),
        text_encoder_2=_clip({**OPEN_CLIP, "hidden_act": "gelu", "projection_dim": 12}, vocabulary, seed + 4),
        tokenizer_2=words("!"),
        text_encoder_3=randomise(T5EncoderModel(T5Config(vocab_size=len(third) + 3, **T5)), seed + 5) if t5 else None,
        tokenizer_3=third,
    )


def write(folder: Path, member: str = "3.5-medium", t5: bool = True, seed: int = 0) -> Path:
    """Makes one, saves it as diffusers does, and returns the folder; encoders and VAE have the same values in half floats."""
    pipe = make(member, t5, seed)
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if network := getattr(pipe, name, None):
            network.half().float()
    pipe.save_pretrained(folder)
    return Path(folder)


def stock(folder: Path) -> StableDiffusion3Pipeline:
    """The folder as diffusers opens it. Of a missing T5 diffusers wants to be told, though the folder's index says so."""
    missing = [name for name in ("text_encoder_3", "tokenizer_3") if not (Path(folder) / name).is_dir()]
    return StableDiffusion3Pipeline.from_pretrained(folder, **dict.fromkeys(missing))


def t5_tokenizer() -> T5Tokenizer:
    """Pieces learned from the prompts, with T5's ids: 0 pads, 1 ends, 2 is unknown, the last ones are sentinels."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    learner.train_from_iterator(
        PROMPTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = sorted(learner.get_vocab().items(), key=lambda row: row[1])
    scores = [(piece, 0.0 if piece in special else -2.0 - 0.01 * number) for piece, number in pieces]
    return T5Tokenizer(vocab=scores, extra_ids=2, model_max_length=512)


def _clip(sizes: dict[str, Any], vocabulary: dict[str, int], seed: int) -> CLIPTextModelWithProjection:
    """eos_token_id=2 is what the published encoders have: the end token is then found as the largest id."""
    config = CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2, **sizes)
    return randomise(CLIPTextModelWithProjection(config), seed)
