"""Who looks on while a stage trains: TensorBoard and wandb, progress, pictures, progress.json. They change no number."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from proreflow_jax.jobs.stage_pictures import StagePictures
from proreflow_jax.reflow import loop
from proreflow_jax.reflow.train_step import TrainState, averaged, learning_rate
from proreflow_jax.run.check_config import flat
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.outlook import Outlook
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime import stopping
from proreflow_jax.runtime.curves import as_text
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.processes import leads
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.runtime.tracker import NOWHERE, Tracker, open_tracker


@contextmanager
def tracked(experiment: Experiment) -> Iterator[Tracker]:
    """The run on wandb, if the config asks for it, on process 0; ended with the block."""
    w = experiment.config.wandb
    fields = flat(experiment.config)
    tracker = open_tracker(experiment.run, w.project, w.entity, fields) if leads() else NOWHERE
    try:
        yield tracker
    finally:
        tracker.close()


def axis(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Of TensorBoard and wandb: where the stage begins on the axis of the whole run, and the config as text."""
    before = [one.windows for one in experiment.stages].index(stage.windows)
    return {"offset": before * experiment.config.train.steps, "about": as_text(flat(experiment.config))}


def make_onlookers(
    experiment: Experiment, metrics: Metrics, progress: Progress, outlook: Outlook, pictures: StagePictures
) -> loop.Onlookers:
    """Those of a stage's loop: learning rate, progress, pictures, progress.json."""
    config = experiment.config
    rate = learning_rate({**config.optimizer, "steps": config.train.steps}, np)  # the devices are busy

    def pictured(done: int, state: TrainState) -> None:
        picture = pictures.draw(done, averaged(state))
        stopping.alive()
        if picture is not None and pictures.due(done):
            metrics.picture(done, picture)

    return loop.Onlookers(
        beside=lambda done: {"learning_rate": float(rate(done - 1))},
        stepped=lambda done, values: progress.advance(1, f"loss {values['loss']:.4g}"),
        pictured=pictured,
        saved=lambda done: outlook.keep(),
    )
