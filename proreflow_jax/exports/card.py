"""What an export says of itself: reflow.json for programs, README.md for people."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proreflow_jax.data import kinds
from proreflow_jax.exports.card_base import data_credits, describe_base
from proreflow_jax.exports.card_page import card_page
from proreflow_jax.exports.card_use import example_prompt, own_prompts
from proreflow_jax.exports.formats import Format
from proreflow_jax.run import find_model
from proreflow_jax.run.check_config import field_value
from proreflow_jax.run.experiment import Experiment, Weights, check_taught, guidance_contract
from proreflow_jax.run.stages import Stage, read_done
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import atomic, sealed
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
CARD, PAGE = sealed.RECORD, sealed.PAGE
OPEN = (  # what the paper does not fix and the config therefore decides
    "student.prediction", "student.lora.rank",
    "pairs.solver", "pairs.steps", "pairs.substeps", "pairs.start", "pairs.teacher", "pairs.examples",
    "loss.space", "loss.alpha", "loss.balance", "loss.huber", "loss.window_start_prob", "loss.start_steps",
    "train.steps", "train.batch", "train.ema", "optimizer.learning_rate", "optimizer.schedule", "seed",
)  # fmt: skip


def make_card(experiment: Experiment, stage: Stage, student: Weights, export_format: Format) -> dict[str, Any]:
    """reflow.json: enough to know what the weights are, how they are read, and what they were trained to do.

    Raises as `check_taught` if the stage was trained with other settings than the config's, which the card would state.
    """
    check_taught(experiment, stage, (*OPEN, "data.kind"))
    config, before = experiment.config, experiment.base.source.student  # of a student that this one began as
    skip = clip_skip_numbers(config.model.clip_skip, experiment.base.source.family) or before.get("clip_skip")
    return {
        "format": export_format._asdict(),
        "windows": stage.windows,
        "stages": [*before.get("stages", []), *(s.windows for s in experiment.stages if s.windows >= stage.windows)],
        "digest": student.digest,
        "lineage": _lineage(experiment, stage),
        "flow": student.flow._asdict(),
        "guidance": guidance_contract(config),
        "settings": {field: field_value(config, field) for field in OPEN},
        "base": find_model.title(config, experiment.base.source),
        "about": _about(experiment),
    } | ({"clip_skip": skip} if skip else {})


def _about(experiment: Experiment) -> dict[str, Any]:
    """What the page says of base model and data; it tells no student from another, and exports of before have none."""
    config, base = experiment.config, experiment.base.source
    shown = example_prompt(own_prompts(config), kinds.is_digits(config.data))
    return describe_base(config, base) | {"prompt": shown, "credits": data_credits(config, base)}


def clip_skip_numbers(skip: int, family: str) -> dict[str, int | None]:
    """The number by which each tool leaves out so many layers of a text encoder; None where a tool cannot. {} for none.

    Tools count from 1 at the last layer of the file; SD 2.x's last layer is never read, and A1111 takes no number there.
    """
    if not skip:
        return {}
    unread = 1 if family == "v2" else 0
    return {"diffusers": skip, "a1111": None if unread else skip + 1, "comfyui": -(skip + 1 + unread)}


def _lineage(experiment: Experiment, stage: Stage) -> dict[str, str]:
    """Digests of the weights from the base model to the student, by the name of what holds them.

    With a VAE in the place of the base model's own, of that too.
    """
    done = [read_done(other) for other in experiment.stages if other.windows >= stage.windows]
    before = experiment.base.source.student.get("lineage", {})
    start = {"start": done[0].parent} if before else {"base": done[0].parent}
    start |= {"vae": fold(digest(experiment.base.params["vae"]))} if experiment.base.source.vae else {}
    return before | start | {f"stage-{one.flow.windows}": one.digest for one in done}


def write_card(draft: Path, card: Mapping[str, Any]) -> None:
    """reflow.json and README.md of a draft, the last of its files: reflow.json lists all others with their digests."""
    (draft / PAGE).write_text(card_page(card), encoding="utf-8")
    sealed.seal(draft, card)


def add_to_card(folder: Location, **facts: Any) -> None:
    """Puts what was found out about a written export onto its card and page. A page that its owner edited stays."""
    card = sealed.read_record(folder)
    page, listed = (folder / PAGE).read_bytes(), card[sealed.FILES]
    card |= facts
    if [len(page), hashlib.sha256(page).hexdigest()] == listed[PAGE]:
        page = card_page(card).encode("utf-8")
        with atomic.drafted(folder / PAGE) as draft:  # a local copy's files are shared with other copies: replaced, not changed
            draft.write_bytes(page)
        listed = listed | {PAGE: [len(page), hashlib.sha256(page).hexdigest()]}
    else:
        log.info("%s was edited: it stays as it is, what is new stands in %s alone", folder / PAGE, CARD)
    sealed.write_record(folder, card | {sealed.FILES: listed})
