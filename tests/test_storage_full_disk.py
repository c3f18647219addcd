"""A disk that is full names the file that could not be written, and leaves the one that was there."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from proreflow_jax.evaluation import report
from proreflow_jax.run import cli
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.storage import atomic


@contextmanager
def full_disk(limit: int = 64) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PICTURE = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3)).astype(np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: atomic.write_text(path, "x" * 1000),
    "json": lambda path: atomic.write_json(path, ["x" * 1000]),
    "picture": lambda path: report.picture(path, [("a", PICTURE)], ["b"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / "written"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError) as failed:
        WRITERS[name](path)
    assert str(path) in cli.message(failed.value) and cli.exit_code(failed.value) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["written"] and path.read_text() == "old"
    WRITERS[name](path)
    assert path.stat().st_size > 64


def test_metrics_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, tensorboard=False) as metrics:
        metrics.write(1, {"loss": 1.0})
        with full_disk(), pytest.raises(OSError) as failed:
            for step in range(2, 20):
                metrics.write(step, {"loss": 1.0})
    assert str(tmp_path / "metrics.jsonl") in cli.message(failed.value) and cli.exit_code(failed.value) == 1
