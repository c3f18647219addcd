"""How far other schedulers of diffusers carry an exported student from its right pictures, from the same noise and prompts.

    python tests/wrong_schedulers.py runs/digits/export/stage-2 --guidance=4

Needs torch and diffusers. Prints a table: the RMS difference of latents, as a share of the latents' own RMS too, and of
pictures in grey levels of 255. The student is a folder with the stock scheduler, drawn in as many steps as it has windows.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from proreflow_jax.data import digits
from proreflow_jax.storage.atomic import read_json

COUNT, BATCH = 64, 32
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class, fields beside those of the export's own config
    "DDIM, trailing, `set_alpha_to_one=True`": ("DDIMScheduler", {"set_alpha_to_one": True}),
    "DDIM, `linspace`": ("DDIMScheduler", {"timestep_spacing": "linspace"}),
    "DDIM, `leading` (its default)": ("DDIMScheduler", {"timestep_spacing": "leading"}),
    "Euler, trailing": ("EulerDiscreteScheduler", {}),
    "Euler, `linspace` (its default)": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "Euler, `leading`": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "Euler, trailing, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler a, trailing": ("EulerAncestralDiscreteScheduler", {}),
    "Heun, trailing": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M, trailing": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M, trailing, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M, `linspace` (its default)": ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    "DPM++ 2M SDE, trailing": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC, trailing": ("UniPCMultistepScheduler", {}),
    "PNDM, trailing": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM, `leading` (its default)": ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "leading"}),
    "DDPM, trailing": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


class Row(NamedTuple):
    """How far one scheduler ends from the right pictures."""

    name: str
    latents: float  # RMS difference
    share: float  # of the right latents' RMS
    grey: float  # RMS difference of pictures, in grey levels of 255


def measure(folder: Path, guidance: float, prompts: list[str], noise: np.ndarray) -> list[Row]:
    """Every scheduler against the folder's own. noise: (n, c, h, w)."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    own, steps = pipe.scheduler, read_json(folder / "reflow.json")["windows"]
    right = _draw(pipe, prompts, noise, steps, guidance)
    pictures, size, rows = _pictures(pipe, right), float(np.sqrt(np.mean(right**2))), []
    for name, (kind, fields) in SCHEDULERS.items():
        pipe.scheduler = getattr(diffusers, kind).from_config(own.config, **fields)
        latents = _draw(pipe, prompts, noise, steps, guidance)
        off = float(np.sqrt(np.mean((latents - right) ** 2)))
        grey = float(np.sqrt(np.mean((_pictures(pipe, latents) - pictures) ** 2)))
        rows.append(Row(name, off, off / size, grey))
    return rows


def _draw(pipe: Any, prompts: list[str], noise: np.ndarray, steps: int, guidance: float) -> np.ndarray:
    """Latents (n, c, h, w)."""
    parts = []
    for at in range(0, len(prompts), BATCH):
        latents, words = torch.from_numpy(noise[at : at + BATCH]), prompts[at : at + BATCH]
        seed = torch.Generator().manual_seed(at)  # of schedulers that draw noise at each step
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": seed, "output_type": "latent"}
        parts.append(pipe(words, latents=latents, **options).images.numpy())
    return np.concatenate(parts)


def _pictures(pipe: Any, latents: np.ndarray) -> np.ndarray:
    """Pictures in grey levels from 0 to 255."""
    with torch.no_grad():
        images = pipe.vae.decode(torch.from_numpy(latents) / pipe.vae.config.scaling_factor).sample.numpy()
    return np.clip((images + 1) * 127.5, 0, 255)


def main() -> None:
    """The table of one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guidance", type=float, default=4.0)
    words = parser.parse_args()
    config = read_json(words.folder / "unet" / "config.json")
    shape = (COUNT, config["in_channels"], config["sample_size"], config["sample_size"])
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    prompts = [digits.caption(i % 10, 0) for i in range(COUNT)]
    lines = [
        "| scheduler | RMS of the latents' difference | of the latents' own | pictures, grey levels |",
        "|---|---:|---:|---:|",
    ]
    for row in sorted(measure(words.folder, words.guidance, prompts, noise), key=lambda row: row.latents):
        lines.append(f"| {row.name} | {row.latents:.2g} | {row.share:.0%} | {row.grey:.2g} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
