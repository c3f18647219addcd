"""A run's files as the one value that its page is made from. Reads small files only, and pictures; opens no model.

What is missing, half-written or damaged is left out: the page shows what there is.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from proreflow_jax import UserError
from proreflow_jax.evaluation.page import embed
from proreflow_jax.evaluation.page.facts import Drawing, Run, Stage, Table
from proreflow_jax.jobs.stage_pictures import RECORD
from proreflow_jax.jobs.study_facts import NUMBERS, read_study
from proreflow_jax.jobs.study_facts import PICTURE as STUDY_PICTURE
from proreflow_jax.run import nearest_config, outlook
from proreflow_jax.run.read_config import CONFIG
from proreflow_jax.run.stages import DONE, SAMPLES
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

SHOWN = 6  # pictures of a stage: the first, the newest, and some between
MOST_SHOWN = 18  # of all stages
MOST_LINES = 1000  # of a metrics.jsonl that are read
STAGE, STEP = re.compile(r"stage-(\d+)"), re.compile(r"step-(\d+)\.png")
TABLES = {"table.json": "Table", "scores.json": "Scores"}  # of the protocols of `evaluate`
PICTURE = {"table.json": "samples.png"}  # of a table
DISK = ("pairs", "checkpoints", "export", SAMPLES, "tensorboard", "profile")  # folders that are counted apart

Sizes = Mapping[str, int]  # bytes of every file of the run, by its name relative to the run


def read_run(folder: Location, fields: Mapping[str, Any]) -> Run:
    """All that the page shows of a run.

    fields: of the config, by dotted names; config.json, where it is there, goes before.
    """
    sizes = file_sizes(folder)
    fields = dict(fields) | flattened(read_object(folder, CONFIG, sizes))
    samples = read_object(folder, f"{SAMPLES}/{RECORD}", sizes)
    counts = _windows(fields, sizes)
    shown = max(2, min(SHOWN, MOST_SHOWN // max(len(counts), 1)))
    return Run(
        **heading(folder, fields),
        progress=_progress(folder, sizes),
        stages=[_stage(folder, count, fields, samples, sizes, shown=shown) for count in counts],
        exports=[count for count in counts if f"export/stage-{count}/reflow.json" in sizes],
        tables=[table for file in TABLES if (table := _table(folder, file, sizes))],
        prompts=[str(prompt) for prompt in samples.get("prompts", ())],
        halves=samples,
        tile=samples.get("tile", 0),
        disk=disk(sizes),
        study=read_study(read_object(folder, NUMBERS, sizes), _picture(folder, STUDY_PICTURE, sizes)),
    )


def heading(folder: Location, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What every page's `Run` begins with: which run, when, and its config beside the package's nearest one."""
    name, changes = nearest_config.compare(fields)
    return dict(name=folder.name, folder=str(folder), time=time.time(), fields=fields, config_name=name, changes=changes)


def file_sizes(folder: Location) -> dict[str, int]:
    """{name relative to the folder: bytes} of every file below, in one listing."""
    if not isinstance(folder, Path):
        return {one.name: one.size for one in folder.objects()}
    sizes = {}
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        except FileNotFoundError:
            continue  # a checkpoint that is removed meanwhile
    return sizes


def flattened(record: Mapping[str, Any], block: str = "") -> dict[str, Any]:
    """{dotted name: value} of a config.json."""
    fields = {}
    for name, value in record.items():
        dotted = f"{block}.{name}" if block else name
        fields |= flattened(value, dotted) if isinstance(value, dict) else {dotted: value}
    return fields


def read_object(folder: Location, name: str, sizes: Sizes) -> dict[str, Any]:
    """A JSON object; {} if it is not there or no whole one."""
    try:
        return atomic.read_json(folder / name) if name in sizes else {}
    except UserError:  # MissingFile is one: gone since the listing
        return {}


