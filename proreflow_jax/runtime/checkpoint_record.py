"""What is stored beside the arrays of a checkpoint: the caller's meta, each leaf's dtype, shape and digest, and a seal.

The seal is a SHA-256 over all of it, so that a flipped bit in a data position is seen like one in a weight.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax


def inventory(step: int, leaves: Mapping[str, jax.Array], digests: Mapping[str, str], meta: Any) -> dict[str, Any]:
    """{step, meta, leaves: {path: [dtype, shape, digest]}, seal}. Raises TypeError if `meta` is no JSON."""
    table = {path: [str(leaf.dtype), list(leaf.shape), digests[path]] for path, leaf in leaves.items()}
    record = {"step": step, "meta": meta, "leaves": table}
    return {**record, "seal": _seal(record)}


def check_seal(record: Mapping[str, Any], step: int) -> None:
    """Raises ValueError (or KeyError) if the inventory is damaged or belongs to another step."""
    if record["seal"] != _seal(record):
        raise ValueError("meta is not what was saved")
    if record["step"] != step:
        raise ValueError(f"it is the checkpoint of step {record['step']} under another name")


def check_target(record: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str) -> None:
    """Raises one ValueError that lists every missing, unexpected and different leaf; `where` opens the sentence."""
    table = {path: (dtype, shape) for path, (dtype, shape, _) in record["leaves"].items()}
    kinds = {path: (str(leaf.dtype), list(leaf.shape)) for path, leaf in wanted.items()}
    faults = [
        *(f"{path} is missing" for path in sorted(kinds.keys() - table.keys())),
        *(f"{path} is not expected" for path in sorted(table.keys() - kinds.keys())),
        *(
            f"{path} is {table[path][0]}{table[path][1]}, not {kinds[path][0]}{kinds[path][1]}"
            for path in sorted(kinds.keys() & table.keys())
            if table[path] != kinds[path]
        ),
    ]
    if faults:
        raise ValueError(f"{where} does not fit this config: {', '.join(faults)}; use the config it was trained with")


def wrong_values(record: Mapping[str, Any], digests: Mapping[str, str]) -> list[str]:
    """Paths of the leaves whose digest is not the one that was saved."""
    return [path for path, (_, _, expected) in record["leaves"].items() if digests[path] != expected]


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps({key: record[key] for key in ("step", "meta", "leaves")}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
