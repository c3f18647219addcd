"""The page of a grid, written anew from its cells' files by whichever process has finished one: the last writer wins."""

from collections.abc import Callable, Sequence

from proreflow_jax.jobs.run_page import reporter
from proreflow_jax.reproduction.cells import Cell
from proreflow_jax.reproduction.grid_facts import Grid, read_grid
from proreflow_jax.reproduction.testbed import Testbed
from proreflow_jax.run.experiment import Experiment


def grid_reporter(experiment: Experiment, testbed: Testbed) -> Callable[[Sequence[Cell]], None]:
    """A function that writes the page of cells; a failure is one line of warning."""
    cells: list[Cell] = []
    write = reporter(experiment.config, lambda folder, fields: read_grid(folder, fields, Grid(experiment, testbed, cells)))

    def show(now: Sequence[Cell]) -> None:
        cells[:] = now
        write()

    return show
