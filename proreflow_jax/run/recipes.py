"""What a stage does, by the config: who teaches, how networks are read, how pairs are made, what is compared."""

from ml_collections import ConfigDict

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reflow.loss import LossRecipe
from proreflow_jax.reflow.pairs import PairRecipe
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.run.experiment import Experiment


def loss_recipe(config: ConfigDict) -> LossRecipe:
    """The loss as the step wants it."""
    return LossRecipe(**config.loss, dtype=config.model.dtype)


def student_flow(config: ConfigDict, stage: Stage) -> Parameterization:
    """How the student of a stage is read."""
    return Parameterization(config.student.prediction, stage.windows, config.student.path)


def _made_by_base(config: ConfigDict, stage: Stage) -> bool:
    return stage.parent is None or config.pairs.teacher == "base"


def teacher_flow(experiment: Experiment, stage: Stage) -> Parameterization:
    """How the network that makes a stage's pairs is read."""
    if _made_by_base(experiment.config, stage):
        return experiment.flow
    before = experiment.stages[[s.windows for s in experiment.stages].index(stage.windows) - 1]
    return student_flow(experiment.config, before)


def pair_recipe(experiment: Experiment, stage: Stage) -> PairRecipe:
    """How a stage's pairs are made. Teacher steps a window grow as windows merge, so the solver's step stays the same."""
    config, teacher = experiment.config, teacher_flow(experiment, stage)
    per_window = config.pairs.steps * experiment.stages[0].windows // stage.windows
    if teacher.windows:
        per_window = config.pairs.substeps * teacher.windows // stage.windows
    return PairRecipe(
        windows=stage.windows,
        start=config.pairs.start,
        steps=per_window,
        solver=config.pairs.solver,
        guidance=1.0 if teacher.windows else config.pairs.guidance,  # a student has learned it already
        dropout=config.pairs.prompt_dropout,
        latent=experiment.base.latent_shape,
        dtype=config.model.teacher_dtype,
    )


def parent_stage(experiment: Experiment, stage: Stage) -> Stage | None:
    """The stage a stage starts from; None is the base model."""
    return next((other for other in experiment.stages if other.folder == stage.parent), None)
