"""Numbers about a checkpoint: the Frechet distance against its textbook form, the judges of the digits, what people read."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from proreflow_jax.evaluation import classifier, report
from proreflow_jax.evaluation.frechet import frechet_distance, moments

COLUMNS = {"name": "method", "steps": "steps", "fd": "FD"}
ROWS = [{"name": "teacher <64>", "steps": 64, "fd": 0.123456}, {"name": "a | b & c", "steps": 2}]


def features(seed, n=300, d=12, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift


@pytest.mark.parametrize("n", [300, 8])
def test_the_distance_is_that_of_the_matrix_square_root(n):
    """With 8 examples of 12 features both covariances are singular."""
    (m1, c1), (m2, c2) = moments(features(0, n)), moments(features(1, n, shift=0.5))
    root = scipy.linalg.sqrtm(c1 @ c2)
    want = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root.real)
    found = frechet_distance((m1, c1), (m2, c2))
    assert found == pytest.approx(want, rel=1e-6)
    assert found == pytest.approx(frechet_distance((m2, c2), (m1, c1)), rel=1e-6)


def test_equal_sets_have_distance_zero_and_a_shift_its_square():
    first = moments(features(0))
    assert abs(frechet_distance(first, first)) < 1e-6
    assert frechet_distance(first, (first[0] + 2.0, first[1])) == pytest.approx(12 * 4.0, rel=1e-6)


def test_one_dimension_by_hand():
    assert frechet_distance((np.zeros(1), np.array([[4.0]])), (np.ones(1), np.array([[9.0]]))) == pytest.approx(2.0)


def test_moments_are_float64_and_need_two_examples():
    mean, covariance = moments(features(0).astype(np.float32))
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(covariance, np.cov(features(0).T), rtol=1e-4)
    with pytest.raises(ValueError, match="1 examples have no covariance: raise --config.evaluate.examples"):
        moments(features(0)[:1])


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return data.data.astype(np.float64), data.target


@pytest.fixture(scope="module")
def judges(digits):
    return classifier.fit(digits[0][:400], digits[1][:400])


def test_the_reader_knows_digits_it_has_not_seen(digits, judges):
    assert (classifier.read_classifier(judges, digits[0][400:800]) == digits[1][400:800]).mean() > 0.88


def test_the_reader_learns_from_moved_copies_too(digits):
    """Taught that moved copies are other digits, it says so."""
    pixels, labels = digits[0][:200], digits[1][:200]
    moved = np.roll(pixels.reshape(-1, 8, 8), 2, axis=2).reshape(-1, 64)
    taught = classifier.fit(pixels, labels, moved, (labels + 1) % 10)
    assert (classifier.read_classifier(taught, moved) == (labels + 1) % 10).mean() > 0.9
    assert (classifier.read_classifier(taught, pixels) == labels).mean() > 0.9


def test_the_features_are_the_same_every_time_and_tell_digits_from_noise(digits, judges):
    pixels = digits[0][:400]
    again = classifier.fit(pixels, digits[1][:400])
    assert np.array_equal(judges.weight, again.weight) and np.array_equal(judges.bias, again.bias)
    found = classifier.features(judges, pixels)
    assert found.shape == (400, 64) and found.min() >= 0
    first, second = moments(found[:200]), moments(found[200:])
    noise = moments(classifier.features(judges, np.random.default_rng(0).uniform(0, 16, (200, 64))))
    assert frechet_distance(first, second) < 0.2 * frechet_distance(first, noise)


def test_a_missing_scikit_learn_is_named_with_what_mends_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ValueError, match="scikit-learn: pip install"):
        classifier.fit(np.zeros((4, 64)), np.arange(4))


def test_a_table_lines_up_and_leaves_unknown_cells_empty():
    lines = report.text_table(ROWS, COLUMNS).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["|", "method", "|", "steps", "|", "FD", "|"]
    assert lines[1].count("|") == 4 and ":" in lines[1]
    assert lines[2].endswith("| 0.123 |") and lines[3].endswith("|       |")


def test_a_picture_has_a_row_a_method_and_a_column_a_seed(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0, ..., 0], images[1, ..., 1], images[2, ..., 2] = 255, 255, 255
    report.picture(tmp_path / "p.png", [("first", images), ("second", images[::-1])], ["a", "b"])
    picture = Image.open(tmp_path / "p.png")
    step = report.CELL + report.GAP
    assert picture.size == (report.LABEL + 2 * step, 22 + 2 * step)
    middle = lambda i, j: picture.getpixel((report.LABEL + j * step + 32, 22 + i * step + 32))
    assert [middle(0, 0), middle(0, 1)] == [(255, 0, 0), (0, 255, 0)]
    assert [middle(1, 0), middle(1, 1)] == [(0, 0, 255), (0, 255, 0)]
    assert np.asarray(picture)[:, : report.LABEL].min() < 100  # labels are written


def test_the_page_s_table_has_the_cells_of_the_text():
    shown = report.shown_table(ROWS, COLUMNS, {"fd": "less"}, [1])
    assert shown["heads"] == list(COLUMNS.values()) and shown["better"] == ["", "", "less"] and shown["compared"] == [1]
    lines = report.text_table(ROWS, COLUMNS).splitlines()[2:]
    for line, cells in zip(lines, shown["cells"], strict=True):
        assert line.replace(" ", "") == f"|{'|'.join(cells)}|".replace(" ", "")


def test_evaluation_needs_neither_jax_nor_scikit_learn_to_be_read():
    """The report's helpers stay light."""
    code = (
        "import sys; from proreflow_jax.evaluation import classifier, frechet, report; "
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'flax', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
