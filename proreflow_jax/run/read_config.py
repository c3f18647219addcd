"""Configs for Python: a config file by path or name, or a run's config.json, with overrides; checked as --config is."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.run.check_config import changed as with_fields
from proreflow_jax.run.check_config import has_field
from proreflow_jax.run.config_files import importable, locate
from proreflow_jax.run.ranges import check_ranges
from proreflow_jax.storage import atomic
from proreflow_jax.storage.paths import Location

CONFIG = "config.json"  # of a run: the config of its first start
YOUNG = "finetune"  # the config whose values stand for fields that an older run's record lacks: nothing is changed by them


def read_config(config: ConfigDict | str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """A config with other values, checked and locked.

    Args:
      config: a ConfigDict, a config file ("mine.py", or "mine.py:word" for one that takes a word), the name of one of this
        project's configs ("digits"), or a run's config.json.
      overrides: {"train.batch": 32, "stages": (4, 2)}, as --config.train.batch=32 on the command line.

    Raises UserError, one line, for a file or field that is not there, or a value that cannot be.
    """
    if not isinstance(config, ConfigDict):
        config = read_record(Path(config)) if str(config).endswith(".json") else _run_file(str(config))
    config = changed(config, overrides or {})
    check_ranges(config)
    return config


def changed(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A copy with other values, locked. Raises UserError, one line, for a field that is not there, or another type."""
    if unknown := [field for field in overrides if not has_field(config, field)]:
        raise UserError(f"overrides={dict(overrides)}: the config has no field {unknown[0]}")
    try:
        return with_fields(config, overrides)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"overrides={dict(overrides)}: {atomic.one_line(error)}") from None


def read_record(path: Location) -> ConfigDict:
    """The config in a run's config.json; fields that there were not yet have YOUNG's values. Raises as `atomic.read_json`."""
    record = _tuples(atomic.read_json(path))
    return ConfigDict(_filled(record, _run_file(YOUNG).to_dict())).lock()


def _filled(record: dict[str, Any], young: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the fields that it lacks, block by block."""
    both = [name for name in record if isinstance(record[name], dict) and isinstance(young.get(name), dict)]
    blocks = {name: _filled(record[name], young[name]) for name in both}
    return {**young, **record, **blocks}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {name: _tuples(item) for name, item in value.items()} if isinstance(value, dict) else value


def _run_file(name: str) -> ConfigDict:
    """What get_config of a config file returns; the file's own errors are its author's."""
    path, _, word = locate(name, "config").partition(":")
    spec = importlib.util.spec_from_file_location(f"proreflow_config_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    with importable(Path(path)):
        spec.loader.exec_module(module)
        return module.get_config(*([word] if word else []))
