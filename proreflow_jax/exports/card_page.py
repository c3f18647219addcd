"""README.md of an export: what the student is, how to draw with it, pictures and numbers where the run has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from proreflow_jax.exports.card_pictures import picture_lines
from proreflow_jax.exports.card_use import NAME, header, snippet, tool_settings
from proreflow_jax.exports.card_words import STATEMENT, plain_words

USED = {
    "diffusers": "In this folder (or with the repository's id in the place of the dot):",
    "single-file": "In this folder; `config` names the configs and the tokenizer, which a file does not hold:",
    "lora": "In this folder, with the base model (needs peft):",
    "delta": "In this folder; the path is that of the base model, or of a fine-tune of it:",
}


def card_page(card: Mapping[str, Any]) -> str:
    """README.md: a header for the hub, then the card in words, and how to draw with it."""
    n, guidance, form = card["windows"], card["guidance"], card["format"]
    kind = "FlowMatchEuler" if card.get("about", {}).get("family") == "sd3" else "DDIM"
    scheduler = f"stock {kind} (`scheduler/`), exactly {n} steps"
    if form["scheduler"] == "windowed":
        scheduler = f"`scheduler/windowed_scheduler.py` (`trust_remote_code=True`), {n} steps or more"
    low, high = guidance["recommended"]
    baked = "none" if guidance["teacher"] == 1 else f"scale {guidance['teacher']:g}, now part of the student"
    settings = "\n".join(f"| `{name}` | {plain_words(value)} |" for name, value in card["settings"].items())
    facts = "\n".join(f"- {line}" for line in (*_origin(card), *_lora_lines(card), *_skip_lines(card)))
    return f"""{header(card)}
# A student of {n} time windows{", merged onto another model" if "merged" in card else ""}

Made by proreflow_jax: progressive reflow (ProReflow, CVPR 2025) in {" -> ".join(map(str, card["stages"]))} windows.

{_lines(picture_lines(card))}## Draw

{USED[form["form"]]}

{snippet(card)}

{tool_settings(card)}

{_lines(_number_lines(card))}## What it is

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
{_lines(_credit_section(card), before=True)}"""


def _lines(lines: Sequence[str], before: bool = False) -> str:
    """A section as text, with an empty line at its beginning or end; "" of none."""
    return "\n".join([*([""] if before else []), *lines, *([] if before else [""])]) + "\n" if lines else ""


def _number_lines(card: Mapping[str, Any]) -> list[str]:
    """The section of the numbers that were measured on these weights; [] if there are none."""
    if not (numbers := card.get("numbers")):
        return []
    rounded = "" if card["format"]["dtype"] == "float32" else f", before they were rounded to {card['format']['dtype']}"
    said = f"By `evaluate`, on the weights of the digest below{rounded}:"
    return ["## Numbers", "", said, "", *(f"- {plain_words(line, STATEMENT)}" for line in numbers)]


def _credit_section(card: Mapping[str, Any]) -> list[str]:
    """Whose pictures the training used, where that is known."""
    credits = card.get("about", {}).get("credits")
    return ["## Data", "", *credits] if credits else []


def _origin(card: Mapping[str, Any]) -> list[str]:
    """Whose weights these are."""
    merged = card.get("merged")
    base, vae = plain_words(card["base"], NAME), []
    if "vae" in card["lineage"]:
        vae = [f"Digest of the VAE's weights: {card['lineage']['vae']}"]
    if not merged:
        return [f"Base model: {base}", *vae]
    change = f"the change that made a student ({merged['delta']}) of {plain_words(merged['base'], NAME)}"
    return [
        f"A merge: the weights of {base} + {merged['scale']:g} x {change}",
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
    told = f", and in {replay['told']['steps']} told `sigmas`," if "told" in replay else ""
    student = "" if to_student == gap else f", to the whole student {to_student:.1e}"
    return (
        f"{replay['images']} prompts in {replay['steps']} steps{told} at guidance scale {replay['guidance']:g}, with diffusers "
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
        others = "ComfyUI reads them too" if card.get("about", {}).get("family") == "sd3" else "other tools do not read them"
        readers = [f"Its tensors have diffusers' own names: every layer is taken there, {others}"]
    if "error" not in lora:
        return [f"The LoRA is what was trained, exactly: rank {lora['rank']}, {lora['layers']} layers", *readers]
    return [
        f"The LoRA is an approximation of the student: rank {lora['rank']} keeps {lora['energy']:.1%} of the energy of the "
        f"change of {lora['layers']} layers, relative error {lora['error']:.3f}; biases and norms, left out, hold "
        f"{lora['left_out']['energy']:.2%} of the whole change's energy",
        *readers,
    ]
