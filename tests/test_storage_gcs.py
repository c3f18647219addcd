"""Laws of gs:// paths, on a stand-in: what is there is whole, a lock has one holder, copies are exact, errors are one line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_records import NAMES, PLAN, contents, finished, write

from proreflow_jax import MissingFile, RunFailed
from proreflow_jax.data import records
from proreflow_jax.evaluation.page.serve import run_folders, version
from proreflow_jax.jobs.run_page import write_page
from proreflow_jax.run.read_config import read_config
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.processes import job_lock
from proreflow_jax.storage import atomic, gcs, lock, paths
from proreflow_jax.storage.lock import lock_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[fake_gcs.Store]:
    """One store for the file: clients keep the address that they saw first."""
    with pytest.MonkeyPatch.context() as patch, fake_gcs.serve("bucket") as store:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        gcs.client.cache_clear()
        yield store
        gcs.client.cache_clear()


@pytest.fixture
def store(server: fake_gcs.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_gcs.Store]:
    """An empty bucket, and a cache of the test's own."""
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    server.buckets["bucket"].objects.clear()
    server.log.clear()
    yield server
    server.broken = 0


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that live for a second."""
    for name, value in {"BEAT_S": 0.1, "EXPIRY_S": 1.0, "LOOK_S": 0.05}.items():
        monkeypatch.setattr(lock, name, value)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_local_path_stays_what_it_was():
    assert paths.parse_path("runs") == Path("runs") and paths.parse_path("/a/../b") == Path("/a/../b")
    assert paths.local_copy(Path("nowhere")) == Path("nowhere")
    assert paths.check_reachable(Path("nowhere")) is None


@pytest.mark.parametrize(
    "text", ["s3://bucket/runs", "http://x/y", "gs://bucket", "gs:///runs", "gs://b/../x", "gs://bucket/a//b", "GS://bucket/a"]
)
def test_another_url_is_refused_by_its_flag(text):
    with pytest.raises(ValueError, match="--config.root=") as error:
        paths.parse_path(text)
    assert text in one_line(error) and "gs://bucket/folder" in one_line(error)


def test_an_object_path_has_the_words_of_a_path(store):
    root = paths.parse_path("gs://bucket/runs/")
    path = root / "a" / "x.json"
    assert (str(path), path.name, path.suffix, path.parent.name) == ("gs://bucket/runs/a/x.json", "x.json", ".json", "a")
    assert path == root / "a/x.json" and path.with_name("y") == root / "a" / "y"
    assert not path.exists() and not root.is_dir()
    path.write_text("ä\r\n")
    (root / "a.json").write_bytes(b"1")
    assert path.read_text() == "ä\r\n" and path.stat().st_size == 4 and path.is_file() and not path.is_dir()
    assert root.is_dir() and not root.is_file() and (root / "a").exists()
    assert not paths.parse_path("gs://bucket/run").exists()  # a prefix of letters is no folder
    assert list(root.iterdir()) == [root / "a", root / "a.json"] and list(root.glob("*.json")) == [root / "a.json"]
    with pytest.raises(FileNotFoundError, match="gs://bucket/runs/b does not exist"):
        (root / "b").read_text()
    with pytest.raises(TypeError):
        Path(path)  # never taken for a local file
    path.unlink()
    path.unlink(missing_ok=True)
    assert store.names("gs://bucket/") == ["runs/a.json"]


def test_a_buffer_is_put_only_if_its_block_ends_well(store):
    path = paths.parse_path("gs://bucket/table.png")
    with pytest.raises(RuntimeError), path.open("wb") as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert not path.exists()
    with path.open("wb") as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_a_large_file_arrives_byte_for_byte(store, tmp_path):
    data = np.random.default_rng(0).bytes((9 << 20) + 3)  # past what is sent in one request
    (tmp_path / "big").write_bytes(data)
    paths.parse_path("gs://bucket/big").upload(tmp_path / "big")
    assert store.data("gs://bucket/big") == data
    assert paths.local_copy(paths.parse_path("gs://bucket/big")).read_bytes() == data


def test_of_many_that_create_one_wins(store):
    path, won = paths.parse_path("gs://bucket/plan.json"), []

    def create(i: int) -> None:
        try:
            path.put(str(i).encode(), replace=False)
            won.append(str(i))
        except FileExistsError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(16)))
    assert [path.read_text()] == won


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bucket", "kind"), [("nothing", FileNotFoundError), (fake_gcs.FORBIDDEN, ValueError)])
def test_a_bucket_that_cannot_be_used_is_named_in_one_line(store, bucket, kind):
    where = paths.parse_path(f"gs://{bucket}/runs")
    for ask in (paths.check_reachable, paths.local_copy):
        with pytest.raises(kind) as error:
            ask(where)
        assert f"gs://{bucket}" in one_line(error)
    with pytest.raises(OSError, match=f"gs://{bucket}/runs/x"):
        atomic.write_json(where / "x", 1)


def test_without_a_network_one_line_says_so_soon(store, monkeypatch):
    monkeypatch.setattr(gcs, "QUICK_S", 0.5)
    store.broken = 503
    with pytest.raises(ValueError, match="gs://bucket cannot be reached") as error:
        paths.check_reachable(paths.parse_path("gs://bucket/runs"))
    one_line(error)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    gcs.client.cache_clear()
    with pytest.raises(ValueError, match="gs://bucket cannot be reached") as error:
        paths.check_reachable(paths.parse_path("gs://bucket/runs"))
    one_line(error)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
    gcs.client.cache_clear()


def test_a_missing_package_is_named(store, monkeypatch):
    gcs.client.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gcsfs, which is not installed: pip install gcsfs .*\(the extra `gcs`\)"):
        paths.check_reachable(paths.parse_path("gs://bucket/runs"))


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_follows_the_store(store):
    folder = paths.parse_path("gs://bucket/models/sd")
    for name in ("model_index.json", "unet/config.json", "unet/weights"):
        (folder / name).write_text(name)
    (folder / ".lock").write_text("")
    first = paths.local_copy(folder)
    assert first.name == "sd" and sorted(p.name for p in first.rglob("*")) == [
        "config.json",
        "model_index.json",
        "unet",
        "weights",
    ]
    fetched = lambda: sum(path.startswith("/download") for _, path in store.log)
    before = fetched()
    assert paths.local_copy(folder) == first and fetched() == before == 3

    (folder / "unet/weights").write_text("new")
    (folder / "model_index.json").unlink()
    second = paths.local_copy(folder)
    assert (second / "unet/weights").read_text() == "new" and not (second / "model_index.json").exists()
    assert (first / "unet/weights").read_text() == "unet/weights" and fetched() == before + 1  # readers keep what they have


def test_of_a_folder_some_files_are_copied_and_no_others_fetched(store):
    folder = paths.parse_path("gs://bucket/pairs")
    for name in ("plan.json", "0.array_record", "1.array_record"):
        (folder / name).write_text(name)
    fetched = lambda: [path for _, path in store.log if path.startswith("/download")]
    some = paths.local_copy(folder, names={"plan.json", "1.array_record", "2.array_record"})
    assert sorted(p.name for p in some.iterdir()) == ["1.array_record", "plan.json"] and len(fetched()) == 2
    assert len(list(paths.local_copy(folder).iterdir())) == 3 and len(fetched()) == 3  # the third file alone
    assert paths.local_copy(folder, names={"plan.json", "1.array_record"}) == some


def test_a_copy_that_lost_a_file_is_made_again(store):
    paths.parse_path("gs://bucket/data/x").write_text("12")
    copy = paths.local_copy(paths.parse_path("gs://bucket/data"))
    (copy / "x").unlink()
    assert (paths.local_copy(paths.parse_path("gs://bucket/data")) / "x").read_text() == "12"


def test_an_object_that_changes_while_it_is_copied_is_no_mixture(store, monkeypatch):
    folder = paths.parse_path("gs://bucket/data")
    for i in range(3):
        (folder / str(i)).write_text("old")
    listed = folder.objects()
    (folder / "1").write_text("new")
    monkeypatch.setattr(paths, "_listed", lambda *_: listed)
    with pytest.raises(OSError, match="was changed while it was copied"):
        paths.local_copy(folder)


@pytest.mark.parametrize("name", ["../../evil", "a/../../b", "a//b", "..\\b"])
def test_a_name_that_leaves_the_folder_is_refused(store, name):
    store.buckets["bucket"].put(f"data/{name}", b"", {})
    with pytest.raises(ValueError, match="no plain path"):
        paths.local_copy(paths.parse_path("gs://bucket/data"))


# --- whole folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_whole_or_marked_unfinished(store, monkeypatch):
    folder = paths.parse_path("gs://bucket/export/stage-4")
    with pytest.raises(RuntimeError), atomic.atomic_folder(folder):
        raise RuntimeError("stop")
    assert store.names("gs://bucket/") == []  # nothing was begun

    def fill(draft: Path, text: str) -> None:
        (draft / "unet").mkdir()
        for name in ("card.json", "unet/weights"):
            (draft / name).write_text(text)

    real, sent = gcs.ObjectPath.upload, []
    fail_second = lambda path, file: (sent.append(path), real(path, file) if len(sent) < 2 else path.read())
    monkeypatch.setattr(gcs.ObjectPath, "upload", fail_second)
    with pytest.raises(FileNotFoundError), atomic.atomic_folder(folder) as draft:
        fill(draft, "half")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished"):
        paths.local_copy(folder)

    with atomic.atomic_folder(folder) as draft:  # its own remains are no obstacle
        fill(draft, "first")
    assert store.names("gs://bucket/") == ["export/stage-4/card.json", "export/stage-4/unet/weights"]
    with pytest.raises(ValueError, match="exists already"):
        atomic.atomic_folder(folder)
    with atomic.atomic_folder(folder, overwrite=True) as draft:
        (draft / "card.json").write_text("second")
    assert store.names("gs://bucket/") == ["export/stage-4/card.json"] and (folder / "card.json").read_text() == "second"


def test_shards_in_a_store_equal_those_on_a_disk(store, tmp_path):
    folder = paths.parse_path("gs://bucket/run/pairs")
    local = finished(tmp_path / "local")
    records.fix_plan(folder, PLAN)
    assert records.clean(folder) == [] and records.missing_shards(folder, PLAN) == [0, 1, 2]
    write(folder, PLAN, 1)
    (folder / NAMES[2]).write_bytes(b"without a marker")
    with pytest.raises(ValueError, match="takes 4 examples"):
        records.write_shard(folder, PLAN, 0, [])
    assert records.missing_shards(folder, PLAN) == [0, 2] and not records.publish(folder, PLAN)
    write(folder, PLAN, 0)
    write(folder, PLAN, 2)
    assert records.publish(folder, PLAN)
    copy = paths.local_copy(folder)
    assert contents(copy) == contents(local)
    assert len(records.PairRecords(copy)) == 10
    with pytest.raises(ValueError, match="fixed with seed = 7"):
        records.fix_plan(folder, {**PLAN, "seed": 8})
    (folder / NAMES[1]).write_bytes(b"shorter")
    assert records.missing_shards(folder, PLAN) == [1]


# --- lock -------------------------------------------------------------------------------------------------------------


def left_behind(folder: gcs.ObjectPath, **facts: object) -> None:
    """A lock whose holder is no more."""
    (folder / gcs.LOCK).write_text(json.dumps(lock.holder_record() | {"token": "other"} | facts))


def test_a_lock_has_one_holder_and_leaves_nothing(store, fast):
    folder = paths.parse_path("gs://bucket/run")
    with lock_folder(folder):
        first = (folder / gcs.LOCK).stat().generation
        with pytest.raises(lock.Locked, match=f"gs://bucket/run is in use by process {os.getpid()} on ") as error:
            with lock_folder(folder):
                pass
        one_line(error)
        time.sleep(0.5)
        assert (folder / gcs.LOCK).stat().generation != first  # it is renewed
    assert store.names("gs://bucket/") == []


def test_a_url_in_a_str_is_never_a_local_path(store, fast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with job_lock("gs://bucket/run"), Metrics("gs://bucket/run", 0) as log:
        assert store.names("gs://bucket/") == ["run/.lock"]
        atomic.write_json("gs://bucket/run/x.json", {"is": 1})
        log.write(1, {"loss": 1.0})
    assert atomic.read_json("gs://bucket/run/x.json") == {"is": 1} and "run/metrics.jsonl" in store.names("gs://bucket/")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_of_this_machine_is_taken_over_at_once(store):
    gone = subprocess.Popen(["sleep", "60"])
    facts = {"process": gone.pid, "started": lock._started(gone.pid)}
    gone.kill()
    while lock._started(gone.pid):  # dead, not yet buried: that is enough
        time.sleep(0.01)
    left_behind(paths.parse_path("gs://bucket/run"), **facts)
    began = time.monotonic()
    with lock_folder(paths.parse_path("gs://bucket/run")):
        assert time.monotonic() - began < lock.EXPIRY_S / 10
    gone.wait()
    left_behind(paths.parse_path("gs://bucket/run"), started="0")  # this process's number, given to another before
    with lock_folder(paths.parse_path("gs://bucket/run")):
        pass


def test_another_machine_is_believed_as_long_as_it_renews(store, fast, monkeypatch):
    folder = paths.parse_path("gs://bucket/run")
    machine = lock._machine()
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    with lock_folder(folder):
        monkeypatch.setattr(lock, "_machine", lambda: machine)
        with pytest.raises(lock.Locked):
            with lock_folder(folder):
                pass
    left_behind(folder, machine="another")
    began, entered = time.monotonic(), []

    def contend(_: int) -> None:
        try:
            with lock_folder(folder):
                entered.append(time.monotonic() - began)
                time.sleep(0.3)
        except lock.Locked:
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(contend, range(4)))
    assert len(entered) == 1 and entered[0] >= lock.EXPIRY_S  # one of four, and not before its time


def test_a_holder_that_was_frozen_ends_before_it_writes(store):
    code = """
