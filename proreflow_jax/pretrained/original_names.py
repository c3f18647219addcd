"""Tables of names: diffusers' on the left, a single file's without prefix on the right; a config says how many there are.

Three tensors that a single file stacks in one have a word of ours in diffusers' name (`STACKS`).
"""

import itertools
import re
from collections.abc import Mapping

from proreflow_jax import UserError

Modules = dict[str, str]  # diffusers -> original, without weight or bias
Table = dict[str, str]  # names without prefix; a dot at the end: a transformer of the UNet


def leaves(modules: Modules) -> Table:
    return {f"{here}.{leaf}": f"{there}.{leaf}" for here, there in modules.items() for leaf in ("weight", "bias")}


def parts(name: str) -> list[str]:
    """The tensors that a name stands for: of a stack its q, k and v."""
    mark = next((mark for mark in STACKS if mark in name), None)
    return [name.replace(mark, STACKS[mark].format(x)) for x in "qkv"] if mark else [name]


def _below(here: str, there: str, modules: Modules) -> Modules:
    return {f"{here}.{a}": f"{there}.{b}" for a, b in modules.items()}


UNET_ENDS: Modules = {
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
}
UNET_ADDED: Modules = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_RESNET: Modules = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
UNET_BLOCKS = {  # config field -> (with attention, without), the only kinds that the original layout knows
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
UNET_INNER = re.compile(  # inside a transformer both layouts agree; the table has the name before it, with its dot
    r"(?P<stem>.*?\.)(?P<rest>(norm|proj_in|proj_out|transformer_blocks\.\d+\."
    r"(norm[123]|attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))\.(weight|bias))"
)
VAE_RESNET: Modules = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION: Modules = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_ENDS: Modules = {  # of either half
    **{"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"},
    **_below("mid_block.resnets.0", "mid.block_1", VAE_RESNET),
    **_below("mid_block.attentions.0", "mid.attn_1", VAE_ATTENTION),
    **_below("mid_block.resnets.1", "mid.block_2", VAE_RESNET),
}
VAE_LINEAR = re.compile(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")
CLIP_LAYER: Modules = {
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    **{"self_attn.out_proj": "attn.out_proj"},
}
CLIP_ENDS = leaves({"text_model.final_layer_norm": "ln_final"}) | {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
MMDIT_ENDS: Modules = {
    **{"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear"},
    **{f"time_text_embed.timestep_embedder.linear_{1 + i // 2}": f"t_embedder.mlp.{i}" for i in (0, 2)},
    **{f"time_text_embed.text_embedder.linear_{1 + i // 2}": f"y_embedder.mlp.{i}" for i in (0, 2)},
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
MMDIT_BLOCK: Modules = {
    **{"attn.to_qkv": "x_block.attn.qkv", "attn.add_qkv_proj": "context_block.attn.qkv", "attn.to_out.0": "x_block.attn.proj"},
    **{"norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1"},
    **{"ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2"},
}
MMDIT_TEXT: Modules = {  # not in the last block
    **{"attn.to_add_out": "context_block.attn.proj"},
    **{"ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2"},
}
MMDIT_DUAL: Modules = {"attn2.to_qkv": "x_block.attn2.qkv", "attn2.to_out.0": "x_block.attn2.proj"}
MMDIT_NORMS: Modules = {
    **{f"attn.norm_{x}": f"x_block.attn.ln_{x}" for x in "qk"},
    **{f"attn.norm_added_{x}": f"context_block.attn.ln_{x}" for x in "qk"},
}
MMDIT_DUAL_NORMS: Modules = {f"attn2.norm_{x}": f"x_block.attn2.ln_{x}" for x in "qk"}
STACKS = {".qkv.": ".{}_proj.", ".to_qkv.": ".to_{}.", ".add_qkv_proj.": ".add_{}_proj."}  # our word -> diffusers' q, k and v
PROJECTION = "text_projection.weight"


def _with_attention(config: Mapping, field: str) -> list[bool]:
    if unknown := [kind for kind in config[field] if kind not in UNET_BLOCKS[field]]:
        raise UserError(f"unet config: {field} has {unknown[0]!r}; the original layout knows {', '.join(UNET_BLOCKS[field])}")
    return [kind == UNET_BLOCKS[field][0] for kind in config[field]]


def unet(config: Mapping) -> Table:
    """Blocks are numbered through all levels: conv_in is input 0, and a downsampler counts as a block of its own."""
    down, up = _with_attention(config, "down_block_types"), _with_attention(config, "up_block_types")
    per_level, last = config.get("layers_per_block", 2), len(down) - 1
    counts = [per_level] * len(down) if isinstance(per_level, int) else list(per_level)
    modules = UNET_ENDS | (UNET_ADDED if config.get("addition_embed_type") == "text_time" else {})
    modules |= _below("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    modules |= _below("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    trees: Table = {"mid_block.attentions.0.": "middle_block.1."}
    numbers = itertools.count(1)
    for level, count in enumerate(counts):
        for layer, n in zip(range(count), numbers, strict=False):
            modules |= _below(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{n}.0", UNET_RESNET)
            trees |= {f"down_blocks.{level}.attentions.{layer}.": f"input_blocks.{n}.1."} if down[level] else {}
        if level < last:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{next(numbers)}.0.op"
    numbers = itertools.count()
    for level, count in enumerate(reversed(counts)):
        for layer, n in zip(range(count + 1), numbers, strict=False):
            modules |= _below(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{n}.0", UNET_RESNET)
            trees |= {f"up_blocks.{level}.attentions.{layer}.": f"output_blocks.{n}.1."} if up[level] else {}
        if level < last:  # the upsampler comes last within the level's last block
            modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n}.{1 + up[level]}.conv"
    return leaves(modules) | trees


def vae(config: Mapping) -> Table:
    """Both halves count levels by resolution here, the finest first: the decoder's order is turned round."""
    levels, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        modules |= _below(side, side, VAE_ENDS)
        for i in range(levels):
            here, there = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{i if way == 'down' else levels - 1 - i}"
            for j in range(layers + (way == "up")):
                modules |= _below(f"{here}.resnets.{j}", f"{there}.block.{j}", VAE_RESNET)
            if i < levels - 1:
                modules[f"{here}.{way}samplers.0.conv"] = f"{there}.{way}sample.conv"
    return leaves(modules)


def open_clip(config: Mapping) -> Table:
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    names = CLIP_ENDS | ({PROJECTION: "text_projection"} if projected else {})
    for i in range(config["num_hidden_layers"]):
        here, there = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= leaves(_below(here, there, CLIP_LAYER))
        names |= {f"{here}.self_attn.qkv.{leaf}": f"{there}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")}
    return names


def clip(config: Mapping) -> Table:
    """CLIP-L keeps transformers' names; the table only says which exist. No UI reads its projection, so it has none there."""
    return {name: name for stack in open_clip(config) if stack != PROJECTION for name in parts(stack)}


def clip_with_projection(config: Mapping) -> Table:
    """SD 3's second CLIP, in transformers' names too."""
    return clip(config) | {PROJECTION: PROJECTION}


def t5(config: Mapping) -> Table:
    """T5's encoder keeps transformers' names."""
    inner = ("wi_0", "wi_1", "wo") if config.get("feed_forward_proj", "").startswith("gated-") else ("wi", "wo")
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    each = [*(f"{attention}.{x}" for x in "qkvo"), *(f"{dense}.{x}" for x in inner), "layer.0.layer_norm", "layer.1.layer_norm"]
    names = ["shared", f"encoder.block.0.{attention}.relative_attention_bias", "encoder.final_layer_norm"]
    names += [f"encoder.block.{i}.{name}" for i in range(config["num_layers"]) for name in each]
    return {f"{name}.weight": f"{name}.weight" for name in names}


def mmdit(config: Mapping) -> Table:
    """SD 3's transformer. The text ends in its last block: there its side has queries, keys and values alone."""
    modules, names = dict(MMDIT_ENDS), {"pos_embed.pos_embed": "pos_embed"}
    last, dual = config["num_layers"] - 1, config.get("dual_attention_layers") or ()
    for i in range(last + 1):
        here, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        modules |= _below(here, there, MMDIT_BLOCK | (MMDIT_TEXT if i < last else {}) | (MMDIT_DUAL if i in dual else {}))
        if config.get("qk_norm"):
            norms = MMDIT_NORMS | (MMDIT_DUAL_NORMS if i in dual else {})
            names |= {f"{a}.weight": f"{b}.weight" for a, b in _below(here, there, norms).items()}
    return names | leaves(modules)


def mmdit_swapped(config: Mapping) -> frozenset[str]:
    """Tensors whose halves change places: of a norm that no gate follows diffusers has the scale first, the file the shift."""
    return frozenset(
        leaves(dict.fromkeys(("norm_out.linear", f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear"), ""))
    )
