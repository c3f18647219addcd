"""Fields of a config by dotted names, and its checks before a model is read or a byte is written. Errors are one line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import kinds, record_plan
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import JUMPS, OF_FLOWS, check_prediction
from proreflow_jax.models.attention_kernels import FORMS
from proreflow_jax.models.layers import POLICIES
from proreflow_jax.reflow import train_step
from proreflow_jax.reflow.pairs import STARTS
from proreflow_jax.run.ranges import check_ranges
from proreflow_jax.runtime import mesh, metrics

DTYPES = ("float32", "bfloat16")
STORAGE = ("float32", "float16", "bfloat16")
MODES, TEACHERS = ("stored", "online"), ("previous", "base")
SPLIT, WHOLE = PLACES = ("split", "whole")
RULES = {"replicated": PartitionSpec(), "fsdp": mesh.FSDP, "column": mesh.COLUMN, "row": mesh.ROW}
CHOICES = {
    "model.dtype": DTYPES,
    "model.teacher_dtype": DTYPES,
    "model.sampling_dtype": DTYPES,
    "model.attention": FORMS,
    "train.remat": tuple(POLICIES),
    "pairs.mode": MODES,
    "pairs.start": STARTS,
    "pairs.teacher": TEACHERS,
    "pairs.solver": tuple(solvers.SOLVERS),
    "pairs.storage": STORAGE,
    "cache.storage": STORAGE,
    "data.kind": kinds.KINDS,
    "mesh.teacher": PLACES,
}
MANY_STARTS = 0.5  # loss.window_start_prob from which single steps of a student make good pairs (docs/reproduce.md)
Change = dict[str, Any]  # {field: value}, as --config.field=value


def check_config(config: ConfigDict, machine: Mesh) -> None:
    """Raises ValueError for a value that no job can carry out on this mesh, whatever the base model is."""
    for field in ("stages", "export.stages", "evaluate.teacher_steps"):
        _check_counts(field, field_value(config, field))
    for field, known in CHOICES.items():
        check_choice(field_value(config, field), known, f"--config.{field}")
    check_ranges(config)
    if not 0 <= config.train.ema < 1:
        raise UserError(f"--config.train.ema={config.train.ema} must be in [0, 1), 0 turns it off")
    check_prediction(config.student.prediction, config.student.path)
    metrics.check_traced_steps(config.profile.steps)
    _check_texts("samples.prompts", config.samples.prompts)
    _check_table("mesh.rules", config.mesh.rules, tuple(RULES))
    _check_table("optimizer.decay_rules", config.optimizer.decay_rules, (True, False))
    train_step.make_optimizer({**config.optimizer, "steps": config.train.steps})
    mesh.check_batch(config.train.batch, config.train.accumulation, machine)
    _check_pairs(config, machine)


def few_starts(config: ConfigDict) -> str:
    """One line of warning, or "": a student that makes pairs in single steps was not taught where these steps begin.

    An Euler step across a window reads the velocity at the window's start and nowhere else.
    """
    p, prob = config.pairs, config.loss.window_start_prob
    if p.teacher == "base" or p.substeps > 1 or len(config.stages) < 2 or prob >= MANY_STARTS:
        return ""
    return (
        f"--config.pairs.substeps=1 reads students at window starts alone, and --config.loss.window_start_prob={prob} seldom "
        "teaches them there, so pairs of later stages are bad: set it to 1, or --config.pairs.substeps=4"
    )


def few_times(config: ConfigDict, count: int, steps: int) -> str:
    """One line of warning, or "": a sampler of `steps` steps asks a student of `count` windows at times it was not taught at.

    Taught at starts alone (loss.window_start_prob=1), it knows the times of as many steps as windows, and of loss.start_steps.
    """
    known = sorted({count, max(count, config.loss.start_steps)})
    times = lambda n: {*windows.sampling_nodes(n, count).tolist()}
    if config.loss.window_start_prob < 1 or times(steps) <= set().union(*map(times, known)):
        return ""
    return (
        f"--steps={steps} asks the {count}-window student between the times that --config.loss.window_start_prob=1 taught it: "
        f"--steps={' or '.join(map(str, known))} draws better, or train with a smaller probability"
    )


def check_export(config: ConfigDict, rectified: bool = False) -> None:
    """Raises ValueError if a stage shall be exported that no stock scheduler reads; rectified: of a rectified flow."""
    if not rectified and config.student.prediction not in JUMPS:
        raise UserError(
            f"--config.student.prediction={config.student.prediction}: no stock scheduler reads this student; train with "
            f"{' or '.join(JUMPS)}, or export nothing by --config.export.stages='()' and later by export --scheduler=windowed"
        )


def check_data_resolution(config: ConfigDict, side: int) -> None:
    """Raises ValueError, one line, if images would not have the pixels a side that the base model works at."""
    if config.data.resolution != side:
        what = f"--config.data.resolution={config.data.resolution}"
        raise UserError(f"{what} must be {side}, the pixels a side of {config.model.path}")


def check_student(config: ConfigDict, kind: str) -> None:
    """Raises ValueError if the student would be read as another type of diffusion model than its base is (`kind`)."""
    fits = next((prediction for prediction, trained in JUMPS.items() if trained == kind), "velocity")
    if kind in OF_FLOWS and config.student.prediction != fits:
        raise UserError(
            f"--config.student.prediction={config.student.prediction}: the base model is a rectified flow, whose students "
            f"predict velocity alone: take --config.student.prediction={fits}"
        )
    if JUMPS.get(config.student.prediction, kind) != kind:
        raise UserError(
            f"--config.student.prediction={config.student.prediction}: the base model predicts {kind}, its weights would "
            f"have to relearn their output; take --config.student.prediction={fits}, or, if its scheduler_config.json does "
            "not say rightly what it predicts, name it by --config.model.prediction_type"
        )


def check_choice(value: Any, known: Sequence[str], what: str) -> None:
    """Raises ValueError unless the value is one of the known; `what` is the flag, or where the value stands."""
    if value not in known:
        raise UserError(f"{what}={value!r} must be one of {', '.join(known)}")


def _check_counts(field: str, values: Any) -> None:
    if not isinstance(values, tuple) or any(type(value) is not int for value in values):
        raise UserError(f"--config.{field}={values!r} must be whole numbers, for example --config.{field}='(4, 2)'")


def _check_texts(field: str, values: Any) -> None:
    if not isinstance(values, tuple) or any(not isinstance(value, str) for value in values):
        raise UserError(f"""--config.{field}={values!r} must be texts, for example --config.{field}="('a cat', 'a dog')\"""")


