"""Make the emoji dataset, which configs/emoji_base.py trains on, from the npm packages that publish the pictures.

Needs npm and the extra `emoji`. Packages (150 MB) are fetched once into --cache.
"""

import logging

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.run import cli
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)


def make_emoji(config: ConfigDict, cache: str, concepts: int) -> None:
    """Writes the dataset to config.data.path. Raises UserError if it is there already."""
    from proreflow_jax.data import emoji, emoji_packages

    folder = paths.parse_local(config.data.path, "--config.data.path")
    for path in emoji.paths(folder, config.data.resolution):
        if path.exists():
            raise UserError(f"{path} exists already: take it as it is, or set another --config.data.path")
    count = emoji_packages.make(folder, paths.parse_local(cache, "--cache"), config.data.resolution, concepts)
    log.info("wrote %s: %d pictures of %d pixels", folder, count, config.data.resolution)


if __name__ == "__main__":
    options = {
        "cache": ("runs/data/npm", "folder for the fetched packages"),
        "concepts": (0, "so many concepts, chosen by their names' hashes, in all their styles; 0: all 1,911", (0, 1911)),
    }
    cli.start(make_emoji, __doc__, "emoji_base", options)
