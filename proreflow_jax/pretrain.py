"""Train a small text-to-image latent diffusion model of Stable Diffusion's shape: autoencoder, then UNet and text encoder.

With --config=digits_flow_base it is of Stable Diffusion 3's: an MMDiT that is trained as a rectified flow, two text encoders.
The result is a diffusers folder. Run the same command again to resume; report.html in the run's folder shows how it goes. With
--snapshot the averages of the newest checkpoints are written, also while the training is under way.
"""

from ml_collections import ConfigDict

from proreflow_jax.run import cli


def pretrain(config: ConfigDict, out: str, snapshot: bool) -> None:
    """The verb: a diffusers folder."""
    from proreflow_jax.jobs import pretrain as job

    job.pretrain(config, out, snapshot)


if __name__ == "__main__":
    options = {
        "out": ("", "diffusers folder to write; must not exist"),
        "snapshot": (False, "write what is trained by now and end; also beside a training that is under way"),
    }
    cli.start(pretrain, __doc__, "digits_base", options)
