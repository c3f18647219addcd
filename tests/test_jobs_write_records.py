"""The jobs that write records: the devices go on while a thread writes, and neither thread nor process changes a byte."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runtime_processes import run_pod

from proreflow_jax import RunFailed, UserError
from proreflow_jax.data import records
from proreflow_jax.jobs import write_records as jobs
from proreflow_jax.jobs.write_records import AHEAD, Maker, begin_records, write_records
from proreflow_jax.runtime import device_clock, mesh
from proreflow_jax.runtime.progress import Progress

PLAN = {"examples": 26, "shard_size": 8}  # four shards, the last of two
SIZE, SHARDS = 4, 4
COUNT = 7  # batches


@jax.jit
def squared(index: jax.Array) -> jax.Array:
    return (index[:, None] * jnp.arange(1, 6, dtype=jnp.float32)) ** 2


def maker(devices: int = 2, **changes: object) -> Maker:
    """Records of a few numbers each, by some of the devices."""
    machine = mesh.make_mesh(devices=jax.devices()[:devices] if jax.process_count() == 1 else None)
    whole, batches = mesh.replicated(machine), mesh.batch_sharding(machine)
    compute = jax.jit(lambda batch: {"states": squared(batch["index"])}, in_shardings=batches, out_shardings=whole)
    made = Maker(machine, SIZE, lambda numbers: {"index": numbers.astype(np.float32)}, compute, rows)
    return made._replace(**changes)


def rows(numbers: range, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    for i, number in enumerate(numbers):
        yield {"states": batch["states"][i], "number": np.int32(number)}


def slow_rows(numbers: range, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    time.sleep(0.05)
    yield from rows(numbers, batch)


def write(folder: Path, made: Maker, plan: dict = PLAN, **options: object) -> None:
    with Progress("rows", plan["examples"], "row", bar=False) as progress:
        write_records(folder, plan, begin_records(folder, plan), made, progress, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files, each shard written by itself."""
    folder = tmp_path_factory.mktemp("whole")
    records.fix_plan(folder, PLAN)
    for shard in range(SHARDS):
        numbers = records.shard_range(PLAN, shard)
        states = np.asarray(squared(np.asarray(numbers, np.float32)))
        records.write_shard(folder, PLAN, shard, rows(numbers, {"states": states}))
    assert records.publish(folder, PLAN)
    return contents(folder)


def test_the_thread_writes_the_bytes_that_each_shard_has_by_itself(tmp_path, whole):
    seen = []
    write(tmp_path, maker(records=slow_rows), kept=lambda: seen.append(len(list(tmp_path.glob("*.done.json")))))
    assert contents(tmp_path) == whole and len(seen) == SHARDS


