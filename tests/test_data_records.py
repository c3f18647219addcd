"""Laws of the pair records: same bytes whoever writes them, nothing read that is not whole, the culprit named."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from proreflow_jax.data import record_plan, records
from proreflow_jax.storage import atomic

PLAN = {"examples": 10, "shard_size": 4, "seed": 7, "solver": {"name": "ddim", "steps": [1, 2]}}
NAMES = [f"pairs-{s:05d}-of-00003.array_record" for s in range(3)]


def example(i, dtype=np.float16):
    rng = np.random.default_rng(i)
    states = rng.standard_normal((3, 4, 4, 2)).astype(dtype)
    return {"states": states, "first": np.array(i % 2, np.int32), "ids": rng.integers(0, 99, 7).astype(np.int32)}


def write(folder, plan, shard, dtype=np.float16):
    return records.write_shard(folder, plan, shard, (example(i, dtype) for i in records.shard_range(plan, shard)))


def finished(folder, plan=PLAN, order=(0, 1, 2)):
    records.fix_plan(folder, plan)
    for shard in order:
        write(folder, plan, shard)
    assert records.publish(folder, plan)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        assert one[name].tobytes() == other[name].tobytes()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    records.fix_plan(tmp_path, PLAN)
    for shard in range(3):
        write(tmp_path, PLAN, shard, dtype)
    assert records.publish(tmp_path, PLAN)
    pairs = records.PairRecords(tmp_path)
    assert len(pairs) == 10 and pairs.plan == PLAN
    for i in range(10):
        assert_equal(pairs[i], example(i, dtype))
    with pytest.raises(IndexError):
        pairs[10]


def test_strided_arrays_keep_their_values(tmp_path):
    plan = {"examples": 1, "shard_size": 1}
    states = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    records.fix_plan(tmp_path, plan)
    records.write_shard(tmp_path, plan, 0, [{"states": states, "back": states[::-1]}])
    assert records.publish(tmp_path, plan)
    read = records.PairRecords(tmp_path)[0]
    np.testing.assert_array_equal(read["states"], states)
    np.testing.assert_array_equal(read["back"], states[::-1])


def test_many_threads_may_read(tmp_path):
    pairs = records.PairRecords(finished(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        for i, read in enumerate(pool.map(pairs.__getitem__, [i % 10 for i in range(400)])):
            assert_equal(read, example(i % 10))


def test_shards_tile_the_examples():
    for examples, size in [(10, 4), (8, 4), (1, 5), (9, 1)]:
        plan = {"examples": examples, "shard_size": size}
        ids = [i for s in range(records.shard_count(plan)) for i in records.shard_range(plan, s)]
        assert ids == list(range(examples))


@pytest.mark.parametrize("change", [{"examples": 0}, {"shard_size": 2.0}, {"shard_size": True}, {"examples": None}])
def test_a_plan_without_good_sizes_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"--config.pairs.{next(iter(change))}"):
        records.fix_plan(tmp_path / "new", {**PLAN, **change})
    assert not (tmp_path / "new").exists()


def test_another_plan_is_refused_and_the_same_is_not(tmp_path):
    records.fix_plan(tmp_path, PLAN)
    held = (tmp_path / "plan.json").read_bytes()
    records.fix_plan(tmp_path, {**PLAN, "solver": {"steps": (1, 2), "name": "ddim"}})
    for other, parts in [
        ({**PLAN, "seed": 8}, ("seed", "7", "8", "--config.name")),
        ({k: v for k, v in PLAN.items() if k != "seed"}, ("seed", "7", "nothing")),
        ({**PLAN, "more": "x"}, ("more", "nothing", '"x"')),
    ]:
        with pytest.raises(ValueError) as error:
            records.fix_plan(tmp_path, other)
        assert all(part in one_line(error) for part in parts)
    assert (tmp_path / "plan.json").read_bytes() == held


def test_whoever_writes_in_whatever_order_the_bytes_are_the_same(tmp_path):
    one = contents(finished(tmp_path / "one"))
    other = contents(finished(tmp_path / "other", order=(2, 0, 1, 0)))
    assert one == other and set(NAMES) < set(one)


def test_after_a_kill_only_the_unmarked_is_redone_and_nothing_differs(tmp_path):
    whole = contents(finished(tmp_path / "whole"))
    torn = tmp_path / "torn"
    records.fix_plan(torn, PLAN)
    write(torn, PLAN, 0)
    write(torn, PLAN, 1)
    (torn / NAMES[1].replace("array_record", "done.json")).unlink()  # killed between the rename and the marker
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    remains = [atomic.temporary(torn / NAMES[2]).name.replace(f".{os.getpid()}.", f".{dead.pid}.")]
    remains.append(f".tmp.1.another-machine.{NAMES[2]}")
    for name in remains:
        (torn / name).write_bytes(b"half")
    os.utime(torn / remains[1], (0, 0))

    assert sorted(records.clean(torn)) == sorted(remains)
    assert records.missing_shards(torn, PLAN) == [1, 2]
    assert not records.publish(torn, PLAN) and not (torn / "MANIFEST.json").exists()
    for shard in records.missing_shards(torn, PLAN):
        write(torn, PLAN, shard)
    assert records.missing_shards(torn, PLAN) == [] and records.publish(torn, PLAN)
    assert contents(torn) == whole


def test_the_temporary_of_a_living_writer_stays(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = atomic.temporary(tmp_path / NAMES[0]).name.replace(f".{os.getpid()}.", f".{other.pid}.")
    for name in (living, f".tmp.1.another-machine.{NAMES[0]}"):
        (tmp_path / name).write_bytes(b"")
    assert records.clean(tmp_path) == []
    other.communicate(b"\n")
    assert records.clean(tmp_path) == [living]


WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_data_records import PLAN, example
from proreflow_jax.data import records
def examples(shard):
    for i in records.shard_range(PLAN, shard):
        if i == {fatal}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example(i)
records.fix_plan({folder!r}, PLAN)
records.clean({folder!r})
for shard in records.missing_shards({folder!r}, PLAN)[::{stride}]:
    records.write_shard({folder!r}, PLAN, shard, examples(shard))
records.publish({folder!r}, PLAN)
"""


