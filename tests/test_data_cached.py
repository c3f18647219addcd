"""A cache of latents is a dataset like the others; one that is unfinished, foreign or mixed up is refused."""

import numpy as np
import pytest
from made_images import block

from proreflow_jax.data import cached, kinds, records

PLAN = {"records": "cache", "examples": 5, "shard_size": 2, "model": {}}
WORDS = ("a dog", "größe 日本", 'two, "quoted" words', "four", "x" * 4096)


def example(i):
    rng = np.random.default_rng(i)
    return {name: rng.standard_normal((4, 4, 2)).astype(np.float16) for name in kinds.LATENTS}


def finished(folder, plan=PLAN):
    words = cached.padded(WORDS)
    rows = [cached.record(i, {**example(i), "caption": words[i]}) for i in range(5)]
    records.fix_plan(folder, plan)
    for shard in range(3):
        records.write_shard(folder, plan, shard, [rows[i] for i in records.shard_range(plan, shard)])
    assert records.publish(folder, plan)
    return folder


def opened(folder):
    return kinds.open_data(block(folder, kind="cached", path=str(folder)))


def refused(folder, kind, *words):
    with pytest.raises(kind) as caught:
        opened(folder).read_many(range(5))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_what_is_kept_is_read_in_its_order(tmp_path):
    source = opened(finished(tmp_path))
    assert len(source) == 5 and sorted(path.name for path in tmp_path.glob("*.array_record"))[0] == (
        "cache-00000-of-00003.array_record"
    )
    for i, item in enumerate(source.read_many([4, 0, 3])):
        number = (4, 0, 3)[i]
        assert item["caption"] == WORDS[number] and item.keys() == {"caption", "mean", "std"}
        np.testing.assert_array_equal(item["mean"], example(number)["mean"])
        np.testing.assert_array_equal(item["std"], example(number)["std"])
    with pytest.raises(IndexError):
        source[5]


def test_what_is_no_finished_cache_is_refused(tmp_path):
    refused(tmp_path / "none", FileNotFoundError, "--config.data.path")
    folder = finished(tmp_path / "pairs", {name: value for name, value in PLAN.items() if name != "records"})
    refused(folder, ValueError, "--config.data.path")
    (finished(tmp_path / "cut") / records.MANIFEST).unlink()
    refused(tmp_path / "cut", FileNotFoundError, records.MANIFEST, "cache")


def test_shards_that_have_changed_places_are_found_out(tmp_path):
    one, other = sorted(finished(tmp_path).glob("*.array_record"))[:2]
    assert one.stat().st_size == other.stat().st_size  # so only what is in them tells
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    refused(tmp_path, ValueError, "another record where number 0 belongs")


def test_another_cache_in_the_same_place_is_another_dataset(tmp_path):
    data = block(tmp_path, kind="cached", path=str(finished(tmp_path / "a")))
    before = kinds.data_identity(data)
    assert before == kinds.data_identity(data) and before.keys() == {"cache"}
    other = finished(tmp_path / "b", PLAN | {"model": {"vae": "another"}})
    assert kinds.data_identity(block(tmp_path, kind="cached", path=str(other))) != before
