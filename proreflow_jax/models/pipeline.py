"""A diffusers folder as one value: networks, parameters, tokenizer, scheduler config."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from proreflow_jax.models import tokenizer as tokenizers
from proreflow_jax.models import weights
from proreflow_jax.models.network import Network, make_text_encoder, make_unet, make_vae

MAKERS = {"unet": make_unet, "vae": make_vae, "text_encoder": make_text_encoder}


class Pipeline(NamedTuple):
    """A Stable Diffusion model as it lies on disk; parameters are float32 numpy arrays in our layout."""

    folder: Path
    unet: Network
    vae: Network
    text_encoder: Network
    params: dict[str, dict[str, np.ndarray]]  # component -> {torch name: array}
    tokenizer: tokenizers.PromptTokenizer
    scheduler: dict  # scheduler_config.json: betas and what the network predicts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image's latents at the model's own resolution."""
        size = self.unet.config["sample_size"]
        return (size, size, self.unet.config["in_channels"])

    @property
    def scaling(self) -> float:
        """Diffusion works on latents times this."""
        return self.vae.config.get("scaling_factor", 0.18215)


def load(folder: str | Path, components: tuple[str, ...] = tuple(MAKERS)) -> Pipeline:
    """Reads a diffusers folder.

    Args:
      folder: holds unet/, vae/, text_encoder/, tokenizer/, scheduler/.
      components: whose weights are read; the others keep their network without parameters.

    Raises:
      FileNotFoundError: a folder or file is not there; names it and --config.model.path.
      ValueError: weights and config.json disagree, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(
            f"--config.model.path={folder} is a single file, which is not read: convert it by diffusers' "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) and name the folder"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: --config.model.path must name a diffusers folder")
    networks = {name: make(weights.read_config(folder / name)) for name, make in MAKERS.items()}
    read = lambda name: weights.from_torch(weights.read_tensors(folder / name), networks[name].shapes, str(folder / name))
    params = {name: read(name) for name in components}
    scheduler = weights.read_config(folder / "scheduler")
    return Pipeline(folder, **networks, params=params, tokenizer=tokenizers.load(folder / "tokenizer"), scheduler=scheduler)