import sys, time
from proreflow_jax.storage import lock, paths
from proreflow_jax.storage.lock import lock_folder
lock.BEAT_S = 0.2
with lock_folder(paths.parse_path("gs://bucket/run")):
    print("held", flush=True)
    time.sleep(60)
"""
    held = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    held.send_signal(signal.SIGSTOP)
    left_behind(paths.parse_path("gs://bucket/run"))
    held.send_signal(signal.SIGCONT)
    _, said = held.communicate(timeout=60)
    assert held.returncode == lock.LOST and "was taken over" in said
    assert store.names("gs://bucket/") == ["run/.lock"]  # the other's


# --- metrics and checkpoints ------------------------------------------------------------------------------------------


def log_steps(folder: object, first: int, last: int, killed: bool = False) -> None:
    """Steps first + 1 .. last with a checkpoint every fourth; a kill leaves no time for anything."""
    log = Metrics(folder, first)
    for step in range(first + 1, last + 1):
        log.write(step, {"loss": 1 / step})
        if step % 4 == 0:
            log.publish()
    if not killed:
        log.__exit__(None, None, None)


def test_metrics_of_a_killed_run_have_no_gap(store, tmp_path):
    folder = paths.parse_path("gs://bucket/run")
    log_steps(tmp_path / "whole", 0, 12)
    log_steps(folder, 0, 9, killed=True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8
    log_steps(folder, 4, 12)  # the checkpoint of step 8 was not committed
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert len(list((folder / "tensorboard").iterdir())) >= 1


STATE = {"a": jnp.arange(5000.0), "b": jnp.ones((3, 4), jnp.bfloat16)}
TARGET = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


def saved(folder: gcs.ObjectPath, *steps: int) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, {name: value + step for name, value in STATE.items()}, {"position": step})
        checkpoints.finish(steps[-1])


def restored(folder: gcs.ObjectPath) -> int:
    """The step that is taken; its values are right."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(None, TARGET)
    for name, value in STATE.items():
        assert np.array_equal(np.asarray(found.state[name]), np.asarray(value + found.step))
    return found.step


