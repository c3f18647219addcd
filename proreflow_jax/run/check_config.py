"""Fields of a config by dotted names, and its checks before a model is read or a byte is written. Errors are one line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import kinds, record_plan
from proreflow_jax.flow import solvers
from proreflow_jax.flow.parameterization import JUMPS, check_prediction
from proreflow_jax.models.attention_kernels import FORMS
from proreflow_jax.models.layers import POLICIES
from proreflow_jax.reflow import train_step
from proreflow_jax.reflow.pairs import STARTS
from proreflow_jax.run.stages import LARGEST
from proreflow_jax.runtime import mesh, metrics

DTYPES = ("float32", "bfloat16")
STORAGE = ("float32", "float16", "bfloat16")
MODES, TEACHERS = ("stored", "online"), ("previous", "base")
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
}
Range = tuple[float, float]  # lowest and highest value; both are allowed
COUNT = 2**31 - 1  # steps and examples are 32-bit numbers on the devices
ROWS = 2**16  # of a batch; more would only fill the memory
ELSEWHERE = None  # checked by a rule of its own, whose line says more
RANGES: tuple[tuple[str, Range | None], ...] = (  # ordered (regex of the whole dotted name, range); of tuples: of each number
    (r"stages|export\.stages|profile\.steps|mesh\..*", ELSEWHERE),
    (r"samples\.(steps|teacher_steps)", (0, 1000)),
    (r"samples\.count", (1, 256)),
    (r"seed|(evaluate|reproduce)\.seeds", (0, LARGEST)),
    (r"(.*\.)?batch|train\.accumulation", (1, ROWS)),
    (r"pairs\.(steps|substeps)|(evaluate|reproduce)\.(\w+_)?steps|evaluate\.study\.(perturbed_)?steps", (1, 1000)),
    (r"(.*\.)?(steps|shard_size|log_every|checkpoint_every|checkpoint\.\w+)|pairs\.examples", (1, COUNT)),
    (r"evaluate\.examples", (0, COUNT)),
    (r"evaluate\.study\.(examples|seeds)|evaluate\.columns|evaluate\.gate\.guidance_examples", (1, ROWS)),
    (r"evaluate\.gate\.guidance_steps", (1, 1000)),
    (r"evaluate\.study\.sizes", (0, 100)),
    (r"(.*\.)?(prompt_dropout|max_bad|window_start_prob|pair_share|ema)", (0, 1)),
    (r"(.*[._])?guidance", (0, 1000)),
    (r"data\.(resolution|threads)", (1, 2**14)),
    (r"watchdog", (0, COUNT)),
    (r"data\.shift", (0, 64)),
    (r"conditioning\.\w+", (0, ROWS)),
    (r"student\.lora\.rank", (0, 2**15)),
    (r"loss\.start_steps", (0, 1000)),
    (r"model\.clip_skip", (0, 1000)),
    (r"loss\.\w+|student\.lora\.alpha|vae\.kl_weight|diffusion\.most_snr", (0, 1e6)),
    (r"(.*\.)?optimizer\.learning_rate", (0, 10)),
    (r"(.*\.)?optimizer\.(beta1|beta2)", (0, 1)),
    (r"(.*\.)?optimizer\.epsilon", (1e-30, 1)),
    (r"(.*\.)?optimizer\.warmup_steps", (0, COUNT)),
    (r"(.*\.)?optimizer\.weight_decay", (0, 10)),
    (r"(.*\.)?optimizer\.clip_norm", (0, 1e6)),
    (r"reproduce\.(forwards|budgets)", (1, 2**63 - 1)),
    (r"reproduce\.chunk", (1, COUNT)),
    (r"lab\.\w*seed", (0, LARGEST)),
    (r"(.*\.)?schedule\.beta_\w+", (0, 1)),
    (r"text\.merges", (0, 2**20)),
    (r"(vae|unet|text|lab)\.(?!\w+_types)\w+", (1, ROWS)),
)
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


def field_range(field: str) -> Range | None:
    """The range of a field by its dotted name; None if it has none, or a rule of its own."""
    return next((value for pattern, value in RANGES if re.fullmatch(pattern, field)), None)


def check_ranges(config: ConfigDict, block: str = "") -> None:
    """Raises UserError for the first number of a config that is out of its range, or no number; text and switches pass."""
    for name, value in config.items():
        field = f"{block}.{name}" if block else name
        if isinstance(value, ConfigDict):
            check_ranges(value, field)
        elif not isinstance(value, str | bool) and (bounds := field_range(field)):
            check_range(value, bounds, f"--config.{field}")


def check_range(value: Any, bounds: Range, flag: str) -> None:
    """Raises UserError, one line, unless a number, or every number of a tuple, lies in its range."""
    low, high = bounds
    between = ", ".join(str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in bounds)
    for number in _leaves(value):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(f"{flag}={value!r} must be a number, in [{between}]")
        if not low <= number <= high:
            raise UserError(f"{flag}={value} must be in [{between}]")


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


def check_export(config: ConfigDict) -> None:
    """Raises ValueError if a stage shall be exported that no stock scheduler reads."""
    if config.student.prediction not in JUMPS:
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


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


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
    record_plan.shard_count({"examples": p.examples, "shard_size": p.shard_size})
    if p.batch < 1 or p.shard_size % p.batch or p.batch % ways:
        raise UserError(
            f"--config.pairs.batch={p.batch} must divide --config.pairs.shard_size={p.shard_size} and be a multiple "
            f"of {ways} devices (data x fsdp)"
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
