"""A whole Stable Diffusion as one value: networks, parameters, tokenizer, scheduler config."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from proreflow_jax import UserError
from proreflow_jax.models.joint_conditioning import check_joint_conditioning, make_joint_conditioner
from proreflow_jax.models.layers import PLAIN, Compute
from proreflow_jax.models.network import (
    Conditioner,
    Network,
    check_conditioning,
    make_conditioner,
    make_t5,
    make_text_encoder,
    make_transformer,
    make_unet,
    make_vae,
)
from proreflow_jax.pretrained import sources, weights
from proreflow_jax.pretrained.moving_shift import at_tokens
from proreflow_jax.pretrained.t5_tokenizer import LENGTH, load_t5_tokenizer
from proreflow_jax.pretrained.tokenizer import PromptTokenizer, load_tokenizer, side_by_side

log = logging.getLogger(__name__)
MAKERS = {
    **{"unet": make_unet, "transformer": make_transformer, "vae": make_vae, "text_encoder": make_text_encoder},
    **{"text_encoder_2": make_text_encoder, "text_encoder_3": make_t5},
}
T5 = "text_encoder_3"
OWN = (0, 0)  # a size that means the model's own resolution


class Pipeline(NamedTuple):
    """A Stable Diffusion model as it lies on disk; parameters are float32 arrays in our layout."""

    source: sources.ModelSource
    networks: dict[str, Network]  # by component: the denoiser, vae, text_encoder, and SDXL's text_encoder_2
    params: dict[
        str, dict[str, Any]
    ]  # component -> {torch name: numpy array}; the denoiser's on its devices where they were named
    tokenizer: PromptTokenizer
    condition: Conditioner
    scheduler: dict  # scheduler_config.json: betas and prediction type

    @property
    def denoiser_name(self) -> str:
        """The component that is distilled: "unet", or "transformer" of an MMDiT."""
        return sources.denoiser_name(self.networks)

    @property
    def denoiser(self) -> Network:
        """The network that is distilled."""
        return self.networks[self.denoiser_name]

    @property
    def denoiser_word(self) -> str:
        """How messages call the network that is distilled."""
        return "UNet" if self.denoiser_name == "unet" else self.denoiser_name

    @property
    def vae(self) -> Network:
        """Images <-> latents."""
        return self.networks["vae"]

    @property
    def text(self) -> dict[str, dict[str, Any]]:
        """Parameters of the text encoders, as `condition` takes them."""
        return {name: params for name, params in self.params.items() if name in sources.TEXT_ENCODERS}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image's latents at the model's own resolution."""
        size = self.denoiser.config["sample_size"]
        return (size, size, self.denoiser.config["in_channels"])

    @property
    def resolution(self) -> int:
        """Pixels a side at the model's own resolution."""
        return _pixels(self.networks)

    @property
    def scaling(self) -> float:
        """Diffusion works on latents times this."""
        return self.vae.config.get("scaling_factor", 0.18215)


def _pixels(networks: dict[str, Network]) -> int:
    return networks[sources.denoiser_name(networks)].config["sample_size"] * 2 ** (
        len(networks["vae"].config["block_out_channels"]) - 1
    )


def load_pipeline(
    source: sources.ModelSource | str | Path,
    *,
    prediction_type: str = "",
    original_size: tuple[int, int] = OWN,
    crop: tuple[int, int] = OWN,
    target_size: tuple[int, int] = OWN,
    compute: Compute = PLAIN,
    with_denoiser: bool = True,
) -> Pipeline:
    """Reads a model.

    Args:
      source: from `sources`, or a diffusers folder.
      prediction_type: of the denoiser where the scheduler's config does not say it right; "" leaves it.
      original_size, crop, target_size: SDXL's micro-conditioning in pixels, (height, width) or (top, left). Sizes (0, 0) mean
        the model's own resolution.
      compute: how denoiser and VAE are computed, bound to their networks.
      with_denoiser: False leaves the denoiser's weights to `read_denoiser`.

    Raises:
      FileNotFoundError: a folder or file is not there; names it and --config.model.path.
      ValueError: weights and config.json disagree, or the networks do not fit each other.
    """
    if not isinstance(source, sources.ModelSource):
        source = sources.open_folder(source)
    networks = _networks(source, compute)
    tokenizer = _tokenizer(source, {name: network.config for name, network in _encoders(networks).items()})
    scheduler = scheduler_config(source, prediction_type)
    params = {
        name: _read(source, name, network)
        for name, network in networks.items()
        if with_denoiser or name not in sources.DENOISERS
    }
    _log_layers_left_out(source, networks)
    condition = _conditioner(source, networks, tokenizer, original_size, crop, target_size)
    return Pipeline(source, networks, params, tokenizer, condition, scheduler)


def _read(source: sources.ModelSource, component: str, network: Network) -> dict[str, np.ndarray]:
    try:
        return weights.from_torch(source.tensors(component), network.shapes, str(source.place(component)))
    except UserError as error:
        flag = sources.VAE if component == "vae" and source.vae else sources.PATH
        raise type(error)(str(error).replace(sources.PATH, flag)) from None


