"""The parts of a run's page as HTML: where the run is, lineage, curves, table, costs. Each gives "" where it has nothing."""

import re
from collections.abc import Mapping, Sequence

from proreflow_jax.evaluation.page.charts import chart, series_of
from proreflow_jax.evaluation.page.costs import costs
from proreflow_jax.evaluation.page.facts import Box, Panel, Run, Stage, Table
from proreflow_jax.evaluation.page.markup import field, number, span, text

DIGITS = 12  # of a digest
TITLES = {"pairs": "pairs", "train": "training", "export": "export"}
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")


def standing(run: Run) -> str:
    """Where the run is, what is left, and every part of the work with its bar."""
    rows = "".join(_part(part) for part in run.progress.get("parts", ()))
    stamp = f"<time data-at={run.progress.get('time', run.time):.0f}></time>"
    bars = f"<ul class=parts>{rows}</ul>" if rows else ""
    names = ", ".join(run.progress.get("under_way", ()))
    now = f"<p class=note>Under way: {text(names)}</p>" if names else ""
    return f"<section><p class=now><b>{text(headline(run))}</b> {stamp}</p>{bars}{now}</section>"


def headline(run: Run) -> str:
    """`stage 4, training: 120 of 500 steps; about 12 min left in all`."""
    record = run.progress
    finished = all(stage.done for stage in run.stages)
    if not record:
        return "finished" if run.stages and finished else "begun; nothing is counted yet"
    if record.get("phase") == "done":
        only = "" if finished else " what this command was to do"
        return f"finished{only}"
    said = f"{_title(record)}: {record['done']:,} of {record['total']:,} {record['unit']}"
    left, here = record.get("seconds_left"), record.get("seconds_left_of_part")
    if left is not None:
        return f"{said}; about {span(left)} left in all"
    return f"{said}; the time left is not known yet" if here is None else f"{said}; about {span(here)} left of this part"


def _title(part: Mapping[str, object]) -> str:
    """Of a part of the work, or of the record that it is under way."""
    return part.get("title") or f"stage {part['stage']}, {TITLES.get(part['phase'], part['phase'])}"


def _part(part: Mapping[str, object]) -> str:
    share = 100 * part["done"] / max(part["total"], 1)
    title = _title(part)
    count = "done" if part["done"] >= part["total"] else f"{part['done']:,} of {part['total']:,} {part['unit']}"
    return f"<li><span>{text(title)}</span><i class=bar><i style='width:{share:.1f}%'></i></i><span>{text(count)}</span></li>"


def lineage(run: Run) -> str:
    """Base model, stages and exports as boxes with arrows; then what differs from the config's defaults."""
    arrow = "<li class=arrow aria-hidden=true></li>"
    boxes = arrow.join(_box(box) for box in run.boxes or _stage_boxes(run))
    return f"<section><h2>Lineage</h2><ol class=lineage>{boxes}</ol>{_changes(run)}</section>"


def _stage_boxes(run: Run) -> list[Box]:
    base = next((stage.parent for stage in run.stages if stage.parent), "")
    boxes = [Box("base model", str(run.fields.get("model.path", "")).rstrip("/").rpartition("/")[2], base)]
    before = base
    for stage in run.stages:
        boxes.append(_stage_box(run, stage, before))
        before = stage.done.get("digest", "")
    return boxes


def _stage_box(run: Run, stage: Stage, before: str) -> Box:
    online = run.fields.get("pairs.mode") == "online"
    teacher = "base model" if stage is run.stages[0] or run.fields.get("pairs.teacher") == "base" else "stage before"
    words = [f"{'taught' if online else 'pairs'} by the {teacher}"]
    words += ["finished" if stage.done else f"{stage.steps:,} of {stage.total:,} steps" if stage.begun else "not begun"]
    words += ["exported"] if stage.windows in run.exports else []
    fault = ""
    if before and stage.parent and stage.parent != before:
        fault = f"starts from {stage.parent[:DIGITS]}, which is not the box before"
    kind = "done" if stage.done else "begun" if stage.begun else "waiting"
    return Box(stage.name, " · ".join(words), stage.done.get("digest", ""), fault, kind)


def _box(box: Box) -> str:
    code = f"<code>{text(box.digest[:DIGITS])}</code>" if box.digest else ""
    wrong = f"<em>{text(box.fault)}</em>" if box.fault else ""
    return f"<li class='box {box.kind}'><b>{text(box.title)}</b><span>{text(box.words)}</span>{code}{wrong}</li>"


