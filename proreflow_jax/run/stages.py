"""The stages 8 -> 4 -> 2 as values: where the config becomes recipes, teachers and keys; and what a finished stage hands on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.flow import windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reflow.loss import LossRecipe
from proreflow_jax.reflow.pairs import PairRecipe, check_pair_steps
from proreflow_jax.runtime.damage import Damaged
from proreflow_jax.runtime.processes import first, first_reads
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location
from proreflow_jax.storage.sealed import is_sealed, with_seal

DONE = "DONE.json"
SAMPLES = "samples"  # folder of pictures, of a run and of a stage
PAIR_KEY, TRAIN_KEY, EVALUATION_KEY, PICTURE_KEY = 1, 2, 3, 4  # folded into the run's key, then the stage's windows
READ_AS = {"prediction": "--config.student.prediction", "windows": "--config.stages", "path": "--config.student.path"}


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

    def picture(self, step: int) -> Location:
        """Where the picture of a step lies: base model and student side by side, where the config asks for pictures."""
        return self.folder / SAMPLES / f"step-{step:08d}.png"


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


def run_key(config: ConfigDict, purpose: int, windows: int) -> jax.Array:
    """The one key of a job, from the run's seed, what it is for, and the stage."""
    return jax.random.fold_in(jax.random.fold_in(seed_key(config.seed), purpose), windows)


def loss_recipe(config: ConfigDict) -> LossRecipe:
    """The loss as the step wants it."""
    return LossRecipe(**config.loss, dtype=config.model.dtype)


def stage_folder(run: Location, count: int) -> Location:
    """The folder of a stage of so many windows."""
    return run / f"stage-{count}"


def plan_stages(config: ConfigDict, run: Location, base: Parameterization, latent: tuple[int, int, int]) -> list[Stage]:
    """The stages of a run in order; their counts are those that `check_counts` lets pass.

    Args:
      run: the run's folder.
      base: how the base model is parameterized.
      latent: (h, w, c) of one image's latents.

    Raises UserError, one line, if a teacher cannot cross the windows in the steps that the config asks for.
    """
    stages: list[Stage] = []
    for count in config.stages:
        parent = stages[-1] if stages else None
        maker = None if config.pairs.teacher == "base" else parent
        teacher = maker.student if maker else base
        stage = Stage(
            windows=count,
            folder=stage_folder(run, count),
            parent=parent,
            maker=maker,
            online=config.pairs.mode == "online",
            student=Parameterization(config.student.prediction, count, config.student.path),
            teacher=teacher,
            pairs=_pair_recipe(config, count, teacher, latent),
            loss=loss_recipe(config),
            pair_key=run_key(config, PAIR_KEY, count),
            train_key=run_key(config, TRAIN_KEY, count),
        )
        check_pair_steps(stage.pairs, teacher)
        stages.append(stage)
    return stages


def _pair_recipe(config: ConfigDict, count: int, teacher: Parameterization, latent: tuple[int, int, int]) -> PairRecipe:
    """How the pairs of `count` windows are made. Steps a window grow as windows merge, so the solver's step stays the same."""
    if teacher.windows:
        steps = config.pairs.substeps * teacher.windows // count
    else:
        steps = config.pairs.steps * config.stages[0] // count
    return PairRecipe(
        windows=count,
        start=config.pairs.start,
        steps=steps,
        solver=config.pairs.solver,
        guidance=1.0 if teacher.windows else config.pairs.guidance,  # a student has learned it already
        dropout=config.pairs.prompt_dropout,
        latent=latent,
        dtype=config.model.teacher_dtype,
    )


def seed_key(seed: int) -> Key[Array, ""]:
    """The key that jax makes of a seed in 0 .. ranges.LARGEST where it computes in 64 bits; below 2**32 everywhere the same."""
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))


def fold_seed(key: Key[Array, ""], seed: int) -> Key[Array, ""]:
    """Both words of a seed folded into a key; below 2**32 as `jax.random.fold_in` does."""
    high, low = divmod(seed, 2**32)
    folded = jax.random.fold_in(key, np.uint32(low))
    return jax.random.fold_in(folded, np.uint32(high)) if high else folded


class Done(NamedTuple):
    """A finished stage."""

    step: int  # of the checkpoint with the weights
    digest: str  # of the weights that are handed on
    parent: str  # digest of the weights that the stage started from
    flow: Parameterization
    guidance: dict[str, Any]  # `experiment.guidance_contract`


def write_done(stage: Stage, done: Done) -> None:
    """Writes the record; process 0 for all."""
    record = with_seal(atomic.plain_json(done._asdict() | {"flow": done.flow._asdict()}))
    first(lambda: atomic.write_json(stage.done, record))


def read_done(stage: Stage) -> Done:
    """The record of a finished stage, as process 0 reads it.

    Raises MissingFile if the stage is not done, Damaged if the record is not as it was written, UserError if it is of a
    student that is read in another way than the config says.
    """
    record, kind, fault = first_reads(lambda: _record(stage))  # a value, so that all processes raise the same
    if fault:
        raise {"missing": MissingFile, "damaged": Damaged}[kind](fault)
    done = Done(**{name: record[name] for name in Done._fields})._replace(flow=Parameterization(**record["flow"]))
    for name, flag in READ_AS.items():
        there, here = getattr(done.flow, name), getattr(stage.student, name)
        if there != here:
            raise UserError(f"{stage.done} is of a student with {name} {there}, this config says {here}: change {flag}")
    return done


def _record(stage: Stage) -> tuple[dict[str, Any], str, str]:
    """(record, "", ""), or ({}, kind of fault, the line)."""
    job = f"distill, or train --stage={stage.windows}"
    try:
        record, reason = atomic.read_json(stage.done), "not as it was written"
    except MissingFile:
        return {}, "missing", f"{stage.done} is missing: run {job}"
    except UserError as error:
        record, reason = {}, str(error).removesuffix(f": {atomic.MEND}")
    if is_sealed(record):
        return record, "", ""
    return {}, "damaged", f"{stage.done} is damaged ({reason}): {job}, writes it again from the checkpoint"
