"""The main job: every stage of a config in order (pairs, training, hand-over), then the exports.

Run the same command again to resume, wherever it was stopped.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from proreflow_jax.run import cli
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

if TYPE_CHECKING:
    from proreflow_jax.run.stages import Stage

log = logging.getLogger(__name__)


def distill(config: ConfigDict | str | Path, overrides: Mapping[str, Any] | None = None) -> "list[Stage]":
    """Runs the whole chain of a config; what is done already is not done again. Returns the stages, which `load` takes.

    config, overrides: as `read_config` takes them.
    """
    from proreflow_jax.exports import place, write
    from proreflow_jax.exports.formats import is_flow
    from proreflow_jax.jobs import pairs, train
    from proreflow_jax.jobs.run_page import reporter
    from proreflow_jax.run.check_config import check_export
    from proreflow_jax.run.open import check_ready, open_experiment
    from proreflow_jax.run.outlook import Outlook
    from proreflow_jax.run.read_config import CONFIG, read_config
    from proreflow_jax.run.stages import find_stage
    from proreflow_jax.runtime.processes import first, job_lock
    from proreflow_jax.runtime.stopping import watching

    config = read_config(config, overrides)
    outlook = Outlook(config, show=reporter(config))
    experiment = open_experiment(config, checked=outlook.begin)
    outlook.weigh(experiment.stages)
    exported = [find_stage(experiment.stages, count) for count in config.export.stages]
    exports = [experiment.run / "export" / stage.folder.name for stage in exported]
    if exports:
        check_export(config, is_flow(experiment.base.scheduler))
        write.check_copies(experiment.base.source)
        for folder in exports:
            place.check_replaceable(folder)
    check_ready(experiment, experiment.stages)
    begin = experiment.stages[0]
    program = None if begin.online else train.jit_step(experiment, begin)
    began = time.monotonic()
    with job_lock(experiment.run):
        first(lambda: _keep_config(experiment.run / CONFIG, config))
        for stage in experiment.stages:
            with job_lock(stage.folder), watching(config.watchdog):
                if not stage.online:
                    pairs.make_stage_pairs(experiment, stage, outlook)
                train.train_stage(experiment, stage, outlook, program)
        for stage, folder in zip(exported, exports, strict=True):
            with outlook.export(stage.windows):
                write.export_stage(experiment, stage, folder)
    log.info("%s: all %d stages are done (%.0f s)", experiment.run, len(experiment.stages), time.monotonic() - began)
    return experiment.stages


def _keep_config(path: Location, config: ConfigDict) -> None:
    """The config of the first start stays."""
    if not path.exists():
        atomic.write_json(path, config.to_dict())


if __name__ == "__main__":
    cli.start(distill, __doc__, "emoji", pod=True)
