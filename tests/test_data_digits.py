"""The demo's digits: the dataset holds the images, appears whole or not at all, and a small classifier can score it."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds

from proreflow_jax.data import captions, digits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return digits.write_dataset(tmp_path_factory.mktemp("data") / "digits", 32, seed=5)


@pytest.fixture(scope="module")
def source(written):
    return captions.open_tfds(written, "train", "image", "caption", 32)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_dataset_holds_every_image_once_with_a_caption_of_its_digit(source):
    images, labels = digits.load_digits(32)
    left = {}
    for image, label in zip(images, labels, strict=True):
        left.setdefault(image.tobytes(), []).append(int(label))
    seen = set()
    for i in range(len(source)):
        example = source[i]
        label = left[example["image"].tobytes()].pop()
        said = [w for w in range(len(digits.WORDINGS)) if digits.caption(label, w) == example["caption"]]
        assert len(said) == 1
        seen.update(said)
    assert len(source) == 1797 and not any(left.values()) and len(seen) == len(digits.WORDINGS)


def test_tfds_itself_reads_the_same_and_the_label_that_the_caption_names(written, source):
    held = tfds.builder_from_directory(written).as_data_source(split="train")
    for i in range(0, len(source), 20):
        example = held[i]
        np.testing.assert_array_equal(example["image"], source[i]["image"])
        said = [digits.caption(example["label"], w) for w in range(len(digits.WORDINGS))]
        assert example["caption"].decode() == source[i]["caption"] and source[i]["caption"] in said


def test_a_caption_names_one_digit_and_no_two_are_alike():
    said = {digits.caption(label, w) for label in range(10) for w in range(len(digits.WORDINGS))}
    assert len(said) == 10 * len(digits.WORDINGS) and len(digits.WORDINGS) >= 6
    assert digits.caption(7, 0) == "a handwritten seven" and digits.caption(7, 1) == "the digit 7"
    assert not [text for text in said if re.search(r"\ba eight\b|[{}]", text)]


def test_size_and_seed_fix_every_byte_and_the_seed_matters(written, tmp_path):
    again = digits.write_dataset(tmp_path / "again", 32, seed=5)
    assert contents(again) == contents(written)
    other = digits.write_dataset(tmp_path / "other", 32, seed=6)
    assert contents(other) != contents(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_a_good_folder_is_left_alone(written, monkeypatch):
    monkeypatch.setattr(digits, "load_digits", None)  # nothing is computed either
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    assert digits.write_dataset(written, 32, seed=5) == written
    assert before == {path: path.stat().st_mtime_ns for path in written.iterdir()}


def test_another_folder_is_refused(written, tmp_path):
    for size, seed in ((16, 5), (32, 4)):
        with pytest.raises(ValueError, match="--config.data.path"):
            digits.write_dataset(written, size, seed)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        digits.write_dataset(tmp_path, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_damaged_shard_is_named(tmp_path):
    folder = digits.write_dataset(tmp_path / "digits", 8)
    shard = next(folder.glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        digits.write_dataset(tmp_path / "digits", 8)


KILLED = """
import os, signal
from proreflow_jax.data import digits
from proreflow_jax.storage import atomic
atomic.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
digits.write_dataset({folder!r}, 8)
"""


def test_killed_it_leaves_nothing_to_read_and_the_next_start_cleans_up(tmp_path):
    folder = tmp_path / "digits"
    done = subprocess.run([sys.executable, "-c", KILLED.format(folder=str(folder))])
    assert done.returncode == -9 and not folder.exists() and len(os.listdir(tmp_path)) == 1
    digits.write_dataset(folder, 8)
    assert os.listdir(tmp_path) == ["digits"]


def test_two_processes_that_start_together_agree(tmp_path):
    code = f"from proreflow_jax.data import digits; digits.write_dataset({str(tmp_path / 'digits')!r}, 8)"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code]).returncode, range(2)))
    assert done == [0, 0] and os.listdir(tmp_path) == ["digits"]


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_classifiers_pixels_survive_the_enlarging(size):
    from sklearn.datasets import load_digits

    images, labels = digits.load_digits(size)
    pixels, truth = digits.to_pixels8(images), load_digits()
    np.testing.assert_array_equal(labels, truth.target)
    assert pixels.shape == (1797, 64) and pixels.min() >= 0 and pixels.max() <= 16
    np.testing.assert_allclose(digits.to_pixels8(images / np.float32(255)), pixels, atol=1e-4)
    distance = np.abs(pixels - truth.data)  # at 8 x 8 the rounding to a byte, above it the blur of the bicubic kernel
    assert distance.max() <= (0.5 * 16 / 255 + 1e-9 if size == 8 else 5) and distance.mean() < 0.05 * 16


def test_a_classifier_of_the_originals_reads_the_enlarged():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    truth = load_digits()
    model = LogisticRegression(max_iter=200, tol=1e-2).fit(truth.data[:1200], truth.target[:1200])
    images, labels = digits.load_digits(32)
    pixels = digits.to_pixels8(images[1200:])
    assert model.score(pixels, labels[1200:]) > model.score(truth.data[1200:], truth.target[1200:]) - 0.03 > 0.85


def test_sizes_that_do_not_fit_are_refused():
    for size in (0, 12, 4):
        with pytest.raises(ValueError, match="--config.data.resolution"):
            digits.load_digits(size)
    with pytest.raises(ValueError, match="multiple of 8"):
        digits.to_pixels8(np.zeros((1, 12, 12, 3), np.uint8))


def test_without_sklearn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError) as error:
        digits.load_digits(8)
    assert "pip install scikit-learn (the extra `demo`)" in str(error.value) and "\n" not in str(error.value)
