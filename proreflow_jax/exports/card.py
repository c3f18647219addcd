"""What an export says of itself: reflow.json for programs, README.md for people."""

from collections.abc import Mapping
from typing import Any

from proreflow_jax.exports.formats import Format
from proreflow_jax.run import open
from proreflow_jax.run.check_config import field_value
from proreflow_jax.run.experiment import Experiment, Weights, guidance_contract
from proreflow_jax.run.finished import read_done
from proreflow_jax.run.stages import Stage

CARD, PAGE = "reflow.json", "README.md"
OPEN = (  # what the paper does not fix and the config therefore decides
    "student.prediction", "student.lora.rank",
    "pairs.solver", "pairs.steps", "pairs.substeps", "pairs.start", "pairs.teacher", "pairs.examples",
    "loss.space", "loss.alpha", "loss.balance", "loss.huber", "loss.window_start_prob", "loss.start_steps",
    "train.steps", "train.batch", "train.ema", "optimizer.learning_rate", "optimizer.schedule", "seed",
)  # fmt: skip


def make_card(experiment: Experiment, stage: Stage, student: Weights, wanted: Format) -> dict[str, Any]:
    """reflow.json: enough to know what the weights are, how they are read, and what they were trained to do."""
    config = experiment.config
    return {
        "format": wanted._asdict(),
        "windows": stage.windows,
        "stages": [other.windows for other in experiment.stages if other.windows >= stage.windows],
        "digest": student.digest,
        "lineage": _lineage(experiment, stage),
        "flow": student.flow._asdict(),
        "guidance": guidance_contract(config),
        "settings": {field: field_value(config, field) for field in OPEN},
        "base": open.title(config, experiment.base.source),
    }


def _lineage(experiment: Experiment, stage: Stage) -> dict[str, str]:
    """Digests of the weights from the base model to the student, by the name of what holds them."""
    done = [read_done(other) for other in experiment.stages if other.windows >= stage.windows]
    return {"base": done[0].parent} | {f"stage-{one.flow.windows}": one.digest for one in done}


def card_page(card: Mapping[str, Any]) -> str:
    """README.md: the same in words, and how to draw with it."""
    n, guidance, form = card["windows"], card["guidance"], card["format"]
    scheduler = f"stock DDIM (`scheduler/`), exactly {n} steps"
    if form["scheduler"] == "windowed":
        scheduler = f"`scheduler/windowed_scheduler.py` (`trust_remote_code=True`), {n} steps or more"
    low, high = guidance["recommended"]
    baked = "none" if guidance["teacher"] == 1 else f"scale {guidance['teacher']:g}, now part of the student"
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in card["settings"].items())
    return f"""# A student of {n} time windows

Made by proreflow_jax: progressive reflow (ProReflow, CVPR 2025) in {" -> ".join(map(str, card["stages"]))} windows.

- Base model: {card["base"]}
- Form: {form["form"]}, {form["dtype"]}
- Draw with: {scheduler}, replayed at guidance scale 1
- Guidance of the teacher: {baked}; empty prompts in training: {guidance["prompt_dropout"]:.0%}
- Guidance scale to draw with: {low:g}{f" to {high:g}" if high > low else ""} ({guidance["why"]})
- Reading of the network: {card["flow"]["prediction"]} on the {card["flow"]["path"]} path
- Digest of the weights: {card["digest"]}

The paper leaves these settings open; here they were:

| setting | value |
|---|---|
{settings}
"""
