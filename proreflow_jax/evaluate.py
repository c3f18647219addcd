"""The numbers of a run: every student beside the base model, from the same noise and prompts, as tables, JSON and pictures."""

import logging

from ml_collections import ConfigDict

from proreflow_jax import digits_table, scores
from proreflow_jax import study as studies
from proreflow_jax.evaluation.protocols import DIGITS
from proreflow_jax.run import cli
from proreflow_jax.run.open import open_experiment

log = logging.getLogger(__name__)


def evaluate(config: ConfigDict, study: bool) -> None:
    """The verb: the digits' table, or FID and CLIP score by another protocol; with `study` also study.json and its pictures."""
    by_scores = config.evaluate.protocol != DIGITS
    if by_scores:
        scores.check(config)
    experiment = open_experiment(config)
    if not by_scores:
        digits_table.check(experiment)
    if study:
        studies.check(config)
    (scores if by_scores else digits_table).run(experiment)
    if study:
        studies.run(experiment)
        pictures = "discrepancy.png, perturbation.png, windows-N.png"
        log.info("study: %s, %s", experiment.run / studies.NUMBERS, pictures)


if __name__ == "__main__":
    options = {"study": (False, "also measure how the flows bend and what perturbed steps cost (about 5 minutes on 2 cores)")}
    cli.start(evaluate, __doc__, "configs/digits.py", options, pod=True)
