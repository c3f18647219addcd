"""The MMDiT of Stable Diffusion 3 and 3.5 (diffusers' SD3Transformer2DModel), built from its config.json.

Esser et al. 2024 (arXiv 2403.03206), sec. 4 and fig. 2. Image patches and text tokens are two streams with weights of their
own; both are modulated by time and pooled text, and meet in joint attention. SD 3.5 norms queries and keys; its medium has a
second attention of the image alone in the blocks `dual_attention_layers`.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.models.joint_attention import JointAttention
from proreflow_jax.models.layers import (
    ATTENTION,
    PLAIN,
    Compute,
    Constant,
    TimestepEmbedding,
    gelu_tanh,
    layer_norm,
    rerun,
    sinusoid,
)

KNOWN = {  # field -> the values this architecture has, diffusers' default first; (): any size
    **dict.fromkeys(("sample_size", "patch_size", "in_channels", "out_channels", "num_layers"), ()),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads", "caption_projection_dim", "joint_attention_dim"), ()),
    **dict.fromkeys(("pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers"), ()),
    "qk_norm": (None, "rms_norm"),
}
TIME_FEATURES = 256
MLP = 4  # inner width of a feed-forward, in widths
States = tuple[Float[Array, "b s c"], Float[Array, "b t c"]]  # image, text


class Architecture(NamedTuple):
    """Everything that tells one MMDiT of the family from another."""

    inputs: int
    outputs: int
    patch: int  # latent pixels a side
    heads: int
    head: int  # width of one
    layers: int
    dual: frozenset[int]  # blocks with a second attention
    context: int  # width of the text states
    pooled: int
    side: int  # patches a side of the table of positions
    base: int  # patches a side of the model's own size
    normed: bool  # queries and keys

    @property
    def width(self) -> int:
        """Of both streams."""
        return self.heads * self.head


def architecture(config: dict) -> Architecture:
    """Reads a transformer's config.json. Raises ValueError, one line, for a network of another kind."""
    for field, value in config.items():
        if not field.startswith("_") and field not in KNOWN and value is not None:
            raise UserError(
                f"transformer config: {field}={value!r} is no field of SD3Transformer2DModel, known: {sorted(KNOWN)}"
            )
        if (values := KNOWN.get(field)) and value not in values:
            raise UserError(f"transformer config: {field}={value!r} is not supported, known: {', '.join(map(repr, values))}")
    patch, layers = config["patch_size"], config["num_layers"]
    made = Architecture(
        inputs=config["in_channels"],
        outputs=config.get("out_channels") or config["in_channels"],
        patch=patch,
        heads=config["num_attention_heads"],
        head=config["attention_head_dim"],
        layers=layers,
        dual=frozenset(config.get("dual_attention_layers") or ()),
        context=config["joint_attention_dim"],
        pooled=config["pooled_projection_dim"],
        side=config["pos_embed_max_size"] or 0,
        base=config["sample_size"] // patch,
        normed=config.get("qk_norm") is not None,
    )
    rules = {
        f"caption_projection_dim={config['caption_projection_dim']} must be the heads' width, {made.heads} x {made.head}": (
            config["caption_projection_dim"] == made.width
        ),
        f"dual_attention_layers={sorted(made.dual)} must be of the {layers} blocks": made.dual <= set(range(layers)),
        f"pos_embed_max_size={config['pos_embed_max_size']} must be at least the model's own {made.base} patches a side": (
            made.side >= made.base > 0
        ),
        f"a width of {made.width} must be a multiple of 4, for the table of positions": made.width % 4 == 0,
    }
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"transformer config: {rule}")
    return made


