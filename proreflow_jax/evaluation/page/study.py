"""What `evaluate --study` measured, as a part of a run's page: curves, tables with their spread, settings."""

from proreflow_jax.evaluation.page.facts import Run
from proreflow_jax.evaluation.page.markup import text
from proreflow_jax.evaluation.page.sections import grid, panel_chart


def study(run: Run) -> str:
    """Curves first, then the numbers with their spread."""
    if run.study is None:
        return ""
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in run.study.notes)
    charts = "".join(panel_chart(panel) for panel in run.study.panels)
    tables = "".join(f"<h3>{text(table.title)}</h3>{grid(table)}" for table in run.study.tables)
    return f"<section><h2>Study</h2>{notes}<div class=charts>{charts}</div>{tables}</section>"
