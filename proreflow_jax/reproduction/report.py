"""The cells of `reproduce` as people read them: table.md, table.json, figures and samples.

A spread is the standard deviation over seeds (n - 1). A seed has its own pairs, training and evaluation noise, so methods of
one seed are paired. What counts as a difference, and where a claim may be made, stands in `claims`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from proreflow_jax.evaluation import report
from proreflow_jax.evaluation.page.facts import Table
from proreflow_jax.reproduction import claims, curves
from proreflow_jax.reproduction.cells import BASE
from proreflow_jax.reproduction.claims import AT, BETTER, UNDECIDED, Cells, Gate, values
from proreflow_jax.reproduction.testbed import Testbed
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.storage import atomic

MARK = (
    "Change of the mean from the second method to the first, less is better. **Bold**: further apart than three pooled "
    "spreads, at a budget where the gate is open. All else is undecided."
)
ROUNDING = 1e-9  # numbers below are the teacher's distance to itself
BEST = "**"  # around the best mean of a column, and around a claim


def write_report(experiment: Experiment, testbed: Testbed, results: Sequence[Mapping[str, Any]], total: int) -> str:
    """Writes table.md, table.json and the pictures into the run's folder; returns the text of table.md."""
    config, run = experiment.config, experiment.run
    r, budgets = config.reproduce, by_budget(results)
    gate = claims.make_gate(budgets, BASE, r.baseline, testbed.real) if budgets else None
    notes = make_notes(config, testbed, len(results), total)
    parts, effects = [*notes], []
    if gate:
        effects = claims.make_claims(budgets, r.effects, list(testbed.measures), gate)
        parts += [gate_text(gate, budgets, testbed, r.baseline), costs(budgets)]
        parts += [f"## {title}\n\n{_measured(budgets, measure, r.steps)}" for measure, title in testbed.measures.items()]
        parts += [_changes(f"What each choice does, {budget:,} forwards", effects, budget, testbed) for budget in budgets]
        for name in r.references:
            against = [("", method, name) for method in next(iter(budgets.values())) if method != name]
            rows = claims.make_claims(budgets, against, list(testbed.measures), gate)
            parts += [_changes(f"Against {name}, {budget:,} forwards", rows, budget, testbed) for budget in budgets]
    text = "\n\n".join(part for part in parts if part) + "\n"
    atomic.write_text(run / "table.md", text)
    facts = {"notes": notes, "cells": list(results), "rows": rows_of(budgets, testbed), "claims": effects}
    atomic.write_json(run / "table.json", facts | {"gate": gate and gate._asdict()})
    for file, methods in r.figures if len(budgets) > 1 else ():
        curves.draw_curves(run / file, budgets, methods, testbed.short, BASE)
    if budgets:
        curves.draw_alphas(run, budgets[max(budgets)], testbed.measures)
        _samples(run, budgets[max(budgets)], config)
    return text


def by_budget(results: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, list[Mapping[str, Any]]]]:
    """budget -> method -> cells, the base model's in front of each; {} while the base model or all others are missing."""
    teacher = [cell for cell in results if not cell["budget"]]
    budgets: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in results:
        if cell["budget"] and teacher:
            budgets.setdefault(cell["budget"], {BASE: teacher}).setdefault(cell["method"], []).append(cell)
    return dict(sorted(budgets.items()))


def make_notes(config: ConfigDict, testbed: Testbed, done: int, total: int) -> list[str]:
    """What the numbers are, a sentence or two each; first, in bold, that cells are missing."""
    r = config.reproduce
    unfinished = [] if done == total else [f"**Unfinished: {done} of {total} cells.**"]
    return [
        *unfinished,
        f"Budgets: {', '.join(f'{budget:,}' for budget in r.budgets)} forwards a method, the teacher's included; seeds "
        f"{', '.join(map(str, r.seeds))}; mean ± standard deviation over seeds, which have their own pairs, training, noise.",
        f"{testbed.notes(config)} In fewer steps than windows a student is read as one of that many windows.",
    ]