def _progress(folder: Location, sizes: Sizes) -> dict[str, Any]:
    """progress.json, if it has what the page shows."""
    record = read_object(folder, outlook.FILE, sizes)
    needed = {"phase", "stage", "done", "total", "unit", "parts", "time"}
    return record if needed <= set(record) else {}


def _windows(fields: Mapping[str, Any], sizes: Sizes) -> list[int]:
    """The stages' windows, as the config has them, and those that have a folder all the same."""
    counts = [count for count in fields.get("stages", ()) if isinstance(count, int)]
    folders = {int(match[1]) for name in sizes if (match := STAGE.fullmatch(name.partition("/")[0]))}
    return sorted({*counts, *folders}, reverse=True)


def _stage(
    folder: Location, count: int, fields: Mapping[str, Any], samples: Mapping[str, Any], sizes: Sizes, *, shown: int
) -> Stage:
    place = f"stage-{count}"
    done, plan = (read_object(folder, f"{place}/{name}", sizes) for name in (DONE, "plan.json"))
    lines = read_lines(folder / place / "metrics.jsonl") if f"{place}/metrics.jsonl" in sizes else []
    drawings, teacher = read_drawings(folder, f"{place}/{SAMPLES}", samples, sizes, shown)
    return Stage(
        windows=count,
        begun=any(name.startswith(f"{place}/") for name in sizes),
        done=done,
        parent=done.get("parent") or plan.get("parent", ""),
        steps=done.get("step") or (lines[-1]["step"] if lines else 0),
        total=plan.get("train.steps") or fields.get("train.steps", 0),
        lines=lines,
        drawings=drawings,
        teacher=teacher,
    )


def read_lines(path: Location) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; the last one may be cut, where its writer is at work or was killed.

    Of a long file some, evenly: reading it takes no longer as the run goes on.
    """
    texts, lines = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    numbers = list(range(len(texts)))
    for i in sorted({*chosen(numbers, MOST_LINES), *numbers[-2:]}):
        try:
            line = json.loads(texts[i])
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def read_drawings(
    folder: Location, place: str, samples: Mapping[str, Any], sizes: Sizes, shown: int
) -> tuple[list[Drawing], str]:
    """The pictures of a stage that are shown, and the base model's half."""
    steps = {int(match[1]): name for name in sizes if name.startswith(f"{place}/") and (match := STEP.search(name))}
    width = samples.get("tile", 0) * samples.get("count", 0)
    drawings, teacher = [], ""
    for step in chosen(sorted(steps), shown):
        try:
            left, picture = embed.halves(folder / steps[step], sizes[steps[step]], width, samples.get("gap", 0))
        except (UnidentifiedImageError, OSError):  # cut by a kill, or gone
            continue
        drawings, teacher = [*drawings, Drawing(step, picture)], left
    return drawings, teacher


def chosen(steps: list[int], most: int) -> list[int]:
    """The first, the last, and evenly some between: at most so many."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _table(folder: Location, file: str, sizes: Sizes) -> Table | None:
    """A table that `evaluate` has written; None if there is none, or one of an older version."""
    record = read_object(folder, file, sizes)
    shown = record.get("shown")
    if not isinstance(shown, dict):
        return None
    notes = [*record.get("sentences", ()), *record.get("notes", ())]
    image = _picture(folder, PICTURE.get(file, ""), sizes)
    return Table(TABLES[file], shown["heads"], shown["better"], shown["cells"], shown["compared"], notes, image)


def _picture(folder: Location, name: str, sizes: Sizes) -> str:
    """A wide picture as data:; "" if it is not there or damaged."""
    try:
        return embed.whole(folder / name, sizes[name], wide=True) if name in sizes else ""
    except (UnidentifiedImageError, OSError):
        return ""


def disk(sizes: Sizes, kinds: Sequence[str] = DISK) -> dict[str, int]:
    """Bytes by the folder that files lie in, whichever the stage. kinds: folders that are counted apart."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        parts = name.split("/")[:-1]
        kind = next((part for part in parts if part in kinds), "other")
        totals[kind] = totals.get(kind, 0) + size
    return totals
