"""diffusers' names <-> the single-file layout of Stable Diffusion's first release, which A1111 and ComfyUI read.

One file holds every component under a prefix (`PREFIXES`). Tensors stay in torch's layout and keep their bits; names change,
and three shapes: the VAE's attention is linear here and a 1x1 convolution there, OpenCLIP stacks q, k and v in one tensor,
and its text projection is transposed. Tables hold (diffusers, original) pairs; a config says how many of each there are.

Not restored: one layer of a text encoder behind those its config.json counts. diffusers keeps 23 of the 24 of SD 2.x and drops
the projection, since only the states before the last are used; so do we. diffusers, A1111 and ComfyUI read such a file.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from proreflow_jax import UserError
from proreflow_jax.pretrained.weights import IGNORED, OLD, OLD_NAME, listing

UNET, VAE, XL = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders"
PREFIXES = {  # family -> component -> prefix of its names
    "v1": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "v2": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    "xl": {"unet": UNET, "vae": VAE, "text_encoder": f"{XL}.0.transformer.", "text_encoder_2": f"{XL}.1.model."},
}
MARKED = {"xl": "text_encoder_2", "v2": "text_encoder", "v1": "text_encoder"}  # has the token embedding
MARK = re.compile(r"(text_model\.embeddings\.|embeddings\.)?token_embedding\.weight")  # old v1 files lack text_model
Modules = dict[str, str]  # diffusers -> original, without weight or bias
Table = dict[str, str]  # names without prefix; a dot at the end: a transformer of the UNet


def _leaves(modules: Modules) -> Table:
    return {f"{here}.{leaf}": f"{there}.{leaf}" for here, there in modules.items() for leaf in ("weight", "bias")}


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
CLIP_ENDS = _leaves({"text_model.final_layer_norm": "ln_final"}) | {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
LAYER = re.compile(r"(?:transformer\.resblocks|(?:text_model\.)?encoder\.layers)\.(\d+)\.")
STACK = ".qkv."  # our word, in a name, for the three that OpenCLIP stacks
PROJECTION = "text_projection.weight"


def family(names: Iterable[str]) -> str:
    """The family of a single file, by its text encoder: "v1" (SD 1.x), "v2" (SD 2.x) or "xl" (SDXL).

    Raises:
      ValueError: no mark of a family is among the names.
    """
    names = list(names)
    for candidate, component in MARKED.items():
        prefix = PREFIXES[candidate][component]
        if any(name.startswith(prefix) and MARK.fullmatch(name, len(prefix)) for name in names):
            return candidate
    looked = ", ".join(f"{PREFIXES[name][last]}*token_embedding.weight ({name})" for name, last in MARKED.items())
    raise UserError(f"not a single file of SD 1.x, 2.x or XL: its {len(names)} names (as {names[:2]}) lack {looked}")


def to_original(component: str, tensors: Mapping[str, np.ndarray], config: Mapping, family: str) -> dict[str, np.ndarray]:
    """One component for a single file.

    Args:
      component: unet, vae, text_encoder or (xl) text_encoder_2.
      tensors: {diffusers' name: array in torch's layout}. Text encoders may lack `text_model.`, VAEs may have the attention
        names of old diffusers. `position_ids` is left out.
      config: the component's config.json.
      family: "v1", "v2" or "xl".

    Returns:
      {name with the component's prefix: C-contiguous array of the same dtype}. OpenCLIP's `logit_scale` (of its training
      loss) and SD 2.x's last text layer are not written: no reader needs them.

    Raises:
      ValueError: one line with the names that have no place in the original layout; an unknown family or component.
    """
    prefix, table = _prefix(component, family), _table(component, config, family)
    today = _today(component, tensors.keys())
    groups = _stacks(set(today), table)
    renamed = _renamed(groups, table, f"{component} ({family})")
    return {prefix + renamed[n]: _merge(component, n, [tensors[today[p]] for p in parts]) for n, parts in groups.items()}


def from_original(component: str, tensors: Mapping[str, np.ndarray], config: Mapping, family: str) -> "Renamed":
    """One component of a single file; the inverse of `to_original`.

    Args:
      tensors: the whole file, {name: array in torch's layout}. A tensor is read with its part of the result. Tensors of other
        components, EMA weights and schedule buffers are never read.
      component, config, family: as in `to_original`.

    Returns:
      {diffusers' name of today: C-contiguous array of the same dtype}, lazily; `weights.from_torch` sees whether all are there.

    Raises:
      ValueError: one line with the component's names that are unknown; none found; an unknown family or component.
    """
    prefix, table = _prefix(component, family), _table(component, config, family)
    names = [name.removeprefix(prefix) for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - may be a file
    if not names:
        raise UserError(f"{component} ({family}): the file has no names that begin with {prefix}")
    here = {n: prefix + n for n in names if not (component.startswith("text") and _unused(n, config, family))}
    if component == "text_encoder" and "embeddings.token_embedding.weight" in here:  # some old v1 files
        here = {f"text_model.{n}": source for n, source in here.items()}
    renamed = _renamed(here, {there: here for here, there in table.items()}, f"{component} ({family})")
    return Renamed(component, tensors, {part: (here[old], new) for old, new in renamed.items() for part in _parts(new)})


class Renamed(Mapping[str, np.ndarray]):
    """A component of a single file under diffusers' names; tensors are read on access."""

    def __init__(self, component: str, tensors: Mapping[str, np.ndarray], where: dict[str, tuple[str, str]]) -> None:
        self._component, self._tensors, self._where = component, tensors, where

    def __getitem__(self, name: str) -> np.ndarray:
        there, here = self._where[name]
        return np.ascontiguousarray(_split(self._component, here, name, self._tensors[there]))

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _prefix(component: str, family: str) -> str:
    if family not in PREFIXES:
        raise UserError(f"family {family!r} is unknown, known: {', '.join(PREFIXES)}")
    if component not in PREFIXES[family]:
        raise UserError(f"component {component!r} is not part of family {family}, known: {', '.join(PREFIXES[family])}")
    return PREFIXES[family][component]


def _table(component: str, config: Mapping, family: str) -> Table:
    if component in ("unet", "vae"):
        return (_unet if component == "unet" else _vae)(config)
    return (_open_clip if PREFIXES[family][component].endswith(".model.") else _clip)(config)


def _with_attention(config: Mapping, field: str) -> list[bool]:
    if unknown := [kind for kind in config[field] if kind not in UNET_BLOCKS[field]]:
        raise UserError(f"unet config: {field} has {unknown[0]!r}; the original layout knows {', '.join(UNET_BLOCKS[field])}")
    return [kind == UNET_BLOCKS[field][0] for kind in config[field]]


def _unet(config: Mapping) -> Table:
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
    return _leaves(modules) | trees


def _vae(config: Mapping) -> Table:
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
    return _leaves(modules)


def _open_clip(config: Mapping) -> Table:
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    names = CLIP_ENDS | ({PROJECTION: "text_projection"} if projected else {})
    for i in range(config["num_hidden_layers"]):
        here, there = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= _leaves(_below(here, there, CLIP_LAYER))
        names |= {f"{here}.self_attn{STACK}{leaf}": f"{there}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")}
    return names


def _clip(config: Mapping) -> Table:
    """CLIP-L keeps transformers' names; the table only says which exist."""
    stacks = _open_clip({"num_hidden_layers": config["num_hidden_layers"]})
    return {name: name for stack in stacks for name in _parts(stack)}


def _unused(name: str, config: Mapping, family: str) -> bool:
    """Names in a text encoder of the file that diffusers' network has no use for."""
    if name in ("text_projection", PROJECTION):
        return PROJECTION not in _open_clip(config)
    layer = LAYER.match(name)
    behind = layer is not None and int(layer[1]) == config["num_hidden_layers"]
    return behind or name == "logit_scale" or bool(IGNORED.search(name))


def _today(component: str, names: Iterable[str]) -> dict[str, str]:
    """{diffusers' name of today: the name as given}."""
    names = [name for name in names if not IGNORED.search(name)]
    bare = component.startswith("text") and "final_layer_norm.weight" in names
    today = {f"text_model.{n}" if bare and not n.startswith("text_") else n: n for n in names}
    if component == "vae":
        today = {OLD_NAME.sub(lambda old: OLD[old[0]], name): name for name in names}
    if twice := sorted(set(names) - set(today.values())):
        raise UserError(f"{component}: {twice[0]} is there twice, under its old name and that of today")
    return today


def _parts(name: str) -> list[str]:
    return [name.replace(STACK, f".{x}_proj.") for x in "qkv"] if STACK in name else [name]


def _stacks(names: set[str], table: Table) -> dict[str, list[str]]:
    """{name of a stack: its q, k, v}; every other name stands alone, and so do those of an incomplete three."""
    stacks = {name: _parts(name) for name in table if STACK in name and names.issuperset(_parts(name))}
    return stacks | {name: [name] for name in sorted(names.difference(*stacks.values()))}


def _renamed(names: Iterable[str], table: Table, origin: str) -> dict[str, str]:
    renamed, left = {}, []
    for name in names:
        inner = UNET_INNER.fullmatch(name)
        if name in table:
            renamed[name] = table[name]
        elif inner and inner["stem"] in table:
            renamed[name] = table[inner["stem"]] + inner["rest"]
        else:
            left.append(name)
    if left:
        raise UserError(f"{origin}: {listing('names left over, which its config.json gives no place', left)[0]}")
    return renamed


def _merge(component: str, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    value = np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])
    if component == "vae" and VAE_LINEAR.search(name):
        value = value.reshape(*value.shape, *(1,) * (4 - value.ndim))
    return np.ascontiguousarray(value.T if name == PROJECTION else value)


def _split(component: str, whole: str, name: str, value: np.ndarray) -> np.ndarray:
    """The tensor `name` of diffusers from a tensor of the file; `whole` is the name, or that of the stack it is part of."""
    if STACK in whole:
        return np.split(np.asarray(value), 3)[_parts(whole).index(name)]
    if component == "vae" and VAE_LINEAR.search(name):
        return value.reshape(value.shape[:2])
    return value.T if name == PROJECTION else value