def test_checkpoints_in_a_store_are_never_wrong(store):
    folder = paths.parse_path("gs://bucket/run/checkpoints")
    saved(folder, 1, 2, 3)
    assert {name.split("/")[2] for name in store.names("gs://bucket/run/checkpoints/")} == {"2", "3"}
    assert restored(folder) == 3
    bucket = store.buckets["bucket"]
    largest = max((n for n in bucket.objects if "/3/state/" in n and "/d/" in n), key=lambda n: len(bucket.objects[n].data))
    data = bytearray(bucket.objects[largest].data)
    data[len(data) // 2] ^= 1
    bucket.put(largest, bytes(data), {})
    assert restored(folder) == 2  # the damaged one is passed over


def test_a_save_that_was_not_committed_is_not_taken_and_can_be_made_again(store):
    folder = paths.parse_path("gs://bucket/run/checkpoints")
    saved(folder, 1, 2)
    store.buckets["bucket"].delete("run/checkpoints/2/commit_success.txt", {})  # as a kill before the commit leaves it
    assert restored(folder) == 1
    saved(folder, 2)
    assert restored(folder) == 2


def test_a_store_that_refuses_says_nothing_about_the_bytes(store):
    folder = paths.parse_path("gs://bucket/run/checkpoints")
    saved(folder, 1, 2)
    with Checkpoints(folder) as checkpoints:
        store.broken = 403
        with pytest.raises(RunFailed, match="step 2 .* could not be read: .*run the same command again") as error:
            checkpoints.restore(None, TARGET)
        one_line(error)
        store.broken = 0
        assert checkpoints.restore(None, TARGET).step == 2 and checkpoints._bad == set()


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (ValueError("UNAVAILABLE: CURL error"), True),
        (ValueError("PERMISSION_DENIED: 403"), True),
        (OSError("Forbidden: https://x"), True),
        (ConnectionError("x"), True),
        (ValueError("DATA_LOSS: checksum"), False),
        (ValueError("NOT_FOUND: x"), False),
        (FileNotFoundError("x"), False),
        (KeyError("x"), False),
    ],
)
def test_trouble_is_told_from_damage(error, trouble):
    assert gcs.is_trouble(error) is trouble


def test_threads_of_a_lease_end_with_it(store, fast):
    with lock_folder(paths.parse_path("gs://bucket/run")):
        assert any(thread.name == "lease" for thread in threading.enumerate())
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_the_page_of_a_run_lies_in_the_bucket(store):
    """Read and written there, by one listing; a page of nothing is a page."""
    run = paths.parse_path("gs://bucket/runs/mine")
    config = read_config("digits", {"root": "gs://bucket/runs", "name": "mine", "stages": (2,)})
    (run / "stage-2" / "metrics.jsonl").write_text('{"step": 20, "loss": 0.5}\n{"step": 40, "loss": 0.25}\n{"step"')
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    write_page(run, config)
    page = (run / "report.html").read_text()
    assert "<h1>mine</h1>" in page and "40 of 500 steps" in page and "gs://bucket/runs/mine" in page and page.count("<svg") == 1
    before = version(run)
    write_page(run, config)
    assert version(run) != before != "" and run_folders("gs://bucket/runs/mine") == [run]
    with pytest.raises(MissingFile, match="--run=gs://bucket/runs/other is no folder"):
        run_folders("gs://bucket/runs/other")
