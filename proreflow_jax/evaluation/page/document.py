"""The whole page: one file that loads nothing, and says so to the browser."""

from importlib.resources import files

from proreflow_jax.evaluation.page import gallery, sections, study
from proreflow_jax.evaluation.page.facts import Run
from proreflow_jax.evaluation.page.markup import text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def asset(name: str) -> str:
    """A text file of the page's own, from assets/page."""
    return (files("proreflow_jax") / "assets" / "page" / name).read_text(encoding="utf-8")


def document(run: Run) -> str:
    """A run's page as HTML."""
    stages = ", ".join(str(stage.windows) for stage in run.stages if stage.windows)
    about = f"{stages} windows · {run.folder}" if stages else run.folder
    parts = (sections.standing, gallery.gallery, sections.curve_charts, sections.tables, study.study)
    parts += (sections.lineage, sections.spending)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f"<title>{text(run.name)}</title><style>{asset('style.css')}</style></head>"
        f"<body><main><header><h1>{text(run.name)}</h1><p class=note>{text(about)}</p></header>"
        f"{''.join(part(run) for part in parts)}</main><script>{asset('script.js')}</script></body></html>\n"
    )
