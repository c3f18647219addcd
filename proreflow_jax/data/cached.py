"""A dataset of latents in place of images, and of text states if wished, computed by a model beforehand.

The verb `cache` writes it as records, one for each example of the source, in the source's order. So the numbers of the
examples, and with them order, noise and pairs, are those of the images themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import records
from proreflow_jax.data.images import LINE_LIMIT, check_index
from proreflow_jax.storage import atomic

NAME = "cache"  # of these records in the plan


def padded(captions: Sequence[str]) -> UInt8[np.ndarray, "b {LINE_LIMIT}"]:
    """Captions as rows of bytes of one length, so that they travel as an array; zeros, which none holds, fill them up."""
    return np.stack([np.frombuffer(caption.encode("utf-8").ljust(LINE_LIMIT, b"\0"), np.uint8) for caption in captions])


def record(index: int, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The record of example `index`: its number, its caption's bytes, its latents and text states."""
    words = np.frombuffer(row["caption"].tobytes().rstrip(b"\0"), np.uint8)
    return {**row, "index": np.array(index, np.int64), "caption": words}


class Cached:
    """`source[i] -> {"caption": str, "mean", "std": (h, w, c)}`, and if kept "text" (s, d), SDXL's "pooled" (p,).

    Of the records' dtype; `mean` and `std` are the autoencoder's own, not scaled. `plan` names the data and the model.

    Raises: FileNotFoundError or ValueError, one line, if the folder holds no finished cache. Taking an example raises
    ValueError if its record is damaged or of another example.
    """

    def __init__(self, path: str | Path) -> None:
        self.name, folder = str(path), Path(path).expanduser()
        if not (folder / records.PLAN).is_file():
            raise MissingFile(f"{folder} holds no cache: --config.data.path must name the --out of the verb cache")
        self.plan = records.read_plan(folder)
        if self.plan.get("records") != NAME:
            raise UserError(f"{folder} holds other records than a cache: see --config.data.path")
        self._records = records.PairRecords(folder, verify=False)  # each record has its number and a checksum

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(index, len(self))
        record = self._records[index]
        if int(record.pop("index", -1)) != index:
            raise UserError(f"{self.name} holds another record where number {index} belongs: {records.REDO}")
        return {**record, "caption": record["caption"].tobytes().decode("utf-8")}


def cache_identity(path: str | Path) -> dict[str, str]:
    """The hash of the manifest, which lists the shards' names and hashes."""
    return {"cache": atomic.sha256(Path(path).expanduser() / records.MANIFEST)}