def test_two_workers_killed_and_started_again_make_the_same_folder(tmp_path):
    whole = contents(finished(tmp_path / "whole"))
    folder = tmp_path / "pairs"

    def start(stride, fatal):
        here = os.path.dirname(__file__)
        code = WORKER.format(tests=here, folder=str(folder), stride=stride, fatal=fatal)
        return subprocess.Popen([sys.executable, "-c", code])

    first = [start(1, 6), start(-1, 9)]
    assert [worker.wait(60) for worker in first] == [-signal.SIGKILL] * 2
    assert list(folder.glob(".tmp.*")) and not (folder / "MANIFEST.json").exists()
    second = [start(1, -1), start(-1, -1)]
    assert [worker.wait(60) for worker in second] == [0, 0]
    assert contents(folder) == whole


def test_unfinished_pairs_are_not_read(tmp_path):
    folder = finished(tmp_path)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(FileNotFoundError, match="MANIFEST.json") as error:
        records.PairRecords(folder)
    assert "make_pairs" in one_line(error)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def short(folder):
    plan = {"examples": 3, "shard_size": 3}
    small = finished(folder / "small", plan, order=[0])
    shutil.copy(small / records.shard_name(plan, 0), folder / NAMES[1])


def swap(folder):
    first, second = ((folder / name).read_bytes() for name in NAMES[:2])
    (folder / NAMES[1]).write_bytes(first)
    (folder / NAMES[0]).write_bytes(second)


