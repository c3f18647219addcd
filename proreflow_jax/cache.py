"""Cache a dataset's latents, and its text states if wished: images go through the autoencoder once, for every later run.

Name the folder by --out, and take it by --config.data.kind=cached --config.data.path=OUT. Run the same command again to resume.
"""

from ml_collections import ConfigDict

from proreflow_jax.run import cli


def cache(config: ConfigDict, out: str) -> None:
    """The verb: a folder of latents."""
    from proreflow_jax.jobs import cache_latents

    cache_latents.cache(config, out)


if __name__ == "__main__":
    options = {"out": ("", "folder of the cache, local or gs://; one that was begun is gone on with")}
    cli.start(cache, __doc__, "digits", options, pod=True)
