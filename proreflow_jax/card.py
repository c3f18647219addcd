"""What an export says of itself: reflow.json for programs, README.md for people."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from proreflow_jax.checks import field_value
from proreflow_jax.experiment import Experiment, Weights
from proreflow_jax.reflow.stages import Stage

CARD, PAGE = "reflow.json", "README.md"
OPEN = (  # what the paper does not fix and the config therefore decides
    "student.prediction", "pairs.solver", "pairs.steps", "pairs.substeps", "pairs.start", "pairs.teacher", "pairs.examples",
    "loss.space", "loss.alpha", "loss.window_start_prob", "train.steps", "train.batch", "train.ema", "optimizer.learning_rate",
    "optimizer.schedule", "seed",
)  # fmt: skip


class Format(NamedTuple):
    """What an export looks like; the defaults are those of the verb."""

    form: str = "diffusers"
    dtype: str = "float32"  # of the tensors written
    rank: int = 64  # of a LoRA
    scheduler: str = "stock"


def make_card(experiment: Experiment, stage: Stage, student: Weights, wanted: Format) -> dict[str, Any]:
    """reflow.json: enough to know what the weights are, how they are read, and what they were trained to do."""
    config = experiment.config
    guidance = {  # what the student learned of classifier-free guidance
        "teacher": config.pairs.guidance,  # scale of the teacher of the pairs; other than 1 it is part of the student now
        "prompt_dropout": config.pairs.prompt_dropout,  # share of examples with the empty prompt, teacher and student alike
        "inference": 1.0,  # the scale that the export is checked at
    }
    return {
        "format": wanted._asdict(),
        "windows": stage.windows,
        "stages": [other.windows for other in experiment.stages if other.windows >= stage.windows],
        "digest": student.digest,
        "flow": student.flow._asdict(),
        "guidance": guidance,
        "settings": {field: field_value(config, field) for field in OPEN},
        "base": str(experiment.base.folder),
    }


def page(card: Mapping[str, Any]) -> str:
    """README.md: the same in words, and how to draw with it."""
    n, guidance, form = card["windows"], card["guidance"], card["format"]
    scheduler = f"stock DDIM (`scheduler/`), exactly {n} steps"
    if form["scheduler"] == "windowed":
        scheduler = f"`scheduler/windowed_scheduler.py` (`trust_remote_code=True`), {n} steps or more"
    baked = "none" if guidance["teacher"] == 1 else f"scale {guidance['teacher']:g}, now part of the student"
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in card["settings"].items())
    return f"""# A student of {n} time windows

Made by proreflow_jax: progressive reflow (ProReflow, CVPR 2025) in {" -> ".join(map(str, card["stages"]))} windows.

- Base model: {card["base"].rstrip("/").rpartition("/")[2]}
- Form: {form["form"]}, {form["dtype"]}
- Draw with: {scheduler}, checked at guidance scale {guidance["inference"]:g}
- Guidance of the teacher: {baked}; empty prompts in training: {guidance["prompt_dropout"]:.0%}
- Reading of the network: {card["flow"]["prediction"]} on the {card["flow"]["path"]} path
- Digest of the weights: {card["digest"]}

The paper leaves these settings open; here they were:

| setting | value |
|---|---|
{settings}
"""