DAMAGE = {
    "short": short,
    "swapped": swap,
    "duplicated": lambda folder: shutil.copy(folder / NAMES[0], folder / NAMES[1]),
    "flipped": lambda folder: flip(folder / NAMES[1], 300),
    "flipped in the padding": lambda folder: flip(folder / NAMES[1], 70_000),
    "truncated": lambda folder: os.truncate(folder / NAMES[1], 100_000),
    "emptied": lambda folder: os.truncate(folder / NAMES[1], 0),
    "appended": lambda folder: (folder / NAMES[1]).write_bytes((folder / NAMES[1]).read_bytes() + b"x"),
    "deleted": lambda folder: (folder / NAMES[1]).unlink(),
    "foreign": lambda folder: shutil.copy(folder / NAMES[1], folder / "pairs-00001-of-00007.array_record"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_shard_is_refused_by_name(tmp_path, damage):
    folder = finished(tmp_path)
    DAMAGE[damage](folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        records.PairRecords(folder)
    guilty = {"foreign": "pairs-00001-of-00007", "swapped": NAMES[0]}.get(damage, NAMES[1])
    assert guilty in one_line(error)
    if damage in ("swapped", "duplicated"):
        assert "holds the bytes of" in one_line(error)


@pytest.mark.parametrize("damage", ["short", "truncated", "emptied", "appended", "deleted", "foreign"])
def test_sizes_and_names_are_compared_without_verify_too(tmp_path, damage):
    folder = finished(tmp_path)
    DAMAGE[damage](folder)
    why = {"short": "holds 3", "deleted": "is missing", "foreign": "does not belong"}.get(damage, "bytes long")
    with pytest.raises((ValueError, FileNotFoundError), match=f"pairs-00001-of-.*{why}"):
        records.PairRecords(folder, verify=False)


def test_of_some_shards_no_other_is_looked_at_and_hashes_of_those_that_are_named(tmp_path):
    folder = finished(tmp_path)
    (folder / NAMES[0]).unlink()
    flip(folder / NAMES[1], 300)
    pairs = records.PairRecords(folder, shards=[2])
    assert len(pairs) == 10 and pairs.plan == PLAN
    assert_equal(pairs[9], example(9))
    records.PairRecords(folder, verify=[2], shards=[1, 2])
    with pytest.raises(ValueError, match=NAMES[1]):
        records.PairRecords(folder, verify=[1], shards=[1, 2])
    with pytest.raises(FileNotFoundError, match=NAMES[0]):
        records.PairRecords(folder, verify=False, shards=[0])


@pytest.mark.parametrize(("batch", "groups", "plan"), [(6, 4, {}), (8, 3, {}), (8, 2, {"examples": 15}), (8, 8, {})])
def test_groups_are_equal_runs_of_whole_shards_and_of_rows(batch, groups, plan):
    plan = {"examples": 16, "shard_size": 4} | plan
    with pytest.raises(ValueError, match=f"--groups={groups} must divide the batch of {batch} and the 4 shards") as error:
        record_plan.check_groups(plan, batch, groups, "--groups")
    one_line(error)
    record_plan.check_groups(plan, batch, 1, "--groups")
    even = {"examples": 16, "shard_size": 4}
    record_plan.check_groups(even, 8, 4, "--groups")
    assert [list(record_plan.group_shards(even, 2, group)) for group in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "appended", "deleted"])
def test_a_marked_shard_of_another_size_is_made_again(tmp_path, damage):
    folder = finished(tmp_path)
    DAMAGE[damage](folder)
    assert records.missing_shards(folder, PLAN) == [1] and not records.publish(folder, PLAN)


def test_the_advice_on_a_damaged_shard_mends_it(tmp_path):
    folder = finished(tmp_path)
    whole = contents(folder)
    flip(folder / NAMES[1], 300)
    (folder / NAMES[1]).unlink()
    assert records.missing_shards(folder, PLAN) == [1]
    write(folder, PLAN, 1)
    assert records.publish(folder, PLAN) and contents(folder) == whole


def test_without_verify_a_flipped_bit_is_still_not_returned(tmp_path):
    folder = finished(tmp_path)
    start = (folder / NAMES[1]).read_bytes().find(example(4)["states"].tobytes())
    flip(folder / NAMES[1], start + 3)
    pairs = records.PairRecords(folder, verify=False)
    with pytest.raises(ValueError, match=NAMES[1]) as error:
        pairs[4]
    one_line(error)
    assert_equal(pairs[5], example(5))


@pytest.mark.parametrize("name", ["MANIFEST.json", "plan.json"])
def test_no_flip_in_the_metadata_changes_what_is_read(tmp_path, name):
    folder = finished(tmp_path)
    whole = (folder / name).read_bytes()
    for place in range(len(whole)):
        flip(folder / name, place)
        try:
            pairs = records.PairRecords(folder)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
        else:
            assert pairs.plan == PLAN
        (folder / name).write_bytes(whole)


def test_a_damaged_plan_is_written_anew_once_it_is_moved_aside(tmp_path):
    folder = finished(tmp_path)
    (folder / "plan.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"plan\.json is no valid JSON .*move it aside and run the job of this folder"):
        records.fix_plan(folder, PLAN)
    (folder / "plan.json").rename(folder.with_suffix(".old"))
    records.fix_plan(folder, PLAN)
    assert records.missing_shards(folder, PLAN) == [] and records.PairRecords(folder).plan == PLAN


def test_a_marker_of_another_plan_does_not_count(tmp_path):
    finished(tmp_path / "other", {**PLAN, "seed": 8})
    folder = tmp_path / "pairs"
    records.fix_plan(folder, PLAN)
    for path in (tmp_path / "other").glob("pairs-*"):
        shutil.copy(path, folder)
    assert records.missing_shards(folder, PLAN) == [0, 1, 2]
    shutil.copy(tmp_path / "other" / "MANIFEST.json", folder)
    with pytest.raises(ValueError, match="another plan"):
        records.PairRecords(folder)


def test_a_manifest_cannot_name_other_files(tmp_path):
    folder = finished(tmp_path)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for name in ("../outside.array_record", NAMES[0]):
        manifest["shards"][1]["name"] = name
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=NAMES[1]):
            records.PairRecords(folder)


@pytest.mark.parametrize("value", [[1.0], {}, np.array(["text"]), np.array(1j), np.array([None]), np.zeros(2, ">f4")])
def test_only_plain_arrays_are_written(tmp_path, value):
    plan = {"examples": 1, "shard_size": 1}
    records.fix_plan(tmp_path, plan)
    with pytest.raises(ValueError, match="pair record"):
        records.write_shard(tmp_path, plan, 0, iter([{"states": value}]))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_shard_takes_exactly_its_examples(tmp_path, count):
    records.fix_plan(tmp_path, PLAN)
    with pytest.raises(ValueError, match=NAMES[0]):
        records.write_shard(tmp_path, PLAN, 0, map(example, range(count)))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_error_of_the_teacher_passes_through_and_leaves_nothing(tmp_path):
    def broken():
        yield example(0)
        raise RuntimeError("the device is gone")

    records.fix_plan(tmp_path, PLAN)
    with pytest.raises(RuntimeError, match="the device is gone"):
        records.write_shard(tmp_path, PLAN, 0, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_data_records import PLAN, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    write({folder!r}, PLAN, 0)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_loud_and_leaves_nothing(tmp_path):
    records.fix_plan(tmp_path, PLAN)
    code = FULL.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert NAMES[0] in done.stdout and "could not be written" in done.stdout and done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    write(tmp_path, PLAN, 0)