def positions(side: int, base: int, width: int) -> Float[Array, "1 n c"]:
    """The table of side x side patches, row by row: sines and cosines of the column, then of the row; it is `base` long."""
    place = np.arange(side, dtype=np.float32) / np.float32(side / base)
    angle = np.outer(place.astype(np.float64), 1.0 / 10000.0 ** (np.arange(width // 4) / (width / 4.0)))
    line = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), jnp.float32)
    halves = (jnp.broadcast_to(half, (side, side, width // 2)) for half in (line[None], line[:, None]))
    return jnp.concatenate(list(halves), axis=-1).reshape(1, side * side, width)


class PatchEmbed(nnx.Module):
    """Latents -> tokens, row by row, with the centre of the table of positions added."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs) -> None:
        self.patch, self.side = a.patch, a.side
        self.proj = nnx.Conv(a.inputs, a.width, (a.patch, a.patch), strides=a.patch, padding="VALID", rngs=rngs)
        self.pos_embed = Constant(positions(a.side, a.base, a.width))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b s c"]:
        h, w = x.shape[1:3]
        if h % self.patch or w % self.patch:
            rule = f"patches of {self.patch} x {self.patch}"
            raise UserError(f"latents of {h} x {w} are not whole {rule}: change --config.data.resolution to a multiple")
        rows, columns = h // self.patch, w // self.patch
        if max(rows, columns) > self.side:
            rule = f"the transformer's pos_embed_max_size={self.side}"
            raise UserError(f"{rows} x {columns} patches are more than {rule} a side: lower --config.data.resolution")
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = jax.lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, -1)
        table = table[top : top + rows, left : left + columns]
        return (self.proj(x) + table).reshape(x.shape[0], rows * columns, -1)


class TimeTextEmbedding(nnx.Module):
    """Time and pooled text -> what modulates every block."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs) -> None:
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, a.width, rngs)
        self.text_embedder = TimestepEmbedding(a.pooled, a.width, rngs)

    def __call__(self, timesteps: Float[Array, " b"], pooled: Float[Array, "b p"]) -> Float[Array, "b c"]:
        features = sinusoid(timesteps, TIME_FEATURES, flip=True, shift=0.0).astype(pooled.dtype)
        return self.timestep_embedder(features) + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """The embedding -> shifts, scales and gates of one stream, in the order of the checkpoint."""

    def __init__(self, width: int, parts: int, rngs: nnx.Rngs) -> None:
        self.parts = parts
        self.linear = nnx.Linear(width, parts * width, rngs=rngs)

    def __call__(self, embedding: Float[Array, "b c"]) -> list[Float[Array, "b 1 c"]]:
        rows = checkpoint_name(self.linear(jax.nn.silu(embedding)), ATTENTION)  # small, and all weights are read for them
        return jnp.split(rows[:, None], self.parts, axis=-1)


def modulated(x: Float[Array, "b s c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]) -> Float[Array, "b s c"]:
    """norm(x) (1 + scale) + shift, in float32 to its end."""
    return (layer_norm(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


class GELU(nnx.Module):
    """A projection and the approximate gelu."""

    def __init__(self, width: int, inner: int, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s i"]:
        return gelu_tanh(self.proj(x))


class FeedForward(nnx.Module):
    """gelu and a projection back; torch's list has a dropout between, hence the index 2."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.net = nnx.List([GELU(width, MLP * width, rngs), nnx.Module(), nnx.Linear(MLP * width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net[2](self.net[0](x))


class JointBlock(nnx.Module):
    """Joint attention, the image's own attention where the block is dual, feed-forwards; the last one ends the text stream."""

    def __init__(
        self, a: Architecture, dual: bool, last: bool, rngs: nnx.Rngs, *, repeated: int = 1, compute: Compute = PLAIN
    ) -> None:
        self.dual, self.last = dual, last
        self.norm1 = Modulation(a.width, 9 if dual else 6, rngs)
        self.norm1_context = Modulation(a.width, 2 if last else 6, rngs)
        size: dict[str, Any] = dict(heads=a.heads, width=a.head, normed=a.normed, rngs=rngs, compute=compute)
        self.attn = JointAttention(last=last, repeated=repeated, **size)
        if dual:
            self.attn2 = JointAttention(text=False, **size)
        self.ff = FeedForward(a.width, rngs)
        if not last:
            self.ff_context = FeedForward(a.width, rngs)

    def __call__(self, states: States, embedding: Float[Array, "b c"]) -> States:
        x, text = states
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(embedding)
        of_text = self.norm1_context(embedding)
        shift_scale = of_text[::-1] if self.last else of_text[:2]  # the checkpoint's last block has the scale first
        image, words = self.attn(modulated(x, shift, scale), modulated(text, *shift_scale))
        if self.dual:
            shift_own, scale_own, gate_own = second
            own = self.attn2(modulated(x, shift_own, scale_own))[0]
        x = x + gate * image
        if self.dual:
            x = x + gate_own * own
        ahead = checkpoint_name(self.ff(modulated(x, shift_ff, scale_ff)), ATTENTION)  # which the gate's gradient reads
        x = x + gate_ff * ahead
        if self.last:
            return x, text
        text = text + of_text[2] * words
        return x, text + of_text[5] * self.ff_context(modulated(text, *of_text[3:5]))


class MMDiT(nnx.Module):
    """Latents, timesteps and text states -> the network's raw output: the flow's velocity, or what a student predicts.

    repeated: equal tokens that the last text token stands for, see `joint_attention`.
    """

    def __init__(self, a: Architecture, rngs: nnx.Rngs, compute: Compute = PLAIN, repeated: int = 1) -> None:
        self.a, self.compute = a, compute
        self.pos_embed = PatchEmbed(a, rngs)
        self.time_text_embed = TimeTextEmbedding(a, rngs)
        self.context_embedder = nnx.Linear(a.context, a.width, rngs=rngs)
        block = lambda i: JointBlock(a, i in a.dual, i == a.layers - 1, rngs, repeated=repeated, compute=compute)
        self.transformer_blocks = nnx.List([block(i) for i in range(a.layers)])
        self.norm_out = Modulation(a.width, 2, rngs)
        self.proj_out = nnx.Linear(a.width, a.patch**2 * a.outputs, rngs=rngs)

    def _rows(self) -> Iterator[list[JointBlock]]:
        """Equal blocks in a row."""
        for _, row in groupby(self.transformer_blocks, lambda block: (block.dual, block.last)):
            yield list(row)

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        timesteps: Float[Array, " b"],
        context: Float[Array, "b t d"],
        pooled: Float[Array, "b p"],
        time_ids: None = None,
    ) -> Float[Array, "b h w o"]:
        """Raises ValueError, one line, for latents that are no whole patches or more than the table of positions has."""
        a, (b, h, w) = self.a, x.shape[:3]
        embedding = self.time_text_embed(timesteps, pooled)
        states = self.pos_embed(x), self.context_embedder(context)
        one = lambda block, states: rerun(self.compute.remat, JointBlock.__call__, block, states, embedding)
        for row in self._rows():
            states = self.compute.repeat(row, one, states)
        scale, shift = self.norm_out(embedding)
        out = self.proj_out(modulated(states[0], shift, scale))
        out = out.reshape(b, h // a.patch, w // a.patch, a.patch, a.patch, a.outputs)
        return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, a.outputs)
