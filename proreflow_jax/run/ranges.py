"""The range of every number that a user may name. Reads no jax: a wrong number is refused before it is imported."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError

LARGEST = 2**64 - 1  # seed, of those that UIs give
Range = tuple[float, float]  # lowest and highest value; both are allowed
COUNT = 2**31 - 1  # steps and examples are 32-bit numbers on the devices
ROWS = 2**16  # of a batch; more would only fill the memory
ELSEWHERE = None  # checked by a rule of its own, whose line says more
RANGES: tuple[tuple[str, Range | None], ...] = (  # ordered (regex of the whole dotted name, range); of tuples: of each number
    (r"stages|export\.stages|profile\.steps|mesh\..*|samples\.prompts", ELSEWHERE),
    (r"samples\.(steps|teacher_steps)", (0, 1000)),
    (r"samples\.count", (1, 256)),
    (r"samples\.(rows|columns)", (0, 16)),
    (r"seed|(evaluate|reproduce)\.seeds", (0, LARGEST)),
    (r"(.*\.)?batch|train\.(accumulation|groups)", (1, ROWS)),
    (r"pairs\.(steps|substeps)|(evaluate|reproduce)\.(\w+_)?steps|evaluate\.study\.(perturbed_)?steps", (1, 1000)),
    (r"(.*\.)?(steps|shard_size|log_every|checkpoint_every|checkpoint\.\w+)|pairs\.examples", (1, COUNT)),
    (r"evaluate\.examples", (0, COUNT)),
    (r"evaluate\.study\.(examples|seeds)|evaluate\.columns|evaluate\.gate\.guidance_examples", (1, ROWS)),
    (r"evaluate\.gate\.(guidance|shipped|showcase)_steps", (1, 1000)),
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
    (r"flow\.(shift|logit_std)", (1e-3, 1e3)),
    (r"flow\.logit_mean", (-1e2, 1e2)),
    (r"transformer\.dual_attention_layers", (0, ROWS)),
    (r"(vae|unet|transformer|text|text_2|lab)\.(?!\w+_types)\w+", (1, ROWS)),
)


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


def check_seeds(seeds: Sequence[Any], flag: str) -> None:
    """Raises UserError, one line, unless seeds are different whole numbers from 0 to LARGEST."""
    if any(type(seed) is not int or not 0 <= seed <= LARGEST for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{flag}={tuple(seeds)} must be different whole numbers from 0 to {LARGEST}, as in '(0, 1, 2)'")


def check_range(value: Any, bounds: Range, flag: str) -> None:
    """Raises UserError, one line, unless a number, or every number of a tuple, lies in its range."""
    low, high = bounds
    between = ", ".join(str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in bounds)
    for number in _leaves(value):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(f"{flag}={value!r} must be a number, in [{between}]")
        if not low <= number <= high:
            raise UserError(f"{flag}={value} must be in [{between}]")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