class Slow:
    """A writer that takes nothing until it may, beside a program that notes its calls."""

    def __init__(self) -> None:
        self.sent, self.may = 0, threading.Event()

    def maker(self) -> Maker:
        compute = maker().compute

        def counted(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            self.sent += 1
            if self.sent == AHEAD + 2:  # the first batch of two was fetched, and none of its records is written
                self.may.set()
            return compute(batch)

        def waiting(numbers: range, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
            assert self.may.wait(60), "the devices wait for the writer"
            yield from rows(numbers, batch)

        return maker(compute=counted, records=waiting)


def test_the_devices_have_their_next_batches_before_the_last_one_is_written(tmp_path, whole):
    slow = Slow()
    write(tmp_path, slow.maker())
    assert contents(tmp_path) == whole and slow.sent == COUNT


def test_a_shard_begins_when_the_last_one_is_marked(tmp_path):
    """So a kill costs one shard at most."""

    made, marked = maker(), []

    def looking(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        marked.append(len(list(tmp_path.glob("*.done.json"))))
        return made.compute(batch)

    write(tmp_path, made._replace(compute=looking, records=slow_rows))
    assert records.PairRecords(tmp_path)
    for sent, shards in enumerate(marked):  # before it AHEAD batches are sent and not fetched, of two batches a shard
        assert shards >= max(0, sent - AHEAD - 1) // 2


def test_batches_wait_where_no_room_is_left_for_them(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(jobs, "ROOM", 0)
    write(tmp_path, maker())
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("where", "batch", "kind"),
    [("records", 6, KeyboardInterrupt), ("records", COUNT, OSError), ("compute", 6, KeyboardInterrupt)],
)
def test_an_error_in_the_thread_or_beside_it_leaves_whole_shards_alone_and_the_job_goes_on(tmp_path, whole, where, batch, kind):
    made, calls = maker(), []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == batch:
            raise kind("enough")
        return getattr(made, where)(*arguments)

    with pytest.raises(kind, match="enough"):
        write(tmp_path, made._replace(**{where: failing}))
    left = contents(tmp_path)
    shards = [name for name in left if name.endswith(".array_record")]
    assert all(whole[name] == data for name, data in left.items()) and len(shards) < SHARDS
    assert len(shards) == len([name for name in left if name.endswith(".done.json")])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writer")]
    write(tmp_path, made)
    assert contents(tmp_path) == whole


def test_shards_go_round_the_processes(monkeypatch):
    plan, missing, owned = {"examples": 70, "shard_size": 8}, [0, 3, 4, 7, 8], []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts = [part for batch in jobs.shared_out(plan, missing, SIZE) for part in batch]
        assert [part.shard for part in parts] == [0, 0, 3, 3, 4, 4, 7, 7, 8, 8]
        assert [number for part in parts for number in part.numbers if part.shard == 8] == list(range(64, 70))
        owned.append(sorted({part.shard for part in parts if part.own}))
    assert owned == [[0, 7], [3, 8], [4]]


def test_a_batch_of_several_shards_is_written_by_several_processes(monkeypatch):
    """So the last one is not written by one process while all others wait; rows behind a short batch fill it up."""
    plan, missing, owned = {"examples": 70, "shard_size": 8}, [0, 3, 4, 7, 8], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        batches = jobs.shared_out(plan, missing, 16)
        assert [[part.shard for part in parts] for parts in batches] == [[0, 3], [4, 7], [8]]
        assert all(part.begins and part.ends for parts in batches for part in parts)
        owned.append([[part.shard for part in parts if part.own] for parts in batches])
        for parts in batches:
            numbers = jobs.numbers_of(parts, 16)
            assert len(numbers) == 16 and all(list(numbers[part.at]) == list(part.numbers) for part in parts)
    assert owned == [[[0], [4], [8]], [[3], [7], []]]


@pytest.mark.parametrize("size", [8, 16, 32])
def test_records_are_the_same_by_batches_of_any_size(tmp_path, whole, size):
    write(tmp_path, maker(size=size))
    assert contents(tmp_path) == whole
    for name in (records.shard_name(PLAN, 2), records.shard_name(PLAN, 2).replace(".array_record", ".done.json")):
        (tmp_path / name).unlink()
    write(tmp_path, maker(size=size))
    assert contents(tmp_path) == whole


def test_the_clock_adds_up_what_lies_between_programs(monkeypatch):
    ready = iter([1.0, 3.0, 6.0, 7.0])
    monkeypatch.setattr(device_clock.time, "perf_counter", lambda: next(ready))
    clock = device_clock.DeviceClock()
    for sent in (0.0, 2.0, 2.5, 6.5):  # the second and the last were sent when nothing was there
        clock._note(sent, None)
    assert (clock.idle, clock.seconds) == (1.5, 6.0) and "waited 1.50 of 6.0 s" in clock.line() and "(25.0 %)" in clock.line()


JOB = """
import sys
sys.path.insert(0, {tests!r})
from proreflow_jax.runtime import mesh
mesh.initialize_distributed()
from pathlib import Path
import jax
from test_jobs_write_records import maker, write
write(Path(sys.argv[1]), maker(size=int(sys.argv[2])))
(Path(sys.argv[1]).parent / f"left-{{jax.process_index()}}").touch()
"""


@pytest.mark.parametrize("size", [SIZE, 16])
def test_four_processes_write_the_files_of_one(tmp_path, whole, size):
    """Also where some of them are there, and a killed writer's draft."""
    folder = tmp_path / "records"
    records.fix_plan(folder, PLAN)
    for name in (records.shard_name(PLAN, 1), records.shard_name(PLAN, 1).replace(".array_record", ".done.json")):
        (folder / name).write_bytes(whole[name])
    job = JOB.format(tests=str(Path(__file__).parent))
    assert run_pod(4, 1, [sys.executable, "-c", job, str(folder), str(size)], timeout=600) == [0] * 4
    assert contents(folder) == whole
    assert len(list(tmp_path.glob("left-*"))) == 4


def test_another_hosts_files_are_waited_for(tmp_path, monkeypatch):
    """NFS remembers for a while that a file was not there."""
    records.fix_plan(tmp_path, PLAN)
    looks = []
    monkeypatch.setattr(jobs.time, "sleep", looks.append)
    with pytest.raises(RunFailed, match="shards are missing"):
        jobs.publish_records(tmp_path, PLAN)
    assert not looks
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(records, "publish", lambda folder, plan: len(looks) == 2)
    jobs.publish_records(tmp_path, PLAN)
    assert looks == [1.0, 1.0]


def test_a_folder_of_process_0_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "first", lambda work: None)  # elsewhere
    with pytest.raises(UserError, match="process 0 does not see .*a folder that all see by --config.root or --out$"):
        begin_records(tmp_path, PLAN, "--out")
