"""The networks of a base model's training, and what is taught to them: an autoencoder, a denoiser and its text encoders.

A config with a block `unet` is Stable Diffusion in small: noise prediction, one CLIP. A config with a block `transformer` is
Stable Diffusion 3 in small: a rectified flow, two CLIPs with projections, no T5.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import Schedule, from_config
from proreflow_jax.models.joint_conditioning import make_joint_conditioner
from proreflow_jax.models.layers import Compute
from proreflow_jax.models.network import (
    Conditioner,
    Network,
    Params,
    make_conditioner,
    make_text_encoder,
    make_transformer,
    make_unet,
    make_vae,
)
from proreflow_jax.pretrained import pipeline, tokenizer, write_pipeline
from proreflow_jax.pretrained.t5_tokenizer import LENGTH
from proreflow_jax.reflow import flow_pretraining, pretraining

UNET, TRANSFORMER = "unet", "transformer"  # blocks of a config, and components
BESIDE = {UNET: ("schedule",), TRANSFORMER: ("flow", "text_2")}  # blocks that go with them
TOKENIZERS = {UNET: ("tokenizer",), TRANSFORMER: ("tokenizer", "tokenizer_2")}
SECOND_ACTIVATION = "gelu"  # of the second CLIP, OpenCLIP's
ZEROS = re.compile(r"(norm1|norm1_context|norm_out)\.linear\.|^proj_out\.")  # each block begins as the identity, v as 0


class Diffusion(NamedTuple):
    """All that is trained on latents, as one flat dict: each network's parameters behind its component's name."""

    name: str  # of the denoiser's component
    networks: dict[str, Network]  # by component, the denoiser first
    condition: Conditioner
    scheduler: dict  # scheduler_config.json
    constants: dict[str, np.ndarray]  # of the denoiser: no training touches these

    @property
    def denoiser(self) -> Network:
        """The UNet or transformer."""
        return self.networks[self.name]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Components of the text encoders."""
        return tuple(name for name in self.networks if name != self.name)

    @property
    def schedule(self) -> Schedule:
        """Noise levels."""
        return from_config(self.scheduler)

    @property
    def flow(self) -> Parameterization:
        """How the denoiser's output is read."""
        return Parameterization("flow" if self.name == TRANSFORMER else "epsilon")

    def init(self, key: jax.Array) -> Params:
        """Random parameters. A transformer's modulations and its last layer begin as zeros (Peebles and Xie 2023, sec. 3.2)."""
        keys = jax.random.split(key, len(self.networks))
        drawn = {name: one.init(key) for (name, one), key in zip(self.networks.items(), keys, strict=True)}
        if self.name == TRANSFORMER:
            drawn[TRANSFORMER] = {n: jnp.zeros_like(x) if ZEROS.search(n) else x for n, x in drawn[TRANSFORMER].items()}
        return self.join(drawn)

    def join(self, params: Mapping[str, Params]) -> Params:
        """Parameters by component -> what is trained."""
        joint = pretraining.joined({f"{name}/": values for name, values in params.items()})
        return {name: value for name, value in joint.items() if name.removeprefix(f"{self.name}/") not in self.constants}

    def apart(self, joint: Params) -> dict[str, Params]:
        """What is trained -> parameters by component, constants included."""
        params = {name: pretraining.part(joint, f"{name}/") for name in self.networks}
        return params | {self.name: params[self.name] | self.constants}


def kind(config: ConfigDict) -> str:
    """UNET or TRANSFORMER. Raises UserError, one line, unless the config has one of these blocks and those that go with it."""
    found = [name for name in BESIDE if name in config]
    if len(found) != 1:
        words = " and ".join(found) or "none"
        raise UserError(f"--config must have one of the blocks {' and '.join(BESIDE)}, it has {words}")
    if missing := [name for name in BESIDE[found[0]] if name not in config]:
        raise UserError(f"--config lacks {missing[0]}: take it over from the package's own configs, or begin with one of them")
    return found[0]


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(h, w, c) of a picture's latents."""
    side = config.data.resolution // 2 ** (len(config.vae.block_out_channels) - 1)
    return (side, side, config.vae.latent_channels)


def make_autoencoder(config: ConfigDict, factors: Mapping[str, float] | None = None) -> Network:
    """The autoencoder. factors: fields of its config.json that are known once it is trained."""
    plain = write_pipeline.vae_config(config.vae, config.data.resolution, quant_convs=kind(config) == UNET)
    return make_vae(plain | (factors or {}), Compute(config.attention))


