"""Where weights come from: the base model or a finished stage, their digests, and what a stage may not change under way."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import kinds
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reflow.stages import DONE, Stage
from proreflow_jax.reflow.train_step import averaged
from proreflow_jax.run import dataset
from proreflow_jax.run.experiment import Experiment, Weights
from proreflow_jax.run.train_state import state_target, whole_weights
from proreflow_jax.runtime.checkpoint import Checkpoints, digest, fold
from proreflow_jax.storage import atomic


def guidance_contract(config: ConfigDict) -> dict[str, Any]:
    """What a student learned of classifier-free guidance; kept with its checkpoints, in DONE.json and with every export.

    teacher: scale of the base model as the teacher; other than 1 it is part of the student from the first stage on.
    prompt_dropout: share of examples with the empty prompt, for teacher and student alike.
    unconditional: whether the student was trained on the empty prompt, the second branch of guidance.
    recommended: lowest and highest scale to draw with, reasoned (`why`), not measured.
    """
    scale, dropped = config.pairs.guidance, config.pairs.prompt_dropout
    recommended, why = [1.0, 7.0], "both branches were trained; the paper sweeps 2 to 7"
    if not dropped:
        recommended, why = [1.0, 1.0], "it never saw the empty prompt"
    elif scale != 1:
        recommended, why = [1.0, 2.5], "the teacher's guidance is in it: more is guidance twice"
    branch = "shared" if dropped else "untrained"
    return dict(teacher=scale, prompt_dropout=dropped, unconditional=branch, recommended=recommended, why=why)


FREE = (  # fields that a resumed stage may change
    "model.path", "model.revision", "model.like", "model.attention", "train.remat", "train.log_every", *kinds.UNCOUNTED,
)  # fmt: skip


def base_weights(experiment: Experiment) -> Weights:
    """The base model's UNet."""
    params = experiment.base.params["unet"]
    return Weights(params, experiment.flow, fold(digest(params)))


def load_weights(experiment: Experiment, stage: Stage | None) -> Weights:
    """The finished student of a stage (its average where there is one), or the base model for None.

    Raises FileNotFoundError if the stage is not done, ValueError if its weights are not those its DONE.json names.
    """
    if stage is None:
        return base_weights(experiment)
    if not (stage.folder / DONE).is_file():
        raise MissingFile(f"{stage.folder / DONE} is missing: run distill, or train --stage={stage.windows}")
    done = atomic.read_json(stage.folder / DONE)
    with Checkpoints(stage.folder / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(done["step"], state_target(experiment)).state
    trained = averaged(state)
    found = fold(digest(trained))
    if found != done["digest"]:
        raise UserError(f"{stage.folder}: the weights are not those of {DONE}: remove the folder and run the stage again")
    if not experiment.config.student.lora.rank:
        return Weights(trained, Parameterization(**done["flow"]), found)
    add = partial(whole_weights, config=experiment.config)
    params = jax.jit(add)(trained, experiment.base.params["unet"])
    return Weights(params, Parameterization(**done["flow"]), found, trained)


def stage_plan(experiment: Experiment, stage: Stage, parent: str, blocks: Sequence[str]) -> dict[str, Any]:
    """What may not change while a stage is under way: the named blocks of the config, flat, and the parent's digest.

    Left out is what changes no result: where the base model lies (its digest is the first parent) and how often is logged.
    """
    config = experiment.config
    plan: dict[str, Any] = {"examples": config.pairs.examples, "shard_size": config.pairs.shard_size, "windows": stage.windows}
    for block in blocks:
        plan |= {f"{block}.{name}": _plain(value) for name, value in config[block].items()}
    plan |= kinds.data_identity(dataset.here(config.data))
    return {name: value for name, value in plan.items() if name not in FREE} | {"seed": config.seed, "parent": parent}


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON gives back."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping | ConfigDict) else value
