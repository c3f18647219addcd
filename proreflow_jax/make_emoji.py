"""Make a dataset of emoji with captions, as configs/emoji_base.py trains on one, from the npm packages with the pictures.

Needs npm and the extra `emoji`. Packages (150 MB) are fetched once into --cache. The set that comes with the package is that of
--groups=animals-nature,food-drink,smileys-emotion.
"""

import logging

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.run import cli
from proreflow_jax.storage import paths

log = logging.getLogger(__name__)


def make_emoji(config: ConfigDict, out: str, cache: str, groups: str) -> None:
    """Writes the dataset to the folder `out`. Raises UserError if it is there already, or for a group that does not exist."""
    from proreflow_jax.data import emoji, emoji_packages

    chosen = [cli.choose(name.strip(), emoji.GROUPS, "--groups") for name in groups.split(",")] if groups else []
    folder = paths.parse_local(out, "--out")
    for path in emoji.paths(folder, config.data.resolution):
        if path.exists():
            raise UserError(f"{path} exists already: take it as it is, or name another --out")
    count = emoji_packages.make(folder, paths.parse_local(cache, "--cache"), config.data.resolution, chosen)
    log.info("wrote %s: %d pictures of %d pixels", folder, count, config.data.resolution)


if __name__ == "__main__":
    options = {
        "out": ("runs/data/emoji", "folder to write; --config.data.path of pretrain, --config.evaluate.images of evaluate"),
        "cache": ("runs/data/npm", "folder for the fetched packages"),
        "groups": ("", "groups of concepts by commas, such as animals-nature,food-drink,smileys-emotion; empty: all ten"),
    }
    cli.start(make_emoji, __doc__, "emoji_base", options)
