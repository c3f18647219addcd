"""Cache a dataset's latents, and its text states if wished: images go through the autoencoder once, for every later run.

Name the folder by --out, and take it by --config.data.kind=cached --config.data.path=OUT. Run the same command again to resume.
"""

from proreflow_jax.jobs.cache_latents import cache
from proreflow_jax.run import cli

if __name__ == "__main__":
    options = {"out": ("", "folder of the cache, local or gs://; one that was begun is gone on with")}
    cli.start(cache, __doc__, "configs/digits.py", options, pod=True)
