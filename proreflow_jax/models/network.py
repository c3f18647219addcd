"""Networks as pure functions over flat dicts {torch name: array}, and a UNet's conditioning.

The one file that knows flax's state machinery.

Names are the module's attribute paths, which equal torch's state-dict names; arrays keep JAX's layout (`weights.py`
holds the transposes). Host cost of a flat dict is a tenth of an `nnx.State` (docs of the tensor count of SD 1.5).

SD 1.x and 2.x are conditioned by the last states of one text encoder. SDXL (Podell et al. 2023, sec. 2.1 and 2.2) reads the
states before the last layer of two encoders side by side, the second's pooled state, and six numbers about the image.
SD 3's three encoders are in joint_conditioning.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from proreflow_jax import UserError
from proreflow_jax.models import clip, layers, mmdit, t5, unet, vae
from proreflow_jax.models.layers import PLAIN, Compute, in_turn

Params = dict[str, Float[Array | np.ndarray, "..."]]
TORCH_NAME = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
TORCH_NAME |= {"mean": "running_mean", "var": "running_var"}  # of a batch norm

BY_REDUCTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}  # options of XLA's compiler for CPUs
SCANNED = 4  # from so many equal blocks in a row a TPU program loops over them


class Network(NamedTuple):
    """One network: shapes of its parameters, their initial values, its forward pass."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[..., Any]  # apply(params, *inputs, method="__call__")
    config: dict
    constants: frozenset[str] = frozenset()  # names of `shapes` that no training changes: torch's buffers


def cpu_options(net: Network, platform: str) -> dict[str, str]:
    """Options of a jit that computes a network.

    On a CPU XLA gives products, convolutions and sums to YNNPACK; of large weights it takes less time to keep the first two:
    SD 1.5's convolutions 0.7 of it (docs/bench.md). Small networks' programs stay as they are.
    """
    large = any(math.prod(shape.shape) >= layers.LARGE for shape in net.shapes.values())
    return dict(BY_REDUCTIONS) if large and platform == "cpu" else {}


def _name(path: tuple) -> str:
    *head, leaf = map(str, path)
    return ".".join([*head, TORCH_NAME.get(leaf, leaf)])  # a bare parameter keeps its own name


class _OneKey(nnx.Rngs):
    """nnx.Rngs for tracing shapes. The counters of a real one cost time quadratic in the number of tensors."""

    def __init__(self, key: Key[Array, ""]) -> None:
        self._key = key

    def params(self) -> Key[Array, ""]:
        """Always the same key."""
        return self._key


def network(build: Callable[[nnx.Rngs], nnx.Module], config: dict) -> Network:
    """Turns a module's constructor into pure functions; nothing is allocated here.

    Args:
      build: makes the module from an nnx.Rngs.
      config: the component's config.json, kept beside the functions.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey(jax.random.key(0)))))
    paths = {_name(path): path for path, _ in nnx.to_flat_state(state)}
    flat = dict(nnx.to_flat_state(state))
    shapes = {name: jax.ShapeDtypeStruct(flat[path].get_value().shape, jnp.float32) for name, path in paths.items()}

    def init(key: Key[Array, ""]) -> Params:
        arrays = dict(nnx.to_flat_state(nnx.state(build(nnx.Rngs(key)))))
        return {name: arrays[path].get_value() for name, path in paths.items()}

    def apply(params: Params, *inputs: Any, method: str = "__call__", **keywords: Any) -> Any:
        leaves = [(path, flat[path].replace(params[name])) for name, path in paths.items()]
        module = nnx.merge(graph, nnx.from_flat_state(leaves))
        return getattr(module, method)(*inputs, **keywords)

    constants = frozenset(name for name, path in paths.items() if not isinstance(flat[path], nnx.Param))
    return Network(shapes, init, apply, config, constants)


def scanned(blocks: Sequence[nnx.Module], call: Callable[[nnx.Module, PyTree], PyTree], h: PyTree) -> PyTree:
    """`kernels.in_turn` of many blocks as one loop over their stacked weights: XLA compiles one of SDXL's ten, not all.

    Each turn gathers its own weights. A few blocks stay written out, which leaves XLA more to overlap.
    """
    if len(blocks) < SCANNED:
        return in_turn(blocks, call, h)
    graphs, states = zip(*map(nnx.split, blocks), strict=True)
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return jax.lax.scan(lambda h, state: (call(nnx.merge(graphs[0], state), h), None), h, weights)[0]


def cast(params: Params, dtype: Any) -> Params:
    """The parameters in a compute dtype."""
    return {name: value.astype(dtype) for name, value in params.items()}


def make_unet(config: dict, compute: Compute = PLAIN) -> Network:
    """apply(params, latents (b,h,w,c), timesteps (b,), context (b,s,d)[, pooled, time_ids]) -> (b,h,w,c).

    `compute` changes the form of attention and the arrays that a backward pass recomputes, not the result.
    """
    compute = compute._replace(repeat=scanned) if compute.platform == "tpu" else compute
    architecture = unet.architecture(config)
    return network(lambda rngs: layers.gathering(unet.UNet(architecture, rngs, compute), compute), config)


def make_transformer(config: dict, compute: Compute = PLAIN, repeated: int = 1) -> Network:
    """apply(params, latents (b,h,w,c), timesteps (b,), context (b,s,d), pooled (b,p)[, None]) -> (b,h,w,c).

    `compute` as in `make_unet`. The last context token counts as `repeated` equal ones, exactly: 256 rows of zeros in the place
    of T5 need one. Raises ValueError, one line, for a network of another kind.
    """
    compute = compute._replace(repeat=scanned) if compute.platform == "tpu" else compute
    a = mmdit.architecture(config)
    return network(lambda rngs: layers.gathering(mmdit.MMDiT(a, rngs, compute, repeated), compute), config)


def make_denoiser(config: dict, compute: Compute = PLAIN) -> Network:
    """The network that is distilled, by its config's class; a UNet where it names none. Raises ValueError, one line."""
    name = config.get("_class_name", "UNet2DConditionModel")
    if name not in DENOISERS:
        raise UserError(f"a {name} is not distilled, only {' and '.join(DENOISERS)}")
    return DENOISERS[name](config, compute)