def _check_table(field: str, rows: Any, known: Sequence[Any]) -> None:
    """An ordered (regex, value) table whose values are among the known."""
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
            raise UserError(f"--config.{field}: {row!r} must be a pair (regex, value)")
        if row[1] not in known:
            raise UserError(f"--config.{field}: {row[1]!r} in {row!r} must be one of {', '.join(map(str, known))}")
        try:
            re.compile(row[0])
        except re.error as error:
            raise UserError(f"--config.{field}: {row[0]!r} is no regular expression ({error})") from None


def _check_pairs(config: ConfigDict, machine: Mesh) -> None:
    p, ways = config.pairs, mesh.ways(machine)
    plan = {"examples": p.examples, "shard_size": p.shard_size}
    record_plan.shard_count(plan)
    if p.mode == "stored":
        record_plan.check_groups(plan, config.train.batch, config.train.groups, "--config.train.groups")
    if p.batch < 1 or (p.shard_size % p.batch and p.batch % p.shard_size) or p.batch % ways:
        raise UserError(
            f"--config.pairs.batch={p.batch} must divide --config.pairs.shard_size={p.shard_size} or be a multiple of it, "
            f"and be a multiple of {ways} devices (data x fsdp)"
        )
    if p.start == "data" and config.data.kind in kinds.WITHOUT_IMAGES:
        raise UserError("--config.pairs.start=data needs images, --config.data.kind=prompts has none: use pairs.start=noise")


def changed(config: ConfigDict, change: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values, locked."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(dict(change))
    return copy.lock()


def flags(change: Mapping[str, Any]) -> str:
    """The change as one writes it on the command line."""
    return " ".join(f"--config.{field}={value}" for field, value in change.items())


def has_field(config: ConfigDict, field: str) -> bool:
    """Whether the config has a field of this dotted name."""
    for name in field.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def flat(config: ConfigDict, block: str = "") -> dict[str, Any]:
    """{dotted name: value} of every field."""
    fields = {}
    for name, value in config.items():
        dotted = f"{block}.{name}" if block else name
        fields |= flat(value, dotted) if isinstance(value, ConfigDict) else {dotted: value}
    return fields


def field_value(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted name, as in --config.train.batch."""
    for name in field.split("."):
        config = config[name]
    return config
