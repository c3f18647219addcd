"""What an export says of itself: reflow.json for programs, README.md for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proreflow_jax.exports.formats import Format
from proreflow_jax.run import open
from proreflow_jax.run.check_config import field_value
from proreflow_jax.run.experiment import Experiment, Weights, guidance_contract
from proreflow_jax.run.stages import Stage, read_done
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage import atomic, sealed

CARD, PAGE = sealed.RECORD, sealed.PAGE
OPEN = (  # what the paper does not fix and the config therefore decides
    "student.prediction", "student.lora.rank",
    "pairs.solver", "pairs.steps", "pairs.substeps", "pairs.start", "pairs.teacher", "pairs.examples",
    "loss.space", "loss.alpha", "loss.balance", "loss.huber", "loss.window_start_prob", "loss.start_steps",
    "train.steps", "train.batch", "train.ema", "optimizer.learning_rate", "optimizer.schedule", "seed",
)  # fmt: skip


def make_card(experiment: Experiment, stage: Stage, student: Weights, export_format: Format) -> dict[str, Any]:
    """reflow.json: enough to know what the weights are, how they are read, and what they were trained to do."""
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
        "base": open.title(config, experiment.base.source),
    } | ({"clip_skip": skip} if skip else {})


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


def add_to_card(folder: Path, **facts: Any) -> None:
    """Puts what was found out about a written export onto its card and page."""
    card = sealed.read_record(folder) | facts
    with atomic.drafted(folder / PAGE) as draft:  # a local copy's files are shared with other copies: replaced, not changed
        draft.write_text(card_page(card), encoding="utf-8")
    listed = card[sealed.FILES] | {PAGE: [(folder / PAGE).stat().st_size, atomic.sha256(folder / PAGE)]}
    sealed.write_record(folder, card | {sealed.FILES: listed})


def card_page(card: Mapping[str, Any]) -> str:
    """README.md: the same in words, and how to draw with it."""
    n, guidance, form = card["windows"], card["guidance"], card["format"]
    scheduler = f"stock DDIM (`scheduler/`), exactly {n} steps"
    if form["scheduler"] == "windowed":
        scheduler = f"`scheduler/windowed_scheduler.py` (`trust_remote_code=True`), {n} steps or more"
    low, high = guidance["recommended"]
    baked = "none" if guidance["teacher"] == 1 else f"scale {guidance['teacher']:g}, now part of the student"
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in card["settings"].items())
    facts = "\n".join(f"- {line}" for line in (*_origin(card), *_lora_lines(card), *_skip_lines(card)))
    return f"""# A student of {n} time windows{", merged onto another model" if "merged" in card else ""}

Made by proreflow_jax: progressive reflow (ProReflow, CVPR 2025) in {" -> ".join(map(str, card["stages"]))} windows.

{facts}
- Form: {form["form"]}, {form["dtype"]}
- Draw with: {scheduler}
- Replay in diffusers: {_replay(card)}
- Guidance of the teacher: {baked}; empty prompts in training: {guidance["prompt_dropout"]:.0%}
- Guidance scale to draw with: {low:g}{f" to {high:g}" if high > low else ""} ({guidance["why"]})
- Prediction type: {card["flow"]["prediction"]} on the {card["flow"]["path"]} path
- Digest of the weights: {card["digest"]}

The paper leaves these settings open; {"in the training of the change they were" if "merged" in card else "here they were"}:

| setting | value |
|---|---|
{settings}
"""


def _origin(card: Mapping[str, Any]) -> list[str]:
    """Whose weights these are."""
    merged = card.get("merged")
    vae = [f"Digest of the VAE's weights: {card['lineage']['vae']}"] if "vae" in card["lineage"] else []
    if not merged:
        return [f"Base model: {card['base']}", *vae]
    change = f"the change that made a student ({merged['delta']}) of {merged['base']}"
    return [
        f"A merge: the weights of {card['base']} + {merged['scale']:g} x {change}",
        "Nothing was trained on this sum: only its pictures show how well the change fits this model",
        *vae,
    ]


def _skip_lines(card: Mapping[str, Any]) -> list[str]:
    """Which layer of the text encoder the student was taught to read, and the number by which each tool is told so."""
    if not (skip := card.get("clip_skip")):
        return []
    n, a1111 = skip["diffusers"], skip["a1111"]
    others = f"ComfyUI: the node CLIP Set Last Layer at {skip['comfyui']}; A1111: " + (
        f"Clip skip {a1111}" if a1111 else "takes no number for SD 2.x, so the text is not the right one there"
    )
    if card["format"]["form"] == "diffusers":
        return [f"Text: read {n} layers before the last; the text encoder of this folder ends there: pass no clip_skip"]
    return [
        f"Text: read {n} layers before the last (clip_skip={n}), of prompt and negative prompt alike. Nothing in this file "
        f"says so, your tool must be told. {others}; diffusers: open the text encoder with num_hidden_layers less {n}; "
        f"its clip_skip={n} leaves the negative prompt as it is, so it is right at guidance_scale=1 alone"
    ]


def _replay(card: Mapping[str, Any]) -> str:
    """What became of the replay, by its record."""
    if not (replay := card.get("replay")):
        return "none was made of this folder (`export --check` makes one)"
    gap, to_student = replay["largest_difference"], replay["to_student"]
    student = "" if to_student == gap else f", to the whole student {to_student:.1e}"
    return (
        f"{replay['images']} prompts in {replay['steps']} steps at guidance scale {replay['guidance']:g}, with diffusers "
        f"{replay['diffusers']} and torch {replay['torch']}: largest difference of the latents "
        f"{gap:.1e}{student}, values to {replay['largest_value']:.1f}"
    )


def _lora_lines(card: Mapping[str, Any]) -> list[str]:
    """What a LoRA carries of its student."""
    if not (lora := card.get("lora")):
        return []
    if "lost" in lora:
        parts = [f"{reader} {share:.1%}" for reader, share in lora["lost"].items()]
        readers = [f"Of its energy lies in layers that a reader does not take, and drops without a word: {', '.join(parts)}"]
    else:
        readers = ["Its tensors have diffusers' own names: every layer is taken there, other tools do not read them"]
    if "error" not in lora:
        return [f"The LoRA is what was trained, exactly: rank {lora['rank']}, {lora['layers']} layers", *readers]
    return [
        f"The LoRA is an approximation of the student: rank {lora['rank']} keeps {lora['energy']:.1%} of the energy of the "
        f"change of {lora['layers']} layers, relative error {lora['error']:.3f}; biases and norms, left out, hold "
        f"{lora['left_out']['energy']:.2%} of the whole change's energy",
        *readers,
    ]
