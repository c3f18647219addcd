"""DONE.json: what a finished stage hands on. Sealed as a checkpoint's record is; every reader compares it with the config."""

from typing import Any, NamedTuple

from proreflow_jax import MissingFile, UserError
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.run.stages import Stage
from proreflow_jax.runtime.damage import Damaged
from proreflow_jax.runtime.digest import is_sealed, sealed
from proreflow_jax.runtime.processes import first, first_reads
from proreflow_jax.storage import atomic

FLAGS = {"prediction": "--config.student.prediction", "windows": "--config.stages", "path": "--config.student.path"}


class Done(NamedTuple):
    """A finished stage."""

    step: int  # of the checkpoint with the weights
    digest: str  # of the weights that are handed on
    parent: str  # digest of the weights that the stage started from
    flow: Parameterization
    guidance: dict[str, Any]  # `experiment.guidance_contract`


def write_done(stage: Stage, done: Done) -> None:
    """Writes the record; process 0 for all."""
    record = sealed(atomic.plain_json(done._asdict() | {"flow": done.flow._asdict()}))
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
    for name, flag in FLAGS.items():
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
        record, reason = {}, str(error).partition(": delete")[0]
    if is_sealed(record):
        return record, "", ""
    return {}, "damaged", f"{stage.done} is damaged ({reason}): {job}, writes it again from the checkpoint"
