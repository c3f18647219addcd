"""The emoji's table as Markdown, JSON, picture and page, with the gate in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from proreflow_jax.data.emoji_pairs import HELD_OUT, SEEN
from proreflow_jax.evaluation import concepts, gate, protocols, report
from proreflow_jax.evaluation.protocols import Conditions, said
from proreflow_jax.jobs.run_page import keep_page
from proreflow_jax.jobs.score_plan import Plan
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.storage import atomic

CELL = 96  # pixels of a picture in the grid
Result = dict[str, Any]
COLUMNS = {
    "method": "method",
    "steps": "steps",
    "guidance": "guidance",
    "calls": "network calls",
    "kernel, seen": "kernel distance, seen",
    "kernel, held-out": "held-out",
    "decoded, seen": "behind the autoencoder, seen",
    "decoded, held-out": "held-out",
    "frechet, seen": "Frechet, seen",
    "teacher_kernel, seen": "to the teacher, seen",
    "teacher_kernel, held-out": "held-out",
    "latents, seen": "latents' distance",
    "fidelity, seen": "right concept, seen",
    "fidelity, held-out": "held-out",
    "score, seen": "concept score, seen",
    "score, held-out": "held-out",
    "seconds": "s / image",
}  # those that no row has are left out
SIDES = (SEEN, HELD_OUT)
YARDSTICK = "decoded"  # the distance that the gate reads: what the autoencoder costs is the same in every row
DISTANCES = ("kernel", "decoded", "frechet", "teacher_kernel", "latents")
BETTER = {f"{name}, {side}": "less" for name in DISTANCES for side in SIDES} | {"seconds": "less"}
BETTER |= {f"{name}, {side}": "more" for name in ("fidelity", "score") for side in SIDES}
GAINS = {  # what a student can win over the teacher in as many steps
    "decoded": "nearer to real pictures by",
    "teacher_kernel": "nearer to its own of many steps by",
    "score": "the concept score higher by",
}


def write_table(experiment: Experiment, plan: Plan, results: Sequence[Result], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Writes table.md, table.json, samples.png and report.html; returns the table, the gate and the notes as lines.

    texts: prompts of the first pictures of each side.
    """
    config, folder = experiment.config, experiment.run
    rows = [_cells(result) for result in results]
    columns = {key: head for key, head in COLUMNS.items() if any(key in row for row in rows)}
    verdicts = {name: _verdicts(results, name) for name in texts}
    sentences = [f"{name} pairs: {verdict.sentence()}" for name, each in verdicts.items() for verdict in each]
    sentences += [f"{name} pairs: {sentence}" for name in texts for sentence in _gains(results, name)]
    notes = _notes(config, plan, results)
    table = report.text_table(rows, columns)
    plain = [_plain(result, plan, config) for result in results]
    passed = {name: {verdict.name: verdict.passed for verdict in each} for name, each in verdicts.items()}
    header = {"protocol": plan.protocol._asdict(), "gate": passed, "sentences": sentences, "notes": notes}
    students = [i for i, result in enumerate(results) if "row" in result and result["row"].windows]
    shown = report.shown_table(rows, columns, BETTER, students)
    atomic.write_json(folder / "table.json", header | {"rows": plain, "shown": shown})
    lines = [table, "", "\n".join(f"- {line}" for line in sentences), "", *notes, ""]
    statements = [f"- {row['method']}: {row['statement']}" for row in plain if "statement" in row]
    atomic.write_text(folder / "table.md", "\n".join([*lines, *statements]) + "\n")
    _grid(experiment, results, texts)
    keep_page(folder, config)
    return [*lines[:-1], f"picture: {folder / 'samples.png'}   page: {folder / 'report.html'}"]


def kernel_words(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """The kernel distances of all sides: "kernel distance 12.30 +- 0.40 on seen, ..."."""
    return "kernel distance " + ", ".join(f"{said(numbers[side]['kernel'])} on {side} pairs" for side in numbers)


def _cells(result: Result) -> Result:
    """A row as the table shows it; spreads behind +-."""
    row = result.get("row")
    cells: Result = {"method": result["method"]}
    if row:
        cells |= {"steps": row.steps, "guidance": f"{row.guidance:g}", "calls": row.calls, "seconds": result["seconds"]}
    for side, numbers in result["sides"].items():
        for name in DISTANCES:
            if numbers.get(name):
                cells[f"{name}, {side}"] = _number(numbers[name], 3 if name == "latents" else 1)
        shares = [100 * _mean(numbers[name]) for name in ("top1", "top5", "group")]
        cells[f"score, {side}"] = _number(numbers["score"], 2)
        cells[f"fidelity, {side}"] = " / ".join(f"{share:.0f}" for share in shares) + " %"
    return cells


def _mean(value: float | Mapping[Any, float]) -> float:
    return protocols.mean_and_spread(value)[0] if isinstance(value, Mapping) else value


def _number(value: Mapping[Any, float] | float, digits: int) -> str:
    """A number over seeds, one with its standard error, or a bare one."""
    if not isinstance(value, Mapping):
        return f"{value:.{digits}f}"
    if "error" in value:
        return f"{value['value']:.{digits}f} +- {value['error']:.{digits}f}"
    mean, spread = protocols.mean_and_spread(value)
    if not any(value.values()):  # the reference beside itself
        return "0"
    return f"{mean:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")


