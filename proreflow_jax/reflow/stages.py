"""8 -> 4 -> 2: what a stage is. Who hands it its weights, who makes its pairs, how both are parameterized, what is compared."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from proreflow_jax import UserError
from proreflow_jax.flow import windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reflow.loss import LossRecipe
from proreflow_jax.reflow.pairs import PairRecipe
from proreflow_jax.storage.paths import Location

DONE = "DONE.json"


class Stage(NamedTuple):
    """One stage of a run, built once when the run is opened."""

    windows: int  # N
    folder: Location
    parent: "Stage | None"  # whose weights it starts from; None: the base model
    maker: "Stage | None"  # whose weights make its pairs; None: the base model
    online: bool  # pairs are made inside the train step; else they are stored as records
    student: Parameterization
    teacher: Parameterization  # of the maker
    pairs: PairRecipe
    loss: LossRecipe
    pair_key: jax.Array  # of noise, dropped prompts and windows of the pairs
    train_key: jax.Array  # of times and of the pairs' choice

    @property
    def done(self) -> Location:
        """The file that says the stage is finished, and names its weights."""
        return self.folder / DONE


def check_counts(counts: Sequence[int]) -> None:
    """Raises UserError unless every count of windows divides 1000 and the count before it."""
    if not counts:
        raise UserError("--config.stages is empty: name at least one window count, as in --config.stages='(8, 4, 2)'")
    for count in counts:
        windows.check_windows(count)
    for before, after in zip(counts, counts[1:], strict=False):
        if before <= after or before % after:
            raise UserError(
                f"--config.stages={tuple(counts)}: {after} must be a smaller divisor of {before}: windows are merged"
            )


def find_stage(stages: Sequence[Stage], count: int) -> Stage:
    """The stage of so many windows. Raises UserError naming those there are."""
    for stage in stages:
        if stage.windows == count:
            return stage
    raise UserError(f"--stage={count} is not a stage of this config: --config.stages has {[s.windows for s in stages]}")