def latent_factors(config: ConfigDict, mean: np.ndarray, std: np.ndarray) -> dict[str, float]:
    """scaling_factor, which gives latents unit variance; of a flow also shift_factor, their mean (a number for all channels).

    mean, std: of every picture's unscaled latents, (n, h, w, c).
    """
    scaling = float(1.0 / np.sqrt(mean.var() + (std**2).mean()))
    return {"scaling_factor": scaling} | ({"shift_factor": float(mean.mean())} if kind(config) == TRANSFORMER else {})


def make_diffusion(config: ConfigDict, run: Path) -> Diffusion:
    """The networks that are trained on latents, for the tokenizer of the run."""
    form, words = kind(config), tokenizer.vocabulary_size(run / "tokenizer")
    if form == UNET:
        encoders = {"text_encoder": make_text_encoder(write_pipeline.text_config(config.text, words))}
        denoiser = make_unet(
            write_pipeline.unet_config(config.unet, config.text, latent_shape(config)), Compute(config.attention)
        )
        scheduler = write_pipeline.scheduler_config(config.schedule)
        return Diffusion(UNET, {UNET: denoiser, **encoders}, make_conditioner(encoders, (), None), scheduler, {})
    texts = [config.text, ConfigDict({**config.text_2, "length": config.text.length})]
    encoders = {
        "text_encoder": make_text_encoder(write_pipeline.text_config(texts[0], words)),
        "text_encoder_2": make_text_encoder(write_pipeline.text_config(texts[1], words, SECOND_ACTIVATION)),
    }
    described = write_pipeline.transformer_config(config.transformer, texts, latent_shape(config))
    denoiser = make_transformer(
        described, Compute(config.attention), repeated=LENGTH
    )  # of T5's rows, zeros, one counts for all
    condition = make_joint_conditioner(encoders, described["joint_attention_dim"], tokens=1)
    scheduler = write_pipeline.flow_scheduler_config(config.flow.shift)
    return Diffusion(TRANSFORMER, {TRANSFORMER: denoiser, **encoders}, condition, scheduler, _constants(denoiser))


def _constants(network: Network) -> dict[str, np.ndarray]:
    """The network's arrays that no training touches; no key changes these."""
    keep = lambda key: {name: value for name, value in network.init(key).items() if name in network.constants}
    return jax.device_get(jax.jit(keep)(jax.random.key(0)))


def draw_and_loss(config: ConfigDict, diffusion: Diffusion, empty: np.ndarray) -> tuple[Callable, Callable]:
    """What a step draws, and its loss. empty: ids (s,) of the empty prompt."""
    shared = dict(schedule=diffusion.schedule, empty=jnp.asarray(empty), drop=config.diffusion.prompt_dropout)
    if diffusion.name == UNET:
        draw = partial(pretraining.draw_noise, most_snr=config.diffusion.most_snr, **shared)
        text = diffusion.networks["text_encoder"]
        return draw, partial(pretraining.noise_loss, denoiser=diffusion.denoiser, text_encoder=text)
    density = flow_pretraining.LogitNormal(config.flow.logit_mean, config.flow.logit_std)
    denoiser = with_constants(diffusion)
    bound = dict(denoiser=denoiser, condition=diffusion.condition, encoders=diffusion.encoders)
    return partial(flow_pretraining.draw_flow, density=density, **shared), partial(flow_pretraining.flow_loss, **bound)


def with_constants(diffusion: Diffusion) -> Network:
    """The denoiser as a function of the parameters that are trained."""
    apply, constants = diffusion.denoiser.apply, diffusion.constants
    return diffusion.denoiser._replace(apply=lambda params, *inputs, **how: apply({**params, **constants}, *inputs, **how))


def fitting(start: pipeline.Pipeline, name: str, network: Network) -> Params:
    """The parameters of one component of the model to start from. Raises UserError if the config has another network."""
    theirs = {n: np.shape(value) for n, value in start.params.get(name, {}).items()}
    ours = {n: shape.shape for n, shape in network.shapes.items()}
    if differ := sorted(n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n)):
        raise UserError(
            f"--config.start={start.source.folder}: its {name} is not the config's, look at {', '.join(differ[:3])}"
        )
    return {n: jnp.asarray(value) for n, value in start.params[name].items()}
