"""The numbers of a run: every student beside the base model, from the same noise and prompts, as tables, JSON and pictures."""

from ml_collections import ConfigDict

from proreflow_jax.run import cli


def evaluate(config: ConfigDict, study: bool) -> None:
    """The verb: the table of the digits or the emoji, or FID and CLIP score; with `study` also study.json, on the page too."""
    from proreflow_jax.evaluation.protocols import DIGITS, EMOJI
    from proreflow_jax.jobs.score_coco import score_coco
    from proreflow_jax.jobs.score_digits import check_digits, score_digits
    from proreflow_jax.jobs.score_emoji import check_emoji, score_emoji
    from proreflow_jax.jobs.score_plan import check_scores
    from proreflow_jax.jobs.study_flow import NUMBERS, check_study, study_flow
    from proreflow_jax.run.open import open_experiment
    from proreflow_jax.runtime.processes import leads
    from proreflow_jax.runtime.stopping import watching

    protocol = config.evaluate.protocol
    if protocol in EMOJI:
        check_emoji(config)
    elif protocol != DIGITS:
        check_scores(config)
    experiment = open_experiment(config)
    if protocol == DIGITS:
        check_digits(experiment)
    if study:
        check_study(config)
    with watching(config.watchdog):
        if protocol in EMOJI:
            lines = score_emoji(experiment)
        elif protocol == DIGITS:
            lines = score_digits(experiment)
        else:
            lines = [f"{row['method']}: {row['statement']}" for row in score_coco(experiment)]
            lines.append(f"table: {experiment.run / 'scores.md'}   page: {experiment.run / 'report.html'}")
        if leads():
            print("\n".join(lines), flush=True)
        if study:
            study_flow(experiment)
            print(f"study: {experiment.run / NUMBERS}, discrepancy.png, perturbation.png, windows-N.png, report.html")


if __name__ == "__main__":
    options = {"study": (False, "also measure how the flows bend and what perturbed steps cost (about 5 minutes on 2 cores)")}
    cli.start(evaluate, __doc__, "emoji", options, pod=True)
