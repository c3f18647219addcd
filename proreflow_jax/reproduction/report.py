"""The cells of `reproduce` as people read them: table.md, table.json, figures over alpha, and samples.

A spread is the standard deviation over seeds (n - 1). A seed has its own pairs, training and evaluation noise, so methods of
one seed are paired. "Beyond the spread" is meant strictly: all seeds agree in sign, and the means are further apart than both
methods' spreads added up.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from proreflow_jax.evaluation import classifier, figures, report
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.storage import atomic

Cells = Mapping[str, Sequence[Mapping[str, Any]]]  # method -> what `reproduce` kept of each seed
MEASURES = {
    "distance": "Distance to the teacher",
    "frechet_teacher": "Frechet distance to the teacher",
    "frechet": "Frechet distance to the real digits",
}
SHORT = {"distance": "distance", "frechet_teacher": "Frechet, teacher", "frechet": "Frechet, real"}
MARK = "* beyond the spread: all seeds agree, and the means are further apart than both spreads together."
BEST = "**"  # around the best mean of a column


def write_report(experiment: Experiment, results: Sequence[Mapping[str, Any]], total: int) -> str:
    """Writes table.md, table.json and the pictures into the run's folder; returns the text of table.md."""
    config, run = experiment.config, experiment.run
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results:
        cells.setdefault(cell["method"], []).append(cell)
    notes = _notes(config, len(results), total)
    parts = [*notes, _costs(cells)]
    parts += [f"## {title}\n\n{_table(cells, measure, config.reproduce.steps)}" for measure, title in MEASURES.items()]
    parts += [_effects(cells, config.reproduce.effects, config.reproduce.steps)]
    parts += [_against(cells, name, config.reproduce.steps) for name in config.reproduce.references if name in cells]
    text = "\n\n".join(parts) + "\n"
    (run / "table.md").write_text(text, encoding="utf-8")
    atomic.write_json(run / "table.json", {"notes": notes, "cells": list(results), "rows": rows(cells, config.reproduce.steps)})
    _alphas(run, cells, config.reproduce.steps)
    _samples(run, cells, config)
    return text


def _notes(config: ConfigDict, done: int, total: int) -> list[str]:
    r, n = config.reproduce, config.evaluate.examples
    unfinished = [] if done == total else [f"**Unfinished: {done} of {total} cells.**"]
    return [
        *unfinished,
        f"{r.forwards:,} forwards a method, the teacher's included; seeds {', '.join(map(str, r.seeds))}; mean ± standard "
        f"deviation over seeds, which have their own pairs, training and noise. n = {n} images.",
        f"Distance: RMS of the latents' difference to the teacher's own {config.evaluate.teacher_steps[0]}-step result from "
        f"the same noise and prompt. Frechet distances in the features of {classifier.FEATURES}: to that result's images, and "
        "to the 1,797 real digits. Guidance 1. In fewer steps than windows a student is read as one of that many windows.",
    ]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, three digits of the mean; of one value only itself."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3g}"
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(mean), 1e-12)))))
    return f"{mean:.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def values(cells: Sequence[Mapping[str, Any]], measure: str, steps: int) -> list[float]:
    """One number a seed."""
    return [cell["steps"][str(steps)][measure] for cell in cells]


