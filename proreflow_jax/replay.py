"""The proof of an export: the same noise and prompts through our sampler and through stock diffusers, side by side.

Needs torch and diffusers (the extra `export-check`); nothing else in the package imports this file.
"""

import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax.experiment import EVALUATION_KEY, Experiment, load_weights, run_key
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.reflow.teacher import text_context
from proreflow_jax.runtime import files

try:
    import diffusers
    import torch
except ImportError:
    raise ValueError("--check needs torch and diffusers: pip install 'proreflow_jax[export-check]'") from None

log = logging.getLogger(__name__)
LIMIT = 1e-3
COUNT = 8


def check(experiment: Experiment, stage: Stage, folder: Path) -> float:
    """Largest difference of the latents after `windows` steps at guidance 1; written to <folder>/replay.json.

    Raises RuntimeError if it exceeds 1e-3.
    """
    prompts = _prompts(experiment)
    shape = (COUNT, *experiment.base.latent_shape)
    noise = np.asarray(jax.random.normal(run_key(experiment.config, EVALUATION_KEY, 0), shape))
    ours, theirs = our_latents(experiment, stage, prompts, noise), their_latents(folder, prompts, noise, stage.windows)
    gap = float(np.abs(ours - theirs).max())
    result = {"steps": stage.windows, "images": COUNT, "largest_difference": gap, "largest_value": float(np.abs(theirs).max())}
    files.write_json(folder / "replay.json", {**result, "diffusers": diffusers.__version__, "torch": torch.__version__})
    log.info(
        "%s: %d steps in diffusers, largest difference of the latents %.1e (values to %.1f)",
        folder,
        stage.windows,
        gap,
        result["largest_value"],
    )
    if not gap <= LIMIT:
        raise RuntimeError(f"{folder}: diffusers' latents differ by {gap:.1e} from ours, must be at most {LIMIT:.0e}")
    return gap


def _prompts(experiment: Experiment) -> list[str]:
    from proreflow_jax.data import digits

    if experiment.config.data.kind == "digits":
        return [digits.caption(i, 0) for i in range(COUNT)]
    return [f"a photograph, number {i}" for i in range(COUNT)]


def our_latents(experiment: Experiment, stage: Stage, prompts: list[str], noise: np.ndarray) -> np.ndarray:
    """Latents (n, h, w, c) of our sampler, scaled."""
    student, n = load_weights(experiment, stage), experiment.networks
    text, ids = jax.device_put(experiment.base.params["text_encoder"]), jnp.asarray(experiment.base.tokenizer.encode(prompts))
    context = jax.jit(partial(text_context, n.text_encoder))(text, ids)
    sample = partial(
        sampler.sample_latents, unet=n.unet, schedule=n.schedule, flow=student.flow, steps=stage.windows, guidance=1.0
    )
    return np.asarray(jax.jit(sample)(student.params, jnp.asarray(noise), context, context))


def their_latents(folder: Path, prompts: list[str], noise: np.ndarray, steps: int) -> np.ndarray:
    """The same from the stock pipeline, told nothing but the number of steps and guidance 1."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))
    out = pipe(prompts, num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="latent").images
    return out.numpy().transpose(0, 2, 3, 1)
