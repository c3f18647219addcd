"""The numbers on a card: those that `evaluate` measured on these very weights, by their digest, and no others."""

import logging

from proreflow_jax import UserError
from proreflow_jax.exports.card_words import STATEMENT, one_line
from proreflow_jax.exports.formats import Format
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
TABLES = ("table.json", "scores.json")  # of a run's folder: rows with the digest of their weights and a statement


def measured_numbers(run: Location, digest: str) -> list[str]:
    """The statements of a run's tables about the weights of this digest; [] if there are none, or the table is damaged."""
    statements = []
    for name in TABLES:
        if not (run / name).is_file():
            continue
        try:
            rows = atomic.read_json(run / name).get("rows")
        except UserError as error:
            log.warning("%s: the card of the export has no numbers of it", error)
            continue
        own = [row for row in rows if isinstance(row, dict) and row.get("digest") == digest] if isinstance(rows, list) else []
        statements += [one_line(row["statement"], STATEMENT) for row in own if isinstance(row.get("statement"), str)]
    return statements


def carries_numbers(export_format: Format, factors: bool) -> bool:
    """Whether an export draws as the weights do that were measured: it holds all of them, or the very factors trained."""
    return export_format.form in ("diffusers", "single-file") or export_format.form == "lora" and factors
