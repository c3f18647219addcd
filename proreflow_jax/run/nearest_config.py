"""A config beside the package's own ones: which is nearest, in which fields it differs, whether it has them all."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.evaluation.page.facts import Change
from proreflow_jax.run import config_files
from proreflow_jax.run.check_config import flat
from proreflow_jax.run.read_config import read_config

OWN = ("name", "root")  # fields that every run sets
STAGES, PRETRAINING, GRID = "stages", "diffusion.steps", "reproduce.methods"  # fields that tell what a config is for
FLOW = "flow.shift"  # likewise: a base model's training as a rectified flow, whose blocks are not those of a UNet's
FORMS = ("reproduce", "reproduce:quick", "reproduce:lab", "reproduce:flow")  # of a grid; its other words are single methods
LONGEST = 200  # letters of a value


def compare(fields: Mapping[str, Any]) -> tuple[str, list[Change]]:
    """(name, changed fields) of the package's config that differs in fewest fields; ("", []) without fields to compare.

    fields: of a run's config, by dotted names; JSON's lists count as the tuples that they were.
    """
    values = {name: plain(value) for name, value in fields.items() if name not in OWN}
    if not values:
        return "", []
    rows = {name: _changes(values, default) for name, default in defaults(_kind(values)).items()}
    name = min(rows, key=lambda one: (len(rows[one]), one != fields.get("name"), one))
    return name, rows[name]


def check_whole(config: ConfigDict) -> None:
    """Raises UserError if a config file lacks a field that all of the package's own configs of its kind have."""
    fields = flat(config)
    if _kind(fields) not in fields:
        return
    known = [_with_blocks(values) for values in defaults(_kind(fields)).values()]
    if missing := set.intersection(*known) - _with_blocks(fields):
        first = min(missing, key=lambda name: (name.count("."), name))
        raise UserError(f"--config lacks {first}: take it over from the package's own configs, or begin with one of them")


def _with_blocks(names: Iterable[str]) -> set[str]:
    """Dotted names, and the blocks that they lie in."""
    return {".".join(parts[:k]) for parts in (name.split(".") for name in names) for k in range(1, len(parts) + 1)}


def _changes(values: Mapping[str, Any], default: Mapping[str, Any]) -> list[Change]:
    fields = [name for name in sorted(values) if name not in default or default[name] != values[name]]
    return [Change(name, _said(default[name]) if name in default else "not there", _said(values[name])) for name in fields]


def _kind(fields: Mapping[str, Any]) -> str:
    """A field that tells what a config is for."""
    return next((field for field in (FLOW, PRETRAINING, GRID) if field in fields), STAGES)


@cache
def defaults(kind: str = STAGES) -> dict[str, dict[str, Any]]:
    """{name: fields} of the package's own configs of a kind: of stages, of a base model's training (two), or of a grid."""
    names = FORMS if kind == GRID else [name for name in config_files.own_names() if name not in FORMS]
    configs = {name: read_config(name) for name in names}
    fields = {name: {f: plain(v) for f, v in flat(config).items()} for name, config in configs.items()}
    return {name: values for name, values in fields.items() if kind in values and kind == _kind(values)}


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _said(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