DENOISERS = {"UNet2DConditionModel": make_unet, "SD3Transformer2DModel": make_transformer}


def make_vae(config: dict, compute: Compute = PLAIN) -> Network:
    """apply(params, x, method="encode") -> (mean, std); method="decode" -> images; latents are unscaled."""
    return network(lambda rngs: vae.AutoencoderKL(config, rngs, compute), config)


def make_text_encoder(config: dict) -> Network:
    """apply(params, ids (b,s)) -> TextStates."""
    return network(lambda rngs: clip.CLIPText(config, rngs), config)


def make_t5(config: dict) -> Network:
    """apply(params, ids (b,s)) -> last states (b,s,d). Raises ValueError, one line, for an encoder of another kind."""
    t5.check(config)
    return network(lambda rngs: t5.T5Encoder(config, rngs), config)


class Context(NamedTuple):
    """A network's conditioning, one row an example: a tree of arrays, None where the model takes none."""

    states: Float[Array, "b s d"]
    pooled: Float[Array, "b p"] | None = None
    time_ids: Float[Array, "b 6"] | None = None

    def cast(self, dtype: Any) -> "Context":
        """States in a compute dtype; sizes stay exact."""
        pooled = None if self.pooled is None else self.pooled.astype(dtype)
        return self._replace(states=self.states.astype(dtype), pooled=pooled)


Conditioner = Callable[[Mapping[str, Params], Int[Array, "b s"]], Context]  # (weights by component, ids) -> Context


def make_conditioner(encoders: Mapping[str, Network], sizes: tuple[int, ...], zeroed: np.ndarray | None) -> Conditioner:
    """The function from ids to Context.

    Args:
      encoders: one text encoder, or SDXL's two in order; ids of their tokenizers lie side by side.
      sizes: SDXL's (original height, width, crop top, left, target height, width), in pixels.
      zeroed: ids (s,) of the empty prompt, if SDXL takes its states as zeros (`force_zeros_for_empty_prompt`).
    """
    if len(encoders) == 1:
        ((name, encoder),) = encoders.items()
        return lambda params, ids: Context(encoder.apply(params[name], ids).last)

    def both(params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
        parts = jnp.split(ids, len(encoders), axis=1)
        states = [encoder.apply(params[name], part) for (name, encoder), part in zip(encoders.items(), parts, strict=True)]
        texts, pooled = jnp.concatenate([s.penultimate for s in states], axis=-1), states[-1].pooled
        if zeroed is not None:
            not_empty = jnp.any(ids != zeroed, axis=1)
            texts, pooled = texts * not_empty[:, None, None], pooled * not_empty[:, None]
        return Context(texts, pooled, jnp.tile(jnp.asarray(sizes, jnp.float32), (ids.shape[0], 1)))

    return both


def check_conditioning(unet: Mapping[str, Any], encoders: Mapping[str, Network], origin: str) -> None:
    """Raises ValueError, one line, if a UNet's config.json asks for another conditioning than the text encoders give."""
    widths = [encoder.config["hidden_size"] for encoder in encoders.values()]
    if sum(widths) != unet["cross_attention_dim"]:
        raise UserError(
            f"{origin}: the UNet reads text states of width {unet['cross_attention_dim']}, its text encoders give {sum(widths)}"
        )
    added = unet.get("addition_embed_type") is not None
    if added != (len(encoders) == 2):
        raise UserError(f"{origin}: a UNet with micro-conditioning (SDXL) and two text encoders go together, one is missing")
    if added:
        last = list(encoders.values())[-1]
        pooled = last.shapes["text_projection.weight"].shape[1] if "text_projection.weight" in last.shapes else widths[-1]
        expected, present = unet["projection_class_embeddings_input_dim"], pooled + 6 * unet["addition_time_embed_dim"]
        if expected != present:
            raise UserError(
                f"{origin}: the UNet reads {expected} numbers beside the text, SDXL base gives {present} (a refiner?)"
            )
