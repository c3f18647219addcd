"""Who looks on while a base model is trained: its pictures, and report.html, written anew at every checkpoint."""

from pathlib import Path

from ml_collections import ConfigDict

from proreflow_jax.jobs.pretrain_facts import DIFFUSION, VAE, Standing, read_pretraining, saved_steps
from proreflow_jax.jobs.pretrain_pictures import Draw, Sheet, keeper
from proreflow_jax.jobs.run_page import reporter
from proreflow_jax.reflow import loop
from proreflow_jax.reflow.train_step import averaged
from proreflow_jax.run.stages import SAMPLES


class PretrainPage:
    """The page of a run of `pretrain`; it is there once this is made. Nothing depends on it.

    out: the folder that the job writes.
    """

    def __init__(self, config: ConfigDict, run: Path, out: str) -> None:
        parts = [DIFFUSION] if config.start else [VAE, DIFFUSION]
        steps = {name: saved_steps(run / name, config[name].steps) for name in parts}
        self._run, self._standing = run, Standing(steps, out, written=False)
        self._show = reporter(config, lambda folder, fields: read_pretraining(folder, fields, self._standing))
        self._show()

    def onlookers(self, name: str, sheet: Sheet | None, draw: Draw | None) -> loop.Onlookers:
        """Those of a training: its pictures, and the page."""
        keep = keeper(self._run / SAMPLES / name, sheet, draw)
        return loop.Onlookers(
            pictured=lambda done, state: keep(done, averaged(state)),
            saved=lambda done: self._moved(self._standing._replace(steps={**self._standing.steps, name: done})),
        )

    def written(self) -> None:
        """The model is written."""
        self._moved(self._standing._replace(written=True))

    def _moved(self, standing: Standing) -> None:
        self._standing = standing
        self._show()