def _main(results: Sequence[Result]) -> list[Result]:
    """The rows that the gate reads: teacher by steps, and students."""
    return [each for each in results if "row" in each and "teacher_kernel" in each["sides"][SEEN]]


def _verdicts(results: Sequence[Result], side: str) -> list[gate.Verdict]:
    rows = _main(results)
    teacher = {each["row"].steps: each["sides"][side][YARDSTICK] for each in rows if not each["row"].windows}
    students = [
        gate.StudentScore(each["method"], each["row"].windows, each["row"].steps, each["sides"][side][YARDSTICK])
        for each in rows
        if each["row"].windows
    ]
    return gate.judge_testbed(teacher, students)


def _gains(results: Sequence[Result], side: str) -> list[str]:
    """A sentence for each student beside the teacher in as many steps: every measure's gain, paired by seeds."""
    rows, sentences = _main(results), []
    _, *teacher = (each for each in rows if not each["row"].windows)  # the first is the reference
    few = {each["row"].steps: each["sides"][side] for each in teacher}
    for row, own in ((each["row"], each["sides"][side]) for each in rows if each["row"].windows):
        if other := few.get(row.steps):
            pairs = {name: (other, own) if BETTER[f"{name}, {side}"] == "less" else (own, other) for name in GAINS}
            gains = {GAINS[name]: gate.difference(first[name], second[name]) for name, (first, second) in pairs.items()}
            sentences.append(gate.gain_sentence(gate.against_teacher(row.method, row.steps), gains))
    return sentences


def _plain(result: Result, plan: Plan, config: ConfigDict) -> Result:
    """A row for JSON, with its numbers in a sentence where a model drew it."""
    row = result.get("row")
    numbers = {"method": result["method"], "sides": result["sides"]}
    if row is None:
        return numbers
    count = result["count"]
    under = Conditions(row.steps, result["seeds"], count, count, row.guidance, "none", config.model.sampling_dtype)
    scores = [kernel_words(result["sides"])]
    scores += [
        f"Frechet distance {said(s['frechet'])} on {side} pairs" for side, s in result["sides"].items() if "frechet" in s
    ]
    numbers |= {"windows": row.windows, "steps": row.steps, "guidance": row.guidance, "calls": row.calls}
    numbers |= {"digest": result["digest"], "seconds": result["seconds"]}
    return numbers | {"statement": protocols.sentence(plan.protocol, scores, result["seeds"], under)}


def _notes(config: ConfigDict, plan: Plan, results: Sequence[Result]) -> list[str]:
    e, main = config.evaluate, _main(results)[0]
    seeds = ", ".join(map(str, main["seeds"]))
    styles = "with their style" if e.gate.styled else "without their style"
    hidden = ", and of pictures that it did not (the concept in another style it did)" if HELD_OUT in main["sides"] else ""
    features = f"{plan.protocol.features} at {plan.protocol.size} px"
    return [
        f"protocol {plan.protocol.name}: prompts of {main['count']:,} pictures that the base model's training saw{hidden}, "
        f"{styles}; seeds {seeds} of the noise; +- is the standard deviation over seeds; of rows that no model draws the "
        "standard error over parts.",
        f"kernel distance: unbiased polynomial MMD with KID's kernel x 1000 over {features}, to the real pictures of the same "
        "prompts (real pictures: to other real ones); behind the autoencoder: to these encoded and decoded, which is all that "
        "a sampler can reach, and the gate's yardstick; to the teacher: to its own pictures in the first row, same seed.",
        f"right concept: shares of pictures whose prompt's concept the judge ({concepts.NAME} on {plan.protocol.features}, "
        "fitted to real pictures of the other styles alone) puts first / among the first five / whose first is of the right "
        "group. Concept score: how far the judge puts the prompt's concept above the mean of all, in standard deviations. Real "
        "pictures are the ceiling, shuffled prompts the floor.",
        "latents' distance: RMS to the first row's, same seed; network calls: evaluations of the UNet for a picture.",
    ]


def _grid(experiment: Experiment, results: Sequence[Result], texts: Mapping[str, Sequence[str]]) -> None:
    """samples.png: a row a method; seen prompts, in the left half if held-out ones are drawn too."""
    drawn = [each for each in results if each["pictures"]]
    columns = experiment.config.evaluate.columns
    left = -(-columns // len(texts))
    take = {
        side: min(count, *(len(each["pictures"][side]) for each in drawn))
        for side, count in zip(texts, (left, columns - left), strict=False)
    }
    heads = [text for side, count in take.items() for text in texts[side][:count]]
    rows = [(_label(each), np.concatenate([each["pictures"][side][:count] for side, count in take.items()])) for each in drawn]
    report.picture(experiment.run / "samples.png", rows, heads, CELL)


def _label(result: Result) -> str:
    row = result.get("row")
    if row is None:
        return result["method"]
    scale = "" if row.guidance == 1 else f", guidance {row.guidance:g}"
    return f"{row.method.removesuffix(', guidance')}, {row.steps} steps{scale}"
