"""The protocol of a score run with the config's own numbers, and the checks that need no model."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import coco
from proreflow_jax.evaluation import clip_score, protocols
from proreflow_jax.evaluation.protocols import Protocol
from proreflow_jax.run.ranges import check_seeds
from proreflow_jax.runtime.processes import check_alone
from proreflow_jax.storage import paths

INCEPTION = "--config.evaluate.inception"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
CONVERT = (
    """python -c "from torch import load; from safetensors.torch import save_file; """
    """save_file(load('{path}', weights_only=True), 'inception.safetensors')\""""
)


class Plan(NamedTuple):
    """The protocol, and what the config makes of its numbers."""

    protocol: Protocol
    count: int
    guidance: float
    seeds: tuple[int, ...]


def check_scores(config: ConfigDict) -> None:
    """Raises ValueError or FileNotFoundError, one line, for what cannot be measured; reads no model."""
    e, plan = config.evaluate, make_plan(config)
    if plan.protocol.choice not in coco.CHOICES:
        raise UserError(f"--config.evaluate.protocol={plan.protocol.name} has a table of its own, no FID of COCO")
    check_plan(config, plan, least=2)
    check_alone(f"evaluate with --config.evaluate.protocol={plan.protocol.name}")
    _check_file(e.inception)
    for name in ("images", "captions"):
        paths.parse_local(e[name], f"--config.evaluate.{name}")
    if e.clip and not _local(e.clip, clip_score.FLAG).is_dir():
        raise MissingFile(f"{e.clip} is not a folder: {clip_score.FLAG} must name that of a CLIPModel")
    if coco.is_tfds(e.images):
        coco.check_tfds(Path(e.images).expanduser(), plan.protocol.year)
    else:
        _check_count(plan, e.examples, coco.open_split(e.captions, e.images, plan.protocol.year))


def check_plan(config: ConfigDict, plan: Plan, least: int) -> None:
    """Raises ValueError, one line, for numbers of the config that cannot be measured; at least so many images are needed."""
    e = config.evaluate
    if plan.count < least:
        raise UserError(f"--config.evaluate.examples={e.examples} must be at least {least}, or 0: as the protocol says")
    if plan.guidance < 0:
        raise UserError(f"--config.evaluate.guidance={e.guidance} must not be negative; 0: as the protocol says")
    check_seeds(plan.seeds, "--config.evaluate.seeds")


def _local(path: str, flag: str) -> Path:
    return paths.local_copy(paths.parse_path(path, flag), flag).expanduser()


def _check_file(path: str) -> None:
    if not path:
        raise UserError("--config.evaluate.inception is empty: name the FID network's .safetensors file (see docs/scores.md)")
    if Path(path).suffix in PICKLES:
        raise UserError(
            f"--config.evaluate.inception={path} is a pickle, which may run code and is never opened here: convert it where "
            f"you trust it, {CONVERT.format(path=path)}, and name inception.safetensors"
        )
    if not _local(path, INCEPTION).is_file():
        raise MissingFile(f"{path} is not a file: --config.evaluate.inception must name the FID network's .safetensors")


def _check_count(plan: Plan, examples: int, split: coco.Split) -> None:
    """The whole reference, unless the config asks for a count of its own."""
    if not examples and len(split.images) != plan.protocol.real:
        raise UserError(
            f"--config.evaluate.captions names {len(split.images):,} images, {plan.protocol.name} rests on "
            f"{plan.protocol.real:,}: give the official file, or say by --config.evaluate.examples that you depart from it"
        )
    coco.CHOICES[plan.protocol.choice](split, plan.count)


def make_plan(config: ConfigDict) -> Plan:
    """The protocol with the config's own count, guidance and seeds where it names them. Raises ValueError for its name."""
    e, protocol = config.evaluate, protocols.find_protocol(config.evaluate.protocol)
    seeds = tuple(e.seeds) or protocol.seeds
    return Plan(protocol, e.examples or protocol.count, float(e.guidance or protocol.guidance), seeds)
