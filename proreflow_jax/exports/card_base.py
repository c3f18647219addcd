"""What a card says of the base model: its id on the hub, its licence, how a tool opens it."""

import logging
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from proreflow_jax.data.credits import credit_lines
from proreflow_jax.exports.card_words import HUB_ID, LICENCE_ID, LINK, one_line
from proreflow_jax.pretrained import copying, sources
from proreflow_jax.pretrained.sources import ModelSource
from proreflow_jax.run.config_files import PACKAGE
from proreflow_jax.run.find_model import home

log = logging.getLogger(__name__)
DIGITS = PACKAGE / "assets" / "digits"  # the smallest base model
PAGE_LIMIT = 1 << 20  # bytes of a model's page that are read


def describe_base(config: ConfigDict, base: ModelSource) -> dict[str, Any]:
    """Of the base model, for the card.

    base_model: its id on the hub, "" for a folder or file; of a student of ours that of its own base.
    opens: what `from_pretrained` takes to open it: the id, or the name of the folder or file.
    configs: of a single file, where its configs are: hub id or name; else "".
    family: "v1", "v2", "xl" or "sd3".
    licence: fields of a card's header on the hub; {} where the model names none.
    """
    path, before = config.model.path, base.student.get("about", {})
    like = (config.model.like or home(base.file)) if base.file else ""
    return {
        "base_model": path if sources.is_id(path) and HUB_ID.fullmatch(path) else before.get("base_model", ""),
        "opens": path if sources.is_id(path) else base.origin.name,
        "configs": like if not like or sources.is_id(like) else Path(like).name,
        "family": base.family,
        "licence": {} if base.file else before.get("licence") or read_licence(base.folder),
    }


def data_credits(config: ConfigDict, base: ModelSource) -> list[str]:
    """Whose pictures the base model or the student was trained on, in Markdown, where the package knows it."""
    known = [config.data.kind, "digits"] if base.folder == DIGITS else [config.data.kind]
    return base.student.get("about", {}).get("credits") or credit_lines(known, _page(base.folder))


def read_licence(folder: Path) -> dict[str, str]:
    """The licence that the page of a model's folder names in its header, or a LICENSE file beside the components; else {}."""
    stated = _page_header(folder)
    if isinstance(name := stated.get("license"), str) and LICENCE_ID.fullmatch(name):
        licence = {"license": name}
        if isinstance(own := stated.get("license_name"), str):
            licence["license_name"] = one_line(own)
        if isinstance(link := stated.get("license_link"), str) and LINK.fullmatch(link):
            licence["license_link"] = link
        return licence
    files = copying.licences(folder)
    return {"license": "other", "license_name": "of-the-base-model", "license_link": files[0].name} if files else {}


def _page_header(folder: Path) -> dict[str, Any]:
    """The YAML header of a model's page; {} of one that has none, or none that can be read."""
    parts = _page(folder).split("\n---", 1)
    if len(parts) < 2 or not parts[0].startswith("---\n"):
        return {}
    try:
        value = yaml.safe_load(parts[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        log.info("%s: the header of its page cannot be read, the card of the export names no licence", folder)
        return {}
    return value if isinstance(value, dict) else {}


def _page(folder: Path) -> str:
    """The text of a model's page; "" if there is none. Raises UserError, one line, for a link out of the model's folder."""
    if (path := copying.page(folder)) is None:
        return ""
    with path.open("rb") as file:
        return file.read(PAGE_LIMIT).decode("utf-8", "replace")
