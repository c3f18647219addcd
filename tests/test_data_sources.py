"""Every layout of images and captions gives the same examples in the same order, and bad ones are replaced alike by all."""

import inspect
import itertools
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from made_images import CAPTIONS, LAYOUTS, SIDE, block, encode, members, originals, write_tar
from test_data_captions import coco_like

from proreflow_jax.data import images, kinds, loader, skip_bad, webdataset

WRITTEN = {}  # folder -> fields of the block `data`


def opened(folder, layout, rows, **fields):
    """A source of rows in a layout, written where nothing is yet."""
    if not (folder / layout).exists():
        (folder / layout).mkdir(parents=True)
        WRITTEN[folder / layout] = LAYOUTS[layout](folder / layout, rows)
    return kinds.open_data(block(folder, **(WRITTEN[folder / layout] | fields)))


def equal(one, other):
    assert one["caption"] == other["caption"]
    np.testing.assert_array_equal(one["image"], other["image"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_originals_in_order(tmp_path, layout):
    rows = originals()
    source = opened(tmp_path, layout, rows)
    assert len(source) == len(rows)
    for i in (*range(len(rows)), 0):
        equal(source[i], {"image": images.decode_image(rows[i][0], SIDE), "caption": CAPTIONS[i]})
    with pytest.raises(IndexError):
        source[len(rows)]


def test_tfds_gives_the_same(tmp_path):
    rows = originals()[:5]
    folder = coco_like(tmp_path / "coco", [image for image, _ in rows], [[caption] for _, caption in rows])
    source = kinds.open_data(block(tmp_path, kind="tfds", path=folder, caption_key="captions/text"))
    for i, (image, caption) in enumerate(rows):
        equal(source[i], {"image": images.decode_image(image, SIDE), "caption": caption})


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("layout", ["webdataset", "parquet", "jsonl"])
def test_batches_are_the_same_for_any_number_of_processes_and_threads(tmp_path, layout, processes):
    """With bad images among them: each process finds them itself and takes the same in their place."""
    rows = originals({1: b"no image", 2: b"", 6: encode(6)[:200]})
    whole = opened(tmp_path, layout, rows, max_bad=0.5, threads=1)
    parts = [opened(tmp_path, layout, rows, max_bad=0.5, threads=4) for _ in range(processes)]
    with loader.Loader(whole, 6, seed=2) as batches:
        expected = [batch for _, batch in itertools.islice(batches, 4)]
    found = []
    for process, part in enumerate(parts):
        with loader.Loader(part, 6, seed=2, rows=range(6 * process // processes, 6 * (process + 1) // processes)) as batches:
            found.append([batch for _, batch in itertools.islice(batches, 4)])
    for step, batch in enumerate(expected):
        np.testing.assert_array_equal(np.concatenate([part[step]["image"] for part in found]), batch["image"])
        assert sum((part[step]["caption"] for part in found), []) == batch["caption"]
        assert set(batch["caption"]) <= {CAPTIONS[i] for i in (0, 3, 4, 5)}


# --- bad examples -----------------------------------------------------------------------------------------------------


def test_a_bad_example_is_the_next_good_one_round_the_end(tmp_path):
    source = opened(tmp_path, "webdataset", originals({1: b"no", 2: b"no", 6: b"no"}), max_bad=0.5)
    assert [source[i]["caption"] for i in (1, 2, 6)] == [CAPTIONS[3], CAPTIONS[3], CAPTIONS[0]]


def test_bad_examples_are_named_and_counted_once(tmp_path, caplog):
    source = opened(tmp_path, "webdataset", originals({1: b"no", 2: b"no"}), max_bad=0.5)
    with caplog.at_level(logging.WARNING):
        source.read_many([1, 1, 2, 1, 2] * 5)
    assert len(caplog.records) == 2
    assert "a-000.tar, '0001.jpg'" in caplog.text and "'0002.jpg'" in caplog.text and "not an image" in caplog.text


def test_more_bad_ones_than_allowed_end_the_run_in_one_line(tmp_path):
    source = opened(tmp_path, "webdataset", originals({i: b"no" for i in (1, 3, 5)}), max_bad=2 / 7)
    assert source[1]["caption"] == CAPTIONS[2] and source[3]["caption"] == CAPTIONS[4]
    with pytest.raises(ValueError, match=r"3 of 7 examples of .* allows 2: .*'0001.jpg'.*'0003.jpg'.*'0005.jpg'") as error:
        source[5]
    for known in (5, 1):  # also to a thread that comes later
        with pytest.raises(ValueError, match="3 of 7"):
            source[known]
    assert "--config.data.max_bad=0.28" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="1 of 7 .* allows 0"):
        opened(tmp_path / "other", "webdataset", originals({1: b"no"}))[1]


def test_a_source_without_one_good_example_is_refused_when_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="none of 7 examples .* the first: .*not an image"):
        opened(tmp_path, "beside", originals({i: b"no" for i in range(7)}), max_bad=1.0)


def test_what_is_no_examples_fault_is_not_replaced():
    class Faulty:
        name = "faulty"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise OSError(5, "input/output error") if index == 1 else images.Unusable("bad")

    with pytest.raises(OSError, match="input/output"):
        skip_bad.Usable(Faulty(), 0.9)[0]


def test_an_error_in_a_thread_comes_up_where_the_batch_is_taken(tmp_path):
    source = opened(tmp_path, "parquet", originals({3: b"no"}))
    with pytest.raises(ValueError, match="max_bad"):
        with loader.Loader(source, 7, seed=0) as batches:
            next(batches)
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


# --- the index of a tar -----------------------------------------------------------------------------------------------


def test_the_index_is_built_once_and_again_when_the_tar_changes(tmp_path, monkeypatch):
    built = []
    build = webdataset.build_index
    monkeypatch.setattr(webdataset, "build_index", lambda *a: built.append(a[0].name) or build(*a))
    rows = originals()
    opened(tmp_path, "webdataset", rows)
    assert built == ["a-000.tar", "a-001.tar"]
    fields = {"kind": "webdataset", "path": str(tmp_path / "webdataset"), "caption_key": "txt"}
    again = lambda **other: kinds.open_data(block(tmp_path, **(fields | other)))
    assert again()[6]["caption"] == CAPTIONS[6] and len(built) == 2
    write_tar(tmp_path / "webdataset" / "a-001.tar", members(rows[5:], 5))  # other size
    assert [len(again()), built[2:]] == [5, ["a-001.tar"]]
    write_tar(tmp_path / "webdataset" / "a-001.tar", members(rows[5:][::-1], 5))
    os.utime(tmp_path / "webdataset" / "a-001.tar", ns=(1, 1))  # same size perhaps, other time
    assert again()[3]["caption"] == CAPTIONS[6] and built[3:] == ["a-001.tar"]
    again(cache="/proc/nowhere")  # cannot be written: only slower
    assert len(built) == 6


def test_a_damaged_index_is_built_again(tmp_path):
    source = opened(tmp_path, "webdataset", originals())
    for path in (tmp_path / "index").iterdir():
        held = bytearray(path.read_bytes())
        held[40] ^= 1
        path.write_bytes(held)
    equal(opened(tmp_path, "webdataset", originals())[0], source[0])
    for path in (tmp_path / "index").iterdir():
        path.write_bytes(b"")
    equal(opened(tmp_path, "webdataset", originals())[4], source[4])


def test_a_tar_that_changes_while_it_is_read_ends_the_run(tmp_path):
    source = opened(tmp_path, "webdataset", originals(), max_bad=0.9)
    write_tar(tmp_path / "webdataset" / "a-000.tar", members(originals()[::-1]))
    with pytest.raises(RuntimeError, match=r"a-000.tar changed"):
        source[0]


def test_braces_expand_as_in_a_shell():
    assert webdataset.expand_braces("a{08..10}-{x,yz}") == ["a08-x", "a08-yz", "a09-x", "a09-yz", "a10-x", "a10-yz"]
    assert webdataset.expand_braces("plain.tar") == ["plain.tar"]
    for bomb in ("{0..999999999}", "{0..999}{0..999}", "{5..4}"):
        with pytest.raises(ValueError, match="--config.data.path"):
            webdataset.expand_braces(bomb)


# --- the table of kinds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, fields", [*kinds.READERS.values(), *kinds.IDENTITIES.values()])
def test_every_row_names_a_function_that_takes_these_fields_in_this_order(name, fields):
    taken = inspect.signature(kinds._function(name)).parameters
    assert tuple(taken)[: len(fields)] == fields
    assert all(taken[name].default is not inspect.Parameter.empty for name in tuple(taken)[len(fields) :])


def test_no_reader_is_imported_before_a_dataset_is_opened():
    code = """
import sys
from proreflow_jax.data import kinds
readers = {name.split(":")[0] for name, _ in kinds.READERS.values()}
assert not [name for name in readers if f"proreflow_jax.data.{name}" in sys.modules]
assert not {"tensorflow_datasets", "pyarrow", "PIL", "sklearn"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- around -----------------------------------------------------------------------------------------------------------


def test_another_dataset_in_the_same_place_is_another_identity(tmp_path):
    for layout in ("webdataset", "parquet", "beside", "jsonl"):
        (tmp_path / layout).mkdir()
        data = block(tmp_path, **LAYOUTS[layout](tmp_path / layout, originals()))
        before = kinds.data_identity(data)
        assert before == kinds.data_identity(data) and len(before) == 1
        path = min(tmp_path.glob(f"{layout}/*.[tpj]*"))
        path.rename(path.with_name(f"z-{path.name}")) if layout == "beside" else path.write_bytes(path.read_bytes() + b"\n")
        assert kinds.data_identity(data) != before


def test_results_made_ahead_come_in_order_and_end():
    made = []
    with loader.Ahead(lambda n: made.append(n) or n * n, range(9), depth=3) as squares:
        assert list(squares) == [n * n for n in range(9)]
    assert sorted(made) == list(range(9))
    with loader.Ahead(lambda n: 1 // n, [1, 0, 1], depth=1) as broken:
        assert next(broken) == 1
        with pytest.raises(ZeroDivisionError):
            next(broken)
        assert list(broken) == []


def test_the_order_is_kept_and_cannot_be_changed():
    assert loader.permutation(0, 0, 9) is loader.permutation(0, 0, 9)
    with pytest.raises(ValueError, match="read-only"):
        loader.permutation(0, 0, 9)[0] = 1
    numbers = [8, 9, 17, 0]
    assert loader.epoch_places(numbers, 3, 9) == [int(loader.permutation(3, n // 9, 9)[n % 9]) for n in numbers]


def test_rows_per_second_counts_the_rows_of_a_process(tmp_path):
    ticks = iter([10.0, 12.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.time, "perf_counter", lambda: next(ticks))
        with loader.Loader(opened(tmp_path, "beside", originals()), 4, seed=0) as batches:
            assert loader.rows_per_second(batches, 3, 4) == 6.0
            assert next(batches)[0] == 4


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    fields = LAYOUTS["parquet"](tmp_path, originals())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install pyarrow \(the extra `parquet`\)"):
        kinds.open_data(block(tmp_path, **fields))
