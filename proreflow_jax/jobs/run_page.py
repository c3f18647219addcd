"""Writes report.html, the page of a run, anew: at every shard, checkpoint and export, and by `evaluate`; of other jobs too."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax.evaluation.page.document import document
from proreflow_jax.evaluation.page.facts import Run
from proreflow_jax.jobs.run_facts import read_run
from proreflow_jax.run.check_config import flat
from proreflow_jax.run.errors import message
from proreflow_jax.storage import atomic, paths
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
FILE = "report.html"
Read = Callable[[Location, Mapping[str, Any]], Run]  # (the run's folder, the config's fields by dotted names) -> the run


def write_page(folder: Location, config: ConfigDict, read: Read = read_run) -> None:
    """Reads the run's files and writes the page beside them."""
    atomic.write_text(folder / FILE, document(read(folder, flat(config))))


def keep_page(folder: Location, config: ConfigDict, read: Read = read_run) -> None:
    """The same, for a job that goes on whatever happens to its page: a failure is one line of warning."""
    try:
        write_page(folder, config, read)
    except Exception as error:  # a page is looked at; nothing depends on it
        log.warning("%s was not written (%s: %s); the job goes on", folder / FILE, type(error).__name__, message(error))


def reporter(config: ConfigDict, read: Read = read_run) -> Callable[[], None]:
    """`keep_page` of the run that a config names; the first call says where the page is. The config is read at the call."""
    pages: list[Location] = []

    def show() -> None:
        folder = paths.parse_path(config.root) / config.name
        keep_page(folder, config, read)
        if not pages:
            log.info("page: %s; `proreflow watch --run=%s` shows it as it grows", folder / FILE, folder)
            pages.append(folder / FILE)

    return show
