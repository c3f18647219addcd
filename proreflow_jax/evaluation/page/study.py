"""Measured curves as a part of a run's page, with their tables and settings: of `evaluate --study`, of a grid of methods."""

from proreflow_jax.evaluation.page.charts import chart
from proreflow_jax.evaluation.page.facts import Panel, Run
from proreflow_jax.evaluation.page.markup import text
from proreflow_jax.evaluation.page.sections import grid


def study(run: Run) -> str:
    """Curves first, then the numbers with their spread."""
    if run.study is None:
        return ""
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in run.study.notes)
    charts = "".join(_panel(panel) for panel in run.study.panels)
    tables = "".join(f"<h3>{text(table.title)}</h3>{grid(table)}" for table in run.study.tables)
    return f"<section><h2>{text(run.study.title)}</h2>{notes}<div class=charts>{charts}</div>{tables}</section>"


def _panel(panel: Panel) -> str:
    return chart(panel.title, panel.series, max(panel.ticks), panel.note, panel.ticks)