def _changes(run: Run) -> str:
    if not run.config_name:
        return ""
    if not run.changes:
        return f"<p>The config is <code>--config={text(run.config_name)}</code> as it comes.</p>"
    rows = "".join(
        f"<tr><td><code>{field(one.field)}</code></td><td>{text(one.value)}</td><td>{text(one.default)}</td></tr>"
        for one in run.changes
    )
    head = "<tr><th>field</th><th>this run</th><th>default</th></tr>"
    count = f"{len(run.changes)} field{'s differ' if len(run.changes) > 1 else ' differs'}"
    return (
        f"<details {'open' if len(run.changes) <= 12 else ''}><summary>{count} from "
        f"<code>--config={text(run.config_name)}</code></summary>"
        f"<div class=wide><table class=changes><thead>{head}</thead><tbody>{rows}</tbody></table></div></details>"
    )


def curve_charts(run: Run) -> str:
    """The numbers of every stage that has lines, and the panels."""
    parts = [f"<div class=charts>{''.join(map(panel_chart, run.panels))}</div>"] if run.panels else []
    for stage in run.stages:
        series = [series_of(stage.lines, one.number, stage.windows, one.beyond_one) for one in stage.curves]
        charts = [chart(one.title, rows, stage.total, one.note) for one, rows in zip(stage.curves, series, strict=True)]
        if any(charts):
            parts.append(f"<h3>{text(stage.name.capitalize())}{_rate(stage)}</h3><div class=charts>{''.join(charts)}</div>")
    return f"<section><h2>Curves</h2>{''.join(parts)}</section>" if parts else ""


def panel_chart(panel: Panel) -> str:
    """A chart with labels of its own below it."""
    return chart(panel.title, panel.series, max(panel.ticks), panel.note, panel.ticks)


def _rate(stage: Stage) -> str:
    state = "finished" if stage.done else "under way"
    return f" <small>{state}, {stage.steps:,} of {stage.total:,} steps</small>"


def tables(run: Run) -> str:
    """The tables of `evaluate`, the best cells marked."""
    return "".join(f"<section><h2>{text(table.title)}</h2>{grid(table)}</section>" for table in run.tables)


def grid(table: Table) -> str:
    """A table with its marks, picture and notes."""
    best = best_cells(table)
    head = "".join(f"<th>{text(title)}</th>" for title in table.heads)
    row = lambda i, cells: "".join(
        f"<td class=best>{text(cell)}</td>" if (i, j) in best else f"<td>{text(cell)}</td>" for j, cell in enumerate(cells)
    )
    body = "".join(f"<tr>{row(i, cells)}</tr>" for i, cells in enumerate(table.cells))
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in table.notes)
    mark = "<p class=note><span class=best>marked</span>: the best student of the column.</p>" if best else ""
    image = f"<div class=wide><img class=sheet alt='samples: a row a method' src='{table.picture}'></div>"
    whole = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>" if table.heads else ""
    return f"{whole}{mark}{image if table.picture else ''}{notes}"


def best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of the best among the rows that are compared, of every column that has a better end; equals share."""
    if table.best is not None:
        return set(table.best)
    best: set[tuple[int, int]] = set()
    for j, better in enumerate(table.better):
        values = {i: value for i in table.compared if (value := leading_number(table.cells[i][j])) is not None}
        if better and len(values) > 1:
            top = (min if better == "less" else max)(values.values())
            best |= {(i, j) for i, value in values.items() if value == top}
    return best


def leading_number(cell: str) -> int | float | None:
    """The number at the beginning of a cell: 12.3 of "12.3 +- 0.4"; None if there is none."""
    match = NUMBER.match(cell.strip())
    return float(match[0].replace(",", "")) if match else None


def spending(run: Run) -> str:
    """Network calls, device hours, disk, and what the host waited for."""
    spent = costs(run)
    facts = "".join(f"<div><dt>{text(title)}</dt><dd>{text(value)}</dd></div>" for title, value in spent.facts)
    rows = "".join(_waits(title, shares) for title, shares in spent.waits)
    waits = f"<h3>What this host did while training</h3><ul class=waits>{rows}</ul>{WAITS}" if rows else ""
    return f"<section><h2>Costs</h2><dl class=facts>{facts}</dl>{waits}</section>"


WAITS = (
    "<p class=note><i class=c0></i>waited for the devices <i class=c1></i>waited for the input "
    "<i class=c2></i>worked, on a CPU also at the steps themselves</p>"
    "<p class=note>While the host waits for the devices they are busy, as they should be; while it waits for the input they "
    "stand still.</p>"
)


def _waits(title: str, shares: Sequence[int | float]) -> str:
    bars = "".join(f"<i class=c{i} style='width:{100 * share:.1f}%'></i>" for i, share in enumerate(shares))
    words = " / ".join(f"{number(100 * share)} %" for share in shares)
    return f"<li><span>{text(title)}</span><i class=bar>{bars}</i><span>{words}</span></li>"