def rows(cells: Cells, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Mean and standard deviation of everything, for programs."""
    summary = lambda numbers: {
        "mean": float(np.mean(numbers)),
        "spread": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
    }
    out = []
    for method, group in cells.items():
        row = {"method": method, "group": group[0]["group"], "seeds": [cell["seed"] for cell in group]}
        for name in (*MEASURES, "recognised"):
            row[name] = {str(count): summary(values(group, name, count)) for count in steps}
        out.append(row | {"bend": summary([float(np.mean(cell["bend"])) for cell in group])})
    return out


def _costs(cells: Cells) -> str:
    """What each method did with its forwards, and how its flow bends."""
    lines = []
    for method, group in cells.items():
        stages = group[0]["stages"]
        read = [f"{100 * np.mean(values(group, 'recognised', int(s))):.0f}" for s in group[0]["steps"]]
        lines.append(
            {
                "method": method,
                "windows": " → ".join(str(stage["windows"]) for stage in stages),
                "pairs": " + ".join(f"{stage['examples']:,}" for stage in stages),
                "updates": " + ".join(f"{stage['updates']:,}" for stage in stages),
                "forwards": f"{group[0]['forwards']:,}",
                "bend": spread([float(np.mean(cell["bend"])) for cell in group]),
                "recognised": " / ".join(read),
            }
        )
    steps = " / ".join(next(iter(cells.values()))[0]["steps"])
    heads = {"method": "method", "windows": "windows", "pairs": "pair records", "updates": "updates", "forwards": "forwards"}
    heads |= {"bend": "relative bend", "recognised": f"recognised in {steps} steps, %"}
    return (
        "## Methods\n\nRelative bend: straightness in the method's own windows (the base model's in one), divided by the "
        f"chord's square, mean over windows; 0 is straight.\n\n{report.text_table(lines, heads)}"
    )


def _table(cells: Cells, measure: str, steps: Sequence[int]) -> str:
    """One measure at each number of steps; the best mean of a column in bold, the base model left out."""
    students = [method for method, group in cells.items() if group[0]["stages"]]
    best = {s: min(students, key=lambda m, s=s: np.mean(values(cells[m], measure, s)), default="") for s in steps}
    lines = []
    for method, group in cells.items():
        shown = {str(s): spread(values(group, measure, s)) for s in steps}
        marked = {s: f"{BEST}{text}{BEST}" if best[int(s)] == method else text for s, text in shown.items()}
        lines.append({"method": method} | marked)
    return report.text_table(lines, {"method": "method"} | {str(s): f"{s} step{'s' if s > 1 else ''}" for s in steps})


def beyond(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether a difference is beyond the spread, as the top of this file defines it; false for a single seed."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return False
    differences = np.subtract(ours, theirs)
    agree = np.all(differences > 0) or np.all(differences < 0)
    return bool(agree and abs(differences.mean()) > np.std(ours, ddof=1) + np.std(theirs, ddof=1))


def _effects(cells: Cells, effects: Sequence[tuple[str, str, str]], steps: Sequence[int]) -> str:
    """What each difference between two methods does."""
    measured = [row for row in effects if row[1] in cells and row[2] in cells]
    lines = [
        {"what": what, "pair": f"{one} / {other}"} | _changes(cells[one], cells[other], steps) for what, one, other in measured
    ]
    return (
        f"## What each choice does\n\nChange of the mean from the second method to the first, less is better. {MARK}\n\n"
        + report.text_table(lines, {"what": "choice", "pair": "methods"} | _heads(steps))
    )


def _against(cells: Cells, reference: str, steps: Sequence[int]) -> str:
    """Every method against one."""
    others = {method: _changes(group, cells[reference], steps) for method, group in cells.items() if method != reference}
    lines = [{"method": method} | changes for method, changes in others.items() if changes]
    return f"## Against {reference}\n\nChange of the mean at so many steps, less is better. {MARK}\n\n" + report.text_table(
        lines, {"method": "method"} | _heads(steps)
    )


def _heads(steps: Sequence[int]) -> dict[str, str]:
    return {f"{measure}{s}": f"{short}, {s}" for measure, short in SHORT.items() for s in steps if s > 1}


def _changes(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> dict[str, str]:
    """Paired by seed: the change of the mean in per cent, * where it is beyond the spread; {} without a common seed."""
    by_seed = {cell["seed"]: cell for cell in other}
    paired = [cell for cell in one if cell["seed"] in by_seed]
    line = {}
    for measure in SHORT if paired else ():
        for s in [s for s in steps if s > 1]:
            ours, theirs = values(paired, measure, s), values([by_seed[cell["seed"]] for cell in paired], measure, s)
            change = 100 * (np.mean(ours) / np.mean(theirs) - 1)
            line[f"{measure}{s}"] = f"{change:+.0f} %{' *' if beyond(ours, theirs) else ''}"
    return line


def _alphas(run: Path, cells: Cells, steps: Sequence[int]) -> None:
    """distance-alpha.png and frechet-alpha.png: ProReflow-II over alpha, the automatic one last; none without such rows."""
    fixed = {
        group[0]["alpha"]: group
        for method, group in cells.items()
        if method.startswith("ProReflow-II") and group[0]["group"] in ("alpha", "ProReflow") and group[0]["balance"] == "fixed"
    }
    automatic = [group for group in cells.values() if group[0]["group"] == "alpha" and group[0]["balance"] == "auto"]
    if len(fixed) < 2 or not automatic:
        return
    swept = [fixed[alpha] for alpha in sorted(fixed)] + automatic
    ticks = dict(enumerate([f"{alpha:g}" for alpha in sorted(fixed)] + ["auto"]))
    for name, measure in (("distance", "distance"), ("frechet", "frechet_teacher")):
        series = [
            figures.Line(
                f"{s} steps",
                list(ticks),
                [float(np.mean(values(group, measure, s))) for group in swept],
                [float(np.std(values(group, measure, s), ddof=1)) if len(group) > 1 else 0.0 for group in swept],
            )
            for s in steps
            if s in (2, 4)
        ]
        title = f"ProReflow-II over alpha, {len(swept[0])} seeds"
        figures.lines(run / f"{name}-alpha.png", series, "alpha", MEASURES[measure], title, x_ticks=ticks)


def _samples(run: Path, cells: Cells, config: ConfigDict) -> None:
    """samples-N.png for each number of steps: the same noise and prompts in columns, methods in rows, the first seed."""
    heads = [str(i % 10) for i in range(config.evaluate.columns)]
    strips = {}
    for method, group in cells.items():
        with (run / "cells" / group[0]["strip"]).open("rb") as file:
            strips[method] = np.asarray(Image.open(file))
    for i, s in enumerate(config.reproduce.steps):
        lines = []
        for method, strip in strips.items():
            side = strip.shape[0] // len(config.reproduce.steps)
            row = strip[i * side : (i + 1) * side]
            lines.append((method, np.stack(np.split(row, row.shape[1] // side, axis=1))))
        report.picture(run / f"samples-{s}.png", lines, heads)
