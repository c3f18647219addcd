"""The chain on gs://, against a stand-in: killed and resumed it ends as the local run does, and every verb reads it."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fake_gcs
import pytest
import tiny
from verb import ROOT, environment, tiny_flags

from proreflow_jax.storage import gcs

PATIENCE = 900  # seconds, for machines that do other things too
RUN, MODEL = "gs://bucket/runs/tiny", "gs://bucket/models/sd"
SHARD, SAVING = f"{RUN}/stage-4/pairs/pairs-00000-of-00002.array_record", f"{RUN}/stage-4/checkpoints/4/"


class Place(NamedTuple):
    """A folder with a model and a finished local run, and a store that holds the same model."""

    folder: Path
    store: fake_gcs.Store

    def command(self, verb: str, *words: str, **fields: object) -> dict:
        """Arguments of subprocess for a verb on the store's run."""
        flags = tiny_flags(self.folder, MODEL, **{"root": "gs://bucket/runs", **fields})
        kept = {"PROREFLOW_CACHE": str(self.folder / "cache")}
        return {
            "args": [sys.executable, "-m", f"proreflow_jax.{verb}", *flags, *words],
            "env": environment(self.folder / "programs", devices=1) | self.store.environment() | kept,
            "cwd": ROOT,
            "text": True,
            "stderr": subprocess.PIPE,
            "stdout": subprocess.DEVNULL,
        }

    def run(self, verb: str, *words: str, **fields: object) -> tuple[int, str]:
        ended = subprocess.run(**self.command(verb, *words, **fields), timeout=PATIENCE)
        return ended.returncode, ended.stderr

    def kill(self, point: str) -> None:
        """Starts distill and kills it as soon as an object of that name, or below it, appears."""
        with subprocess.Popen(**self.command("distill")) as process:
            try:
                deadline = time.monotonic() + PATIENCE
                while not self.store.names(point):
                    assert process.poll() is None, f"ended before {point} appeared: {process.stderr.read()}"
                    assert time.monotonic() < deadline, f"{point} never appeared"
                    time.sleep(0.001)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("storage")
    tiny.write_model(folder / "model")
    with fake_gcs.serve("bucket") as store:
        for file in (file for file in (folder / "model").rglob("*") if file.is_file()):
            store.buckets["bucket"].put(f"models/sd/{file.relative_to(folder / 'model')}", file.read_bytes(), {})
        yield Place(folder, store)


def last(errors: str) -> str:
    """The one line that the user reads; no traceback above it."""
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


@pytest.mark.slow  # half a minute: the verb's own process imports all that speaks to the store
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"root": "gs://nothing/runs"}, "the bucket gs://nothing does not exist"),
        pytest.param({"root": "gs://forbidden/runs"}, "no right to use gs://forbidden", marks=pytest.mark.slow),
        pytest.param({"root": "s3://bucket/runs"}, "--config.root=s3://bucket/runs", marks=pytest.mark.slow),
        pytest.param({"model__path": "gs://bucket/models/none"}, "gs://bucket/models/none", marks=pytest.mark.slow),
        pytest.param({"data__path": "gs://bucket/none.txt"}, "gs://bucket/none.txt", marks=pytest.mark.slow),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_one_line_and_exit_2(place, fields, named):
    before = place.store.names("gs://bucket/")
    code, errors = place.run("distill", **fields)
    assert code == 2 and named in last(errors)
    assert place.store.names("gs://bucket/") == before


def results(read: object, names: list[str]) -> dict[str, object]:
    """What must be equal: pairs, DONE.json, losses, exported weights; `names` are relative to the run."""
    kept = [n for n in sorted(names) if n.endswith((".array_record", "DONE.json", "diffusion_pytorch_model.safetensors"))]
    found = {name: hashlib.sha256(read(name)).hexdigest() for name in kept}
    lines = [json.loads(line) for n in (4, 2) for line in read(f"stage-{n}/metrics.jsonl").decode().splitlines()]
    return found | {"losses": [(line["step"], line["loss"]) for line in lines]}


@pytest.mark.slow
def test_killed_on_gs_a_run_ends_as_the_local_one(place):
    assert place.run("distill", root=place.folder / "runs", model__path=place.folder / "model")[0] == 0
    local = place.folder / "runs" / "tiny"
    names = [str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()]
    whole = results(lambda name: (local / name).read_bytes(), names)
    assert len(whole) == 4 + 2 + 4 + 1

    for point in (SHARD, SAVING):
        place.kill(point)
        assert place.store.names(f"{RUN}/{gcs.LOCK}")  # left by the kill
    code, errors = place.run("distill")
    assert code == 0, errors
    held = [name.removeprefix("runs/tiny/") for name in place.store.names(f"{RUN}/")]
    assert results(lambda name: place.store.data(f"{RUN}/{name}"), held) == whole
    assert not [name for name in held if name.endswith((gcs.LOCK, ".writing"))]
    assert not list(Path(ROOT).glob("gs:*"))  # nothing took the url for a local path

    verbs = {
        "make_pairs": ("--stage=2",),
        "train": ("--stage=2",),
        "sample": ("--stage=2", "--count=1", "--out=gs://bucket/pictures/a.png"),
        "export": ("--stage=2", "--form=delta", "--out=gs://bucket/delta"),
        "merge": ("--delta=gs://bucket/delta", "--out=gs://bucket/models/merged"),
    }
    for verb, words in verbs.items():
        code, errors = place.run(verb, *words)
        assert code == 0, errors
    assert place.store.data("gs://bucket/pictures/a.png").startswith(b"\x89PNG")
    merged = place.store.data("gs://bucket/models/merged/unet/diffusion_pytorch_model.safetensors")
    assert len(merged) == len(place.store.data(f"{RUN}/export/stage-2/unet/diffusion_pytorch_model.safetensors"))

    digits = {"data__kind": "digits", "data__path": place.folder / "digits"}
    code, errors = place.run("evaluate", **digits)
    assert code == 0, errors
    assert {"table.json", "table.md", "samples.png", "report.html"} <= {n.split("/")[-1] for n in place.store.names(RUN)}


@pytest.mark.slow
def test_a_store_that_refuses_midway_ends_the_run_in_one_line_and_it_can_go_on(place):
    with subprocess.Popen(**place.command("distill", name="refused")) as process:
        while not place.store.names("gs://bucket/runs/refused/stage-4/checkpoints/2/"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        place.store.broken = 403
        try:
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            place.store.broken = 0
            process.kill()
    assert process.returncode == 1 and "gs://bucket/runs" in last(errors), errors
    code, errors = place.run("distill", name="refused")
    assert code == 0, errors
