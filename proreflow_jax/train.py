"""Train one stage: a student learns to cross each window in a straight line.

Needs the stage's pairs (make_pairs) unless --config.pairs.mode=online. Run the same command again to resume.
"""

from ml_collections import ConfigDict

from proreflow_jax import MissingFile
from proreflow_jax.run import cli


def train(config: ConfigDict, stage: int) -> None:
    """The verb: one stage to its end, DONE.json included."""
    from proreflow_jax.data import records
    from proreflow_jax.jobs.run_page import reporter
    from proreflow_jax.jobs.train import train_stage
    from proreflow_jax.run.open import check_ready, open_experiment
    from proreflow_jax.run.outlook import TRAIN, Outlook
    from proreflow_jax.run.stages import find_stage
    from proreflow_jax.runtime.processes import job_lock
    from proreflow_jax.runtime.stopping import watching

    outlook = Outlook(config, [TRAIN], [stage], reporter(config))
    experiment = open_experiment(config, checked=outlook.begin)
    outlook.weigh(experiment.stages)
    chosen = find_stage(experiment.stages, stage)
    check_ready(experiment, [chosen])
    if not chosen.online and not (chosen.folder / "pairs" / records.MANIFEST).is_file():
        raise MissingFile(f"{chosen.folder / 'pairs'} holds no finished pairs: run make_pairs --stage={stage} first")
    with job_lock(chosen.folder), watching(config.watchdog):
        train_stage(experiment, chosen, outlook)


if __name__ == "__main__":
    cli.start(train, __doc__, "emoji", {"stage": (8, "windows of the stage to train", (1, 1000))}, pod=True)