def read_denoiser(base: Pipeline, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """The denoiser's weights, born where they live: each process reads its own part. Raises UserError as `load_pipeline`."""
    source, shapes = base.source, base.denoiser.shapes
    name = base.denoiser_name
    return weights.place(source.tensors(name), shapes, shardings, f"{source.origin / name}")


def read_constants(base: Pipeline, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """The denoiser's constants alone, likewise; {} of a UNet. Raises UserError as `load_pipeline`."""
    network, tensors = base.denoiser, base.source.tensors(base.denoiser_name)
    alone = {name: tensors[name] for name in network.constants}
    shapes = {name: network.shapes[name] for name in network.constants}
    return weights.place(alone, shapes, shardings, f"{base.source.origin / base.denoiser_name}") if alone else {}


def outline_pipeline(
    source: sources.ModelSource,
    prediction_type: str = "",
    original_size: tuple[int, int] = OWN,
    crop: tuple[int, int] = OWN,
    target_size: tuple[int, int] = OWN,
    compute: Compute = PLAIN,
) -> Pipeline:
    """A model by its config.json files alone: `params` are shapes, every prompt is a row of zeros.

    Arguments and errors are those of `load_pipeline`.
    """
    networks = _networks(source, compute)
    lengths = {name: encoder.config.get("max_position_embeddings", 77) for name, encoder in _encoders(networks).items()}
    length = sum((lengths | ({T5: LENGTH} if T5 in lengths else {})).values())
    tokenizer = PromptTokenizer(length, lambda prompts: np.zeros((len(prompts), length), np.int32))
    params = {name: network.shapes for name, network in networks.items()}
    condition = _conditioner(source, networks, tokenizer, original_size, crop, target_size)
    scheduler = scheduler_config(source, prediction_type)
    return Pipeline(source, networks, params, tokenizer, condition, scheduler)


def make_denoiser(source: sources.ModelSource) -> Network:
    """The network that is distilled, by its config.json. Raises as `load_pipeline`."""
    return _network(source, source.denoiser_name, PLAIN)


def scheduler_config(source: sources.ModelSource, prediction_type: str = "") -> dict:
    """The model's scheduler_config.json: with another prediction type where one is named, with a fixed shift where it moves.

    A shift by resolution is read at the model's own, at which it is trained and drawn.
    """
    config = source.config("scheduler") | ({"prediction_type": prediction_type} if prediction_type else {})
    if source.denoiser_name != "transformer":
        return config
    network = source.config("transformer")
    return at_tokens(config, (network["sample_size"] // network["patch_size"]) ** 2)


def _networks(source: sources.ModelSource, compute: Compute) -> dict[str, Network]:
    """The networks by component, which fit each other."""
    networks = {name: _network(source, name, compute) for name in source.components}
    origin = str(source.origin)
    check = check_conditioning if "unet" in networks else check_joint_conditioning
    check(networks[source.denoiser_name].config, _encoders(networks), origin)
    _check_channels(networks, origin)
    return networks


def _encoders(networks: dict[str, Network]) -> dict[str, Network]:
    return {name: network for name, network in networks.items() if name in sources.TEXT_ENCODERS}


def _tokenizer(source: sources.ModelSource, encoders: Mapping[str, Mapping[str, Any]]) -> PromptTokenizer:
    """The tokenizers of the text encoders, ids side by side; encoders: their config.json."""
    folders = {name: source.folder / name.replace("text_encoder", "tokenizer") for name in encoders}
    clips = [name for name in encoders if name != T5]
    tokenizer = load_tokenizer(*(folders[name] for name in clips), encoders=[encoders[name] for name in clips])
    return side_by_side([tokenizer, load_t5_tokenizer(folders[T5], encoders[T5])]) if T5 in encoders else tokenizer


def _log_layers_left_out(source: sources.ModelSource, networks: dict[str, Network]) -> None:
    for name in _encoders(networks):
        if source.layers_left_out(name):
            log.info("%s: its config.json leaves out the last layer of the file", source.origin / name)


def _conditioner(
    source: sources.ModelSource,
    networks: dict[str, Network],
    tokenizer: PromptTokenizer,
    original_size: tuple[int, int],
    crop: tuple[int, int],
    target_size: tuple[int, int],
) -> Conditioner:
    if "transformer" in networks:
        for name, value in {"original_size": original_size, "crop": crop, "target_size": target_size}.items():
            if any(value):
                raise UserError(
                    f"--config.conditioning.{name}={value}: {source.origin} is a Stable Diffusion 3, which is told no sizes: "
                    "leave it out"
                )
        width, tokens = networks["transformer"].config["joint_attention_dim"], LENGTH if T5 in networks else 1
        return make_joint_conditioner(_encoders(networks), width, tokens)
    own = (_pixels(networks),) * 2
    sizes = (*(original_size if any(original_size) else own), *crop, *(target_size if any(target_size) else own))
    zeroed = tokenizer.encode([""])[0] if source.index.get("force_zeros_for_empty_prompt") else None
    return make_conditioner(_encoders(networks), sizes, zeroed)


def _network(source: sources.ModelSource, component: str, compute: Compute) -> Network:
    config = source.config(component)
    bound = () if component in sources.TEXT_ENCODERS else (compute,)  # texts are short
    if component == "transformer" and T5 not in source.components:
        bound += (LENGTH,)  # rows of zeros stand for T5's: one that counts for all
    try:
        return MAKERS[component](config, *bound)
    except UserError as error:
        raise UserError(f"{source.folder / component}: {error}: name another {sources.PATH}") from None


def _check_channels(networks: dict[str, Network], origin: str) -> None:
    name = sources.denoiser_name(networks)
    taken, given = networks[name].config["in_channels"], networks["vae"].config["latent_channels"]
    if taken != given:
        what = "UNet" if name == "unet" else name
        raise UserError(
            f"{origin}: the {what} takes {taken} channels, the VAE gives {given}: models for inpainting or "
            "editing are not distilled, name a text-to-image --config.model.path"
        )
