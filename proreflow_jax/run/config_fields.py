"""Fields of a config by their dotted names: values, changes, flags."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

Change = dict[str, Any]  # {field: value}, as --config.field=value


def changed(config: ConfigDict, change: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values, locked."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(dict(change))
    return copy.lock()


def flags(change: Mapping[str, Any]) -> str:
    """The change as one writes it on the command line."""
    return " ".join(f"--config.{field}={value}" for field, value in change.items())


def has_field(config: ConfigDict, field: str) -> bool:
    """Whether the config has a field of this dotted name."""
    for name in field.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def field_value(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted name, as in --config.train.batch."""
    for name in field.split("."):
        config = config[name]
    return config
