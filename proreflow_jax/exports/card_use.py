"""How an export is used: the header that the hub reads, lines of Python that run in its folder, settings for each tool."""

from collections.abc import Mapping
from typing import Any

import yaml

from proreflow_jax.exports.card_words import one_line
from proreflow_jax.exports.formats import FILES, SCHEDULER
from proreflow_jax.flow.stock import FLOW_MATCH

PROMPT = "a red fox in the snow"  # of a run that has no prompts of its own
NAME = 512  # characters of a folder's name
FAMILIES = {"xl": "stable-diffusion-xl", "sd3": "stable-diffusion-3"}
PIPELINES = {"xl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}
RELATIONS = {"diffusers": "finetune", "single-file": "finetune", "lora": "adapter", "delta": "adapter"}


def header(card: Mapping[str, Any]) -> str:
    """The YAML header of a card on the hub, between its two lines of dashes. Every value is quoted by the YAML library."""
    about, form = card.get("about", {}), card["format"]["form"]
    family = FAMILIES.get(about.get("family"), "stable-diffusion")
    fields: dict[str, Any] = dict(about.get("licence", {}))
    if bases := [name for name in (about.get("base_model"), about.get("delta_base_model")) if name]:
        fields["base_model"] = bases[0] if len(bases) == 1 else bases
        fields["base_model_relation"] = "merge" if "merged" in card else RELATIONS[form]
    fields["library_name"] = "proreflow_jax" if form == "delta" else "diffusers"
    fields["pipeline_tag"] = "text-to-image"
    tags = ["text-to-image", family, "proreflow", "few-step", f"{card['windows']}-step"]
    fields["tags"] = tags + ([form] if form in ("lora", "delta") else [])
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def snippet(card: Mapping[str, Any]) -> str:
    """What draws one picture, run in the export's folder: Python, or the command that merges a delta."""
    about, form, n = card.get("about", {}), card["format"]["form"], card["windows"]
    opens = one_line(about.get("opens") or card["base"], NAME)
    if form == "delta":
        model = "'" + opens.replace("'", "'\\''") + "'"
        return f"```bash\nproreflow merge --delta=. --config.model.path={model} --out=../merged\n```"
    kind, stepper = PIPELINES.get(about.get("family"), "StableDiffusionPipeline"), _scheduler(card)
    low = card["guidance"]["recommended"][0]
    prompt = one_line(about.get("prompt") or PROMPT)
    draw = f'pipe({_quoted(prompt)}, num_inference_steps={n}, guidance_scale={low:g}).images[0].save("picture.png")'
    scheduler = f'pipe.scheduler = {stepper}.from_pretrained(".", subfolder="scheduler")'
    if form == "diffusers":
        code = ", trust_remote_code=True" if card["format"]["scheduler"] == "windowed" else ""
        lines = ["from diffusers import DiffusionPipeline", "", f'pipe = DiffusionPipeline.from_pretrained("."{code})', draw]
    elif form == "single-file":
        configs = _quoted(one_line(about.get("configs") or opens, NAME))
        opened = f'pipe = {kind}.from_single_file("{FILES[form]}", config={configs})'
        lines = [f"from diffusers import {stepper}, {kind}", "", opened, scheduler, draw]
    else:
        opened = f"pipe = {kind}.from_pretrained({_quoted(opens)})"
        if about.get("configs"):
            opened = f"pipe = {kind}.from_single_file({_quoted(opens)}, config={_quoted(one_line(about['configs'], NAME))})"
        load = f'pipe.load_lora_weights(".", weight_name="{FILES[form]}")'
        lines = [f"from diffusers import {stepper}, {kind}", "", opened, load, scheduler, draw]
    return "\n".join(["```python", *lines, "```"])


def _is_flow(card: Mapping[str, Any]) -> bool:
    return card.get("about", {}).get("family") == "sd3"


def _scheduler(card: Mapping[str, Any]) -> str:
    return FLOW_MATCH if _is_flow(card) else SCHEDULER["_class_name"]


def _quoted(text: str) -> str:
    """A literal of Python. It stands inside a line, so that no backticks in it end the block."""
    plain = f'"{text}"'
    return plain if text.isprintable() and not {'"', "\\"} & set(text) else repr(text)


def tool_settings(card: Mapping[str, Any]) -> str:
    """A table: what each tool is set to for this student, by docs/take-it-to-your-tool.md, which says what was measured."""
    n, form, scheduler = card["windows"], card["format"]["form"], card["format"]["scheduler"]
    low, high = card["guidance"]["recommended"]
    scale = f"{low:g} to {high:g}" if high > low else f"{low:g}"
    steps = f"{n} or more" if scheduler == "windowed" else f"{n}, no other number"
    own = "the folder's own (`trust_remote_code=True`)" if scheduler == "windowed" else "the folder's own: DDIM, `trailing`"
    own = f"the folder's own: {FLOW_MATCH}" if _is_flow(card) else own
    rows = [f"| diffusers | {own} | {steps} | `guidance_scale` {scale} |"]
    notes = ""
    if form == "delta":
        return "Nothing opens a delta by itself: merge it onto a model of the same base, whose card then has the settings."
    if form == "diffusers":
        notes = (
            "ComfyUI and A1111 do not open folders: `proreflow export --form=single-file` or `--form=lora` writes their files."
        )
    elif card["format"].get("names") == "diffusers" and form == "lora" and not _is_flow(card):
        notes = "The names in this LoRA are those of diffusers, other tools do not read them: `proreflow export --form=lora`."
    else:
        place = ("models/loras", "models/Lora") if form == "lora" else ("models/checkpoints", "models/Stable-diffusion")
        strength = ", strength 1" if form == "lora" else ""
        for tool, where, sampler in (
            ("ComfyUI", place[0], "sampler `euler`, scheduler `simple`"),
            ("A1111", place[1], "sampler `Euler`, schedule type `Simple`"),
        )[: 1 if _is_flow(card) else 2]:
            rows.append(f"| {tool}: file into `{where}`{strength} | {sampler} | {n}, no other number | cfg {scale} |")
        tools = "ComfyUI" if _is_flow(card) else "ComfyUI and A1111"
        rest = (
            "The row of this tool follows from its source"
            if _is_flow(card)
            else "The rows of these two tools follow from their sources"
        )
        notes = (
            f"Image-to-image in {tools}: steps = {n} x denoise. Wrong there: ancestral samplers, `lcm`, `karras`, "
            f"`normal`, `ddim_uniform`. {rest}; this student was not run there."
        )
        if card["flow"]["prediction"] == "ddim_v":
            notes += " It is a v-prediction model to these tools, as its base is."
    head = "| tool | sampler | steps | guidance |\n|---|---|---|---|"
    return "\n".join([head, *rows, "", notes])


def own_prompts(config: Any) -> tuple[str, ...]:
    """Prompts that a run's config names to be looked at: those of its pictures, and of the emoji's showcase."""
    return (*config.samples.prompts, *config.evaluate.get("gate", {}).get("showcase", ()))


def example_prompt(prompts: Any, digits: bool) -> str:
    """A prompt for the card: the run's own first one, or one that the model knows."""
    return one_line(prompts[0]) if len(prompts) else "a handwritten seven" if digits else PROMPT
