"""8 -> 4 -> 2: which stage starts from whom, who makes its pairs, and the check that the first one starts where it should."""

from collections.abc import Sequence
from typing import NamedTuple

from proreflow_jax import UserError
from proreflow_jax.flow import windows
from proreflow_jax.storage.paths import Location

DONE = "DONE.json"


class Stage(NamedTuple):
    """One stage of a run: N windows, its folder, and the folder of the stage it starts from (None: the base model)."""

    windows: int
    folder: Location
    parent: Location | None


def plan_stages(windows_of_stages: Sequence[int], run: Location) -> list[Stage]:
    """The stages in order. Raises ValueError unless every count divides 1000 and the count before it."""
    counts = list(windows_of_stages)
    if not counts:
        raise UserError("--config.stages is empty: name at least one window count, as in --config.stages='(8, 4, 2)'")
    for count in counts:
        windows.check_windows(count)
    for before, after in zip(counts, counts[1:], strict=False):
        if before <= after or before % after:
            raise UserError(
                f"--config.stages={tuple(counts)}: {after} must be a smaller divisor of {before}: windows are merged"
            )
    folders = [run / f"stage-{count}" for count in counts]
    return [Stage(*row) for row in zip(counts, folders, [None, *folders[:-1]], strict=True)]


def find_stage(stages: Sequence[Stage], count: int) -> Stage:
    """The stage of so many windows. Raises ValueError naming those there are."""
    for stage in stages:
        if stage.windows == count:
            return stage
    raise UserError(f"--stage={count} is not a stage of this config: --config.stages has {[s.windows for s in stages]}")
