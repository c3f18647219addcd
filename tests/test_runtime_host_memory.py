"""A save leaves nothing behind in the memory of the host."""

import gc
import sys
from pathlib import Path

import jax.numpy as jnp
import tensorstore

from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.host_memory import REMEMBERED, keep_nothing

ARRAYS, SAVES = 150, 6


def spec(path: str) -> tensorstore.KvStore.Spec:
    return tensorstore.KvStore.Spec({"driver": "file", "path": path})


def test_saves_keep_no_object_for_each_array(tmp_path: Path) -> None:
    state = {f"weight.{k}": jnp.full((4,), k) for k in range(ARRAYS)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        kept = []
        for step in range(SAVES):
            checkpoints.save(step, state, {})
            checkpoints.wait()
            gc.collect()
            kept.append(sys.getallocatedblocks())
    assert kept[-1] - kept[1] < (SAVES - 2) * ARRAYS, kept  # tensorstore alone keeps six for each


def test_a_remembered_spec_is_that_of_tensorstore() -> None:
    keep_nothing()
    keep_nothing()
    for path in [f"/tmp/{k}/" for k in range(2 * REMEMBERED)] * 2:
        assert spec(path).to_json() == {"driver": "file", "path": path}
    assert spec("/a/").to_json(include_defaults=True) != spec("/a/").to_json()


def test_a_changed_answer_changes_no_other() -> None:
    keep_nothing()
    spec("/b/").to_json()["path"] = "changed"
    assert spec("/b/").to_json()["path"] == "/b/"
