"""Laws of the loader: one sequence, whatever the step it begins at and however many processes read it."""

import itertools
import threading

import numpy as np
import pytest

from proreflow_jax.data import loader


class Numbers:
    """source[i] = i, twice, with a word."""

    def __init__(self, length, broken=None):
        self.length, self.broken, self.read = length, broken, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.broken:
            raise ValueError(f"record {index} is bad")
        return {"i": np.int64(index), "square": np.full((2, 3), index**2, np.float32), "word": f"<{index}>"}


def take(count, *args, **kwargs):
    with loader.Loader(*args, **kwargs) as batches:
        return list(itertools.islice(batches, count))


def indices(batches):
    return np.concatenate([batch["i"] for _, batch in batches])


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    n, batch = 30, 7
    sequence = indices(take(30, Numbers(n), batch, seed=3))[: 7 * n].reshape(7, n)
    assert (np.sort(sequence, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in sequence}) == 7


def test_the_order_is_drawn_from_seed_and_epoch():
    orders = {(s, e): tuple(loader.permutation(s, e, 50)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert orders == {(s, e): tuple(loader.permutation(s, e, 50)) for s in range(3) for e in range(3)}
    golden = (0, 3, 7, 5, 1, 2, 6, 4)  # a change here reorders every run that is resumed across it
    assert tuple(loader.permutation(0, 0, 8)) == golden


def test_places_of_all_pairs_are_hit_alike():
    first = np.array([loader.permutation(s, 0, 5)[0] for s in range(2000)])
    assert (np.abs(np.bincount(first, minlength=5) - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize("start", [0, 1, 5, 13])
def test_resumed_at_a_step_it_gives_the_tail(start):
    whole = take(16, Numbers(11), 4, seed=1)
    tail = take(16 - start, Numbers(11), 4, seed=1, start_step=start)
    assert [step for step, _ in tail] == list(range(start, 16))
    for (_, one), (_, other) in zip(whole[start:], tail, strict=True):
        assert one["word"] == other["word"]
        np.testing.assert_array_equal(one["square"], other["square"])


def test_resuming_reads_nothing_before_its_step():
    source = Numbers(1000)
    take(1, source, 10, seed=0, start_step=50, prefetch=1)
    assert set(source.read) <= set(loader.permutation(0, 0, 1000)[500:530].tolist())


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_the_processes_rows_make_the_global_batch(processes):
    whole = take(5, Numbers(20), 6, seed=2)
    parts = [
        take(5, Numbers(20), 6, seed=2, rows=range(6 * p // processes, 6 * (p + 1) // processes)) for p in range(processes)
    ]
    for step, batch in whole:
        joined = np.concatenate([part[step][1]["square"] for part in parts])
        np.testing.assert_array_equal(joined, batch["square"])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_rows_of_a_group_read_its_run_of_the_source_alone_and_all_of_it_each_epoch(groups):
    n, batch = 30, 6
    whole = indices(take(10, Numbers(n), batch, seed=2, groups=groups)).reshape(10, groups, batch // groups)
    for group in range(groups):
        own = range(group * n // groups, (group + 1) * n // groups)
        for epoch in (whole[:5, group], whole[5:, group]):
            assert sorted(epoch.reshape(-1)) == list(own)
        source, rows = Numbers(n), range(group * batch // groups, (group + 1) * batch // groups)
        take(10, source, batch, seed=2, groups=groups, rows=rows)
        assert set(source.read) == set(own)
    assert not (whole[:5] == whole[5:]).all()


def test_one_group_is_the_plain_sequence_and_each_of_several_keeps_its_order():
    order = np.concatenate([loader.permutation(4, epoch, 11) for epoch in range(4)])
    np.testing.assert_array_equal(indices(take(8, Numbers(11), 5, seed=4, groups=1)), order[:40])
    plain = loader.permutation(0, 0, 8)
    assert loader.permutation(0, 0, 8, 2).tolist() == [i for i in plain if i < 4] + [i for i in plain if i >= 4]


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_prefetch_changes_nothing(prefetch):
    words = [batch["word"] for _, batch in take(9, Numbers(10), 4, seed=0, prefetch=prefetch)]
    assert words == [batch["word"] for _, batch in take(9, Numbers(10), 4, seed=0)]


def test_batches_are_stacked_and_text_is_a_list():
    _, batch = take(1, Numbers(10), 4, seed=0)[0]
    assert batch["square"].shape == (4, 2, 3) and batch["square"].dtype == np.float32
    assert batch["word"] == [f"<{i}>" for i in batch["i"]]
    assert set(take(1, Numbers(10), 4, seed=0, keep=["word"])[0][1]) == {"word"}
    with pytest.raises(ValueError, match="'image'"):
        take(1, Numbers(10), 4, seed=0, keep=["image"])


def test_a_batch_may_be_longer_than_an_epoch():
    assert sorted(indices(take(1, Numbers(3), 9, seed=0))) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_an_error_in_a_thread_comes_up_at_its_batch_and_ends_it(prefetch):
    place = int(np.flatnonzero(loader.permutation(0, 0, 40) == 17)[0])
    batches = loader.Loader(Numbers(40, broken=17), 4, seed=0, prefetch=prefetch)
    good = []
    with pytest.raises(ValueError, match="record 17 is bad"):
        for step, _ in batches:
            good.append(step)
    assert good == list(range(place // 4))
    assert list(batches) == []


def test_closing_leaves_no_thread_and_ends_the_iteration():
    with loader.Loader(Numbers(40), 4, seed=0, prefetch=3) as batches:
        next(batches)
        assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
    assert list(batches) == []
    batches.close()


def test_examples_of_two_shapes_are_refused_by_number():
    class Mixed(Numbers):
        def __getitem__(self, index):
            return {"x": np.zeros((2 + (index == 5), 2))}

    with pytest.raises(ValueError, match="x of float64") as error:
        take(1, Mixed(8), 8, seed=0)
    assert "5" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seed": -1}, {"prefetch": 0}, {"start_step": -1}])
def test_sizes_out_of_range_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match="at least"):
        loader.Loader(Numbers(4), **{"batch": 2, "seed": 0, **wrong})
    with pytest.raises(ValueError, match="empty"):
        loader.Loader(Numbers(0), 2, 0)
