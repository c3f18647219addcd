"""Make one stage's pairs: the teacher crosses every window and the states at the bounds are written as records.

Run the same command again to resume; each process makes at most one shard twice.
"""

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.run import cli


def make_pairs(config: ConfigDict, stage: int) -> None:
    """The verb: all records of one stage, published when the last one is there."""
    from proreflow_jax.jobs.pairs import make_stage_pairs
    from proreflow_jax.jobs.run_page import reporter
    from proreflow_jax.run.open import check_ready, open_experiment
    from proreflow_jax.run.outlook import PAIRS, Outlook
    from proreflow_jax.run.stages import find_stage
    from proreflow_jax.runtime.processes import job_lock
    from proreflow_jax.runtime.stopping import watching

    outlook = Outlook(config, [PAIRS], [stage], reporter(config))
    experiment = open_experiment(config, checked=outlook.begin)
    outlook.weigh(experiment.stages)
    chosen = find_stage(experiment.stages, stage)
    if chosen.online:
        raise UserError("--config.pairs.mode=online makes pairs inside the train step: there is nothing to store")
    check_ready(experiment, [chosen])
    with job_lock(chosen.folder), watching(config.watchdog):
        make_stage_pairs(experiment, chosen, outlook)


if __name__ == "__main__":
    options = {"stage": (8, "windows of the stage whose pairs are made", (1, 1000))}
    cli.start(make_pairs, __doc__, "emoji", options, pod=True)
