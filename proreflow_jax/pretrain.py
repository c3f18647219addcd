"""Train a small text-to-image latent diffusion model of Stable Diffusion's shape: autoencoder, then UNet and text encoder.

The result is a diffusers folder. Run the same command again to resume.
"""

from proreflow_jax.jobs.pretrain import pretrain
from proreflow_jax.run import cli

if __name__ == "__main__":
    options = {"out": ("", "diffusers folder to write; must not exist")}
    cli.start(pretrain, __doc__, "configs/digits_base.py", options)