def spread(numbers: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, three digits of the mean; of one value only itself; "0" where all is rounding."""
    mean = float(np.mean(numbers))
    if max(map(abs, numbers)) < ROUNDING:
        return "0"
    if len(numbers) < 2:
        return f"{mean:.3g}"
    digits = max(0, 2 - int(np.floor(np.log10(max(abs(mean), ROUNDING)))))
    return f"{mean:.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}"


def markdown(table: Table) -> str:
    """The cells alone, marked ones in bold."""
    marks = set(table.best or ())
    lines = [
        {str(j): f"{BEST}{cell}{BEST}" if (i, j) in marks else cell for j, cell in enumerate(cells)}
        for i, cells in enumerate(table.cells)
    ]
    return report.text_table(lines, {str(j): head for j, head in enumerate(table.heads)})


def _plain(title: str, lines: Sequence[Mapping[str, str]], heads: Mapping[str, str], notes: Sequence[str]) -> Table:
    """A table without marks. heads: key of the lines -> heading."""
    cells = [[line.get(key, "") for key in heads] for line in lines]
    return Table(title, list(heads.values()), [""] * len(heads), cells, [], notes)


def gate_text(gate: Gate, budgets: Mapping[int, Cells], testbed: Testbed, baseline: str) -> str:
    """The gate with its numbers."""
    table = gate_table(gate, budgets, testbed, baseline)
    return "\n\n".join([f"## {table.title}", markdown(table), *table.notes])


def gate_table(gate: Gate, budgets: Mapping[int, Cells], testbed: Testbed, baseline: str) -> Table:
    """The teacher's numbers by steps, and what the gate says."""
    teacher = next(iter(budgets.values()))[BASE]
    lines = []
    for measure in testbed.measures:
        shown = {str(s): spread(values(teacher, measure, s)) for s in gate.teacher}
        first, *_, last = (float(np.mean(values(teacher, measure, s))) for s in gate.teacher)
        floors = [cell["floor"][measure] for cell in teacher if measure in cell.get("floor", {})]
        floor = spread(floors) if floors else ""
        factor = f"{first / last:.3g}" if last > ROUNDING else ""
        lines.append({"measure": testbed.short[measure], "factor": factor, "floor": floor} | shown)
    heads = (
        {"measure": "teacher, by steps"} | {str(s): str(s) for s in gate.teacher} | {"factor": "factor", "floor": "real data"}
    )
    falls = "holds" if gate.falls and gate.factor >= claims.FACTOR else "does not hold"
    at = "; ".join(f"{budget:,}: {result}" for budget, result in gate.baseline.items()) or "not measured"
    verdict = (
        f"(a) The teacher's {testbed.short[gate.measure]} falls with its steps, {claims.FACTOR:g} times and more: {falls}. "
        f"(b) {baseline} at {max(AT)} steps against the untouched teacher, in distance, by budget: {at}. (c) Only differences "
        f"beyond {claims.SPREADS:g} pooled spreads count. Claims are made where (a) holds and (b) says {BETTER}."
    )
    return _plain("The gate", lines, heads, [verdict])


def costs(budgets: Mapping[int, Cells]) -> str:
    """`cost_table` as Markdown."""
    table = cost_table(budgets)
    return "\n\n".join([f"## {table.title}", *table.notes, markdown(table)])


def cost_table(budgets: Mapping[int, Cells]) -> Table:
    """What each method did with its forwards, and how its flow bends where that was measured."""
    lines = []
    for budget, cells in budgets.items():
        for method, group in cells.items():
            stages = group[0]["stages"]
            joined = lambda name, stages=stages: " + ".join(f"{stage[name]:,}" for stage in stages)
            line = {"method": method, "budget": f"{budget:,}", "windows": " → ".join(str(s["windows"]) for s in stages)}
            line |= {"records": joined("records"), "updates": joined("updates"), "examples": f"{group[0]['examples']:,}"}
            line |= {"forwards": f"{group[0]['forwards']:,}", "cpu": f"{np.mean([c['seconds']['cpu'] for c in group]):.0f}"}
            if "bend" in group[0]:
                line["bend"] = spread([float(np.mean(cell["bend"])) for cell in group])
            if stages or budget == min(budgets):
                lines.append(line)
    heads = {"method": "method", "budget": "budget", "windows": "windows", "records": "pair records", "updates": "updates"}
    heads |= {"examples": "examples", "forwards": "forwards", "cpu": "CPU s"}
    bends = "Bend: straightness in the method's own windows relative to the chord; 0 is straight. "
    heads, bends = (heads | {"bend": "relative bend"}, bends) if any("bend" in line for line in lines) else (heads, "")
    note = (
        "Forwards: of the network on one example, a teacher's as they are, an update as three for each of its examples. "
        f"Examples: updates times batch. {bends}CPU seconds of a cell, compiling included."
    )
    return _plain("What each row costs", lines, heads, [note])


def _measured(budgets: Mapping[int, Cells], measure: str, steps: Sequence[int]) -> str:
    """One measure's tables as Markdown."""
    tables = measure_tables(budgets, measure, steps)
    return "\n\n".join(f"{table.title}:\n\n{markdown(table)}" if table.title else markdown(table) for table in tables)


def measure_tables(budgets: Mapping[int, Cells], measure: str, steps: Sequence[int]) -> list[Table]:
    """One measure: of one budget a table with a column for each number of steps; else a table each, with budgets in columns."""
    said = {s: f"{s} step{'s' if s > 1 else ''}" for s in steps}
    if len(budgets) == 1:
        (budget,) = budgets
        return [_table("", budgets, measure, {(budget, s): said[s] for s in steps})]
    return [_table(said[s], budgets, measure, {(b, s): f"{b:,}" for b in budgets}) for s in steps]


def _table(title: str, budgets: Mapping[int, Cells], measure: str, columns: Mapping[tuple[int, int], str]) -> Table:
    """columns: (budget, steps) -> heading. The best mean of a column is marked, the base model left out."""
    methods = list(dict.fromkeys(method for budget, _ in columns for method in budgets[budget]))
    cells, best = [[method] for method in methods], []
    for j, (budget, s) in enumerate(columns, 1):
        numbers = {method: values(group, measure, s) for method, group in budgets[budget].items()}
        means = {method: float(np.mean(row)) for method, row in numbers.items() if method != BASE}
        for i, method in enumerate(methods):
            cells[i].append(spread(numbers[method]) if method in numbers else "")
        best += [(methods.index(min(means, key=means.get)), j)] if means else []
    return Table(title, ["method", *columns.values()], [""] * (len(columns) + 1), cells, [], best=best)


def _changes(title: str, rows: Sequence[Mapping[str, Any]], budget: int, testbed: Testbed) -> str:
    """Comparisons at one budget, a line each; "" without any."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if row["budget"] == budget:
            line = lines.setdefault((row["what"], row["method"], row["other"]), {})
            text = f"{100 * row['change']:+.0f} %"
            line[f"{row['measure']}{row['steps']}"] = text if row["verdict"] == UNDECIDED else f"{BEST}{text}{BEST}"
    if not lines:
        return ""
    table = [{"what": what or one, "pair": f"{one} / {other}"} | line for (what, one, other), line in lines.items()]
    heads = {f"{measure}{s}": f"{short}, {s}" for measure, short in testbed.short.items() for s in AT}
    return f"## {title}\n\n{MARK}\n\n" + report.text_table(table, {"what": "choice", "pair": "methods"} | heads)


def rows_of(budgets: Mapping[int, Cells], testbed: Testbed) -> list[dict[str, Any]]:
    """Mean and standard deviation of everything, for programs."""
    summary = lambda numbers: {
        "mean": float(np.mean(numbers)),
        "spread": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
    }
    out = []
    for budget, cells in budgets.items():
        for method, group in cells.items():
            one = {"method": method, "group": group[0]["group"], "seeds": [cell["seed"] for cell in group], "budget": budget}
            one |= {total: group[0][total] for total in ("forwards", "updates", "examples")}
            for name in testbed.measures:
                one[name] = {count: summary(values(group, name, int(count))) for count in group[0]["steps"]}
            out.append(one)
    return out


def _samples(run: Path, cells: Cells, config: ConfigDict) -> None:
    """samples-N.png for each number of steps: the same noise and prompts in columns, methods in rows, the first seed."""
    heads = [str(i % 10) for i in range(config.evaluate.columns)]
    strips = {}
    for method, group in cells.items():
        if "strip" in group[0]:
            with (run / "cells" / group[0]["strip"]).open("rb") as file:
                strips[method] = np.asarray(Image.open(file))
    for i, s in enumerate(config.reproduce.steps if strips else ()):
        lines = []
        for method, strip in strips.items():
            side = strip.shape[0] // len(config.reproduce.steps)
            row = strip[i * side : (i + 1) * side]
            lines.append((method, np.stack(np.split(row, row.shape[1] // side, axis=1))))
        report.picture(run / f"samples-{s}.png", lines, heads)
