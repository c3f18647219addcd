"""A base model's training as the value that its page is made from: autoencoder and diffusion, as far as they are."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from proreflow_jax import UserError
from proreflow_jax.evaluation.page.facts import LOSS, Box, Curves, Line, Run, Stage
from proreflow_jax.jobs import run_facts
from proreflow_jax.jobs.stage_pictures import RECORD
from proreflow_jax.run import outlook
from proreflow_jax.run.stages import SAMPLES
from proreflow_jax.storage import sealed

VAE, DIFFUSION = "vae", "diffusion"  # folders of the two trainings, and blocks of the config
TITLES = {VAE: "autoencoder", DIFFUSION: "diffusion"}
SIDES = {VAE: ("original", "reconstruction"), DIFFUSION: ("original", "picture")}
ERROR = Curves("error, unweighted", "error", note="mean squared error of the noise")  # where the loss is weighted
CURVES = {
    VAE: (LOSS, Curves("error", "error", note="mean squared error of the reconstruction"), Curves("KL divergence", "kl")),
    DIFFUSION: (LOSS, ERROR),
}
RECENT = 9  # lines of metrics.jsonl whose rate is believed


class Standing(NamedTuple):
    """How far the job is."""

    steps: Mapping[str, int]  # saved, of each training that the job does
    out: str  # the folder that it writes
    written: bool


def saved_steps(folder: Path, total: int) -> int:
    """The newest checkpoint of a training; 0: there is none."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return min(max(steps, default=0), total)


def read_pretraining(folder: Path, fields: Mapping[str, Any], standing: Standing) -> Run:
    """All that the page shows. fields: of the config, by dotted names."""
    sizes = run_facts.file_sizes(folder)
    samples = run_facts.read_object(folder, f"{SAMPLES}/{RECORD}", sizes)
    stages = {name: _stage(folder, name, fields, standing, samples, sizes) for name in standing.steps}
    return Run(
        **run_facts.heading(folder, fields),
        progress=_progress(fields, stages, standing),
        stages=list(stages.values()),
        prompts=[str(prompt) for prompt in samples.get("prompts", ())],
        halves=samples,
        tile=samples.get("tile", 0),
        disk=run_facts.disk(sizes, (SAMPLES, VAE, DIFFUSION)),
        boxes=_boxes(fields, stages, standing),
        pictured=_pictured(samples),
    )


def _stage(
    folder: Path, name: str, fields: Mapping[str, Any], standing: Standing, samples: Mapping[str, Any], sizes: Mapping[str, int]
) -> Stage:
    lines = run_facts.read_lines(folder / name / "metrics.jsonl") if f"{name}/metrics.jsonl" in sizes else []
    drawings, left = run_facts.read_drawings(folder, f"{SAMPLES}/{name}", samples, sizes, run_facts.SHOWN)
    steps, total = standing.steps[name], fields[f"{name}.steps"]
    return Stage(
        windows=0,
        begun=any(path.startswith(f"{name}/") for path in sizes),
        done={"step": steps} if steps >= total else {},
        parent="",
        steps=steps,
        total=total,
        lines=lines,
        drawings=drawings,
        teacher=left,
        own_name=TITLES[name],
        curves=CURVES[name],
        sides=SIDES[name],
    )


def _progress(fields: Mapping[str, Any], stages: Mapping[str, Stage], standing: Standing) -> dict[str, Any]:
    """In the words of progress.json."""
    cost = {DIFFUSION: fields["diffusion.batch"] * outlook.BACKWARD}  # of the denoiser alone
    parts = [_part(stage) | {"cost": cost.get(name, 0)} for name, stage in stages.items()]
    now = next((part for part in parts if part["done"] < part["total"]), parts[-1])
    todo = [stage for stage in stages.values() if not stage.done]
    left = [seconds_left(stage) for stage in todo]
    record = now | {"phase": "done" if standing.written else "train", "parts": parts, "time": time.time()}
    record |= {"seconds_left": None if None in left else sum(left), "seconds_left_of_part": left[0] if left else 0.0}
    return record | {"devices": outlook.devices()}


def _part(stage: Stage) -> dict[str, Any]:
    return {"phase": "train", "stage": 0, "title": stage.name, "done": stage.steps, "total": stage.total, "unit": "steps"}


def seconds_left(stage: Stage) -> float | None:
    """By the rate of the newest lines; None while there is none."""
    rates = [line["seconds"] for line in _recent(stage) if isinstance(line.get("seconds"), float | int)]
    return (stage.total - stage.steps) * median(rates) if rates else None


def _recent(stage: Stage) -> list[Line]:
    """The newest lines; without the first of all, which waited for the compiler, if there are others."""
    return list(stage.lines[1:] or stage.lines)[-RECENT:]


def _pictured(samples: Mapping[str, Any]) -> str:
    if not samples:
        return ""
    return (
        "Originals from the training set, the same at every checkpoint. Autoencoder: as they come out of it. Diffusion: drawn "
        f"from their captions and fixed noise in {samples.get('steps')} steps, guidance {samples.get('guidance')}, with the "
        "average weights. Captions in reading order."
    )


def _boxes(fields: Mapping[str, Any], stages: Mapping[str, Stage], standing: Standing) -> list[Box]:
    """Data, where the weights begin, both trainings, the folder that is written."""
    start = str(fields.get("start", ""))
    data = Box("training set", f"{fields.get('data.kind')}, {fields.get('data.resolution')} pixels a side")
    begin = Box("start", start, _digest(start)) if start else Box("start", "random weights, a tokenizer of the captions")
    rows = [Box(TITLES[VAE], "taken over from the start")] if VAE not in stages else []
    written = Box("model", standing.out, _digest(standing.out)) if standing.written else None
    waiting = Box("model", f"{standing.out} · written at the end", kind="waiting")
    return [data, begin, *rows, *map(_box, stages.values()), written or waiting]


def _box(stage: Stage) -> Box:
    words = "finished" if stage.done else f"{stage.steps:,} of {stage.total:,} steps" if stage.begun else "not begun"
    return Box(stage.name, words, kind="done" if stage.done else "begun" if stage.begun else "waiting")


def _digest(folder: str) -> str:
    """The seal of a model's folder, which stands for all of its files; "" without one."""
    try:
        return str(sealed.read_record(Path(folder)).get(sealed.SEAL, ""))
    except UserError:
        return ""
