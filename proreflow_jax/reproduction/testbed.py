"""What a grid of methods needs of the place where it is carried out: the digits, or the lab's mixture of Gaussians."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from proreflow_jax.reproduction.cell import Rows
from proreflow_jax.run.experiment import Experiment


class Testbed(NamedTuple):
    """A base model with its data and its measures, all of which are better if less."""

    open: Callable[[ConfigDict], Experiment]
    check: Callable[[Experiment], None]  # raises UserError, one line, for a config that cannot be measured
    prepare: Callable[[Experiment], Any]  # writes the data, before workers look for it
    rows: Rows  # the inputs of pairs
    instruments: Callable[[Experiment], Any]  # what all cells are measured with
    inputs: Callable[
        [Experiment, int, Any], Any
    ]  # (experiment, seed, instruments) -> what all methods of a seed are measured by
    measure: Callable[..., tuple[dict[str, Any], dict[int, Any]]]  # (experiment, params, flow, instruments, inputs)
    measures: Mapping[str, str]  # of each number of steps: key -> title
    short: Mapping[str, str]  # the same, for columns
    real: str  # the measure that compares with real data: the gate looks at it
    notes: Callable[[ConfigDict], str]  # what the measures are


def measured_steps(config: ConfigDict, windows: int) -> list[int]:
    """Numbers of steps of a row: the grid's; of the base model (no windows) also its own."""
    return sorted({*config.reproduce.steps, *(() if windows else config.evaluate.teacher_steps)})
