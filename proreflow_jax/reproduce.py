"""The paper's methods and their neighbours, trained and measured at equal compute, over budgets and seeds, as one table.

Every cell (a method at a seed and a budget) is kept when it is done, so the same command goes on where it was stopped.
Several processes may run it at once and share the cells; --workers starts them.
"""

import logging

from ml_collections import ConfigDict

from proreflow_jax import RunFailed, UserError
from proreflow_jax.run import cli
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)


def reproduce(config: ConfigDict, workers: int) -> None:
    """The verb: makes the cells that are missing and writes table.md, table.json and the figures into the run's folder."""
    from proreflow_jax.reproduction import report
    from proreflow_jax.reproduction.cells import check_grid, keyed, plan_cells, spawn, work
    from proreflow_jax.reproduction.digits import DIGITS
    from proreflow_jax.reproduction.grid_page import grid_reporter
    from proreflow_jax.reproduction.lab import LAB

    if "reproduce" not in config:
        raise UserError(
            "the config has no block `reproduce`: take --config=reproduce, or reproduce:quick, reproduce:flow or reproduce:lab"
        )
    testbed = {"digits": DIGITS, "mixture": LAB}.get(config.data.kind, DIGITS)  # which refuses other kinds
    experiment = testbed.open(config)
    check_grid(experiment, testbed, workers)
    cells, show = plan_cells(experiment), grid_reporter(experiment, testbed)
    if not (experiment.run / "cells").is_dir():  # nothing is done yet, and a lab's base model takes a minute
        paths.make_folder(experiment.run, "--config.root")
        show(cells)
    cells = keyed(cells, experiment)
    missing = [cell for cell in cells if not cell.path(".json").is_file()]
    log.info("%d of %d cells are there", len(cells) - len(missing), len(cells))
    testbed.prepare(experiment)
    show(cells)
    if workers > 1 and len(missing) > 1:
        spawn(min(workers, len(missing)))
    elif missing:
        work(experiment, testbed, missing, lambda: show(cells))
    done = [(cell, atomic.read_json(cell.path(".json"))) for cell in cells if cell.path(".json").is_file()]
    if not done:
        raise RunFailed("no cell is done: another process makes them; run the same command again when it has ended")
    text = report.write_report(experiment, testbed, [result for _, result in done], len(cells))
    show(cells)
    print(text)
    written = sorted(path.name for path in experiment.run.iterdir() if path.suffix in (".md", ".json", ".png"))
    print(f"in {experiment.run}: {', '.join(written)}")


if __name__ == "__main__":
    options = {"workers": (1, "processes that share the cells, each on its share of the cores", (1, 1024))}
    cli.start(reproduce, __doc__, "reproduce", options)
