"""What is measured of drawn digits: how far from the teacher's, how near the real ones, and whether they are read."""

from typing import NamedTuple

import numpy as np

from proreflow_jax.data import digits
from proreflow_jax.evaluation import classifier, frechet, kernel
from proreflow_jax.runtime.metrics import check_finite_rows


class DigitsJudge(NamedTuple):
    """The digits' judges, and the real digits in their features (n, d): what each is, and the moments of all."""

    judges: classifier.Judges
    features: np.ndarray
    digits: np.ndarray  # (n,)
    real: tuple[np.ndarray, np.ndarray]


def check_latents(latents: np.ndarray, labels: np.ndarray) -> None:
    """Raises FloatingPointError, one line with the prompts, for latents (n, h, w, c) that are no finite numbers."""
    captions = [digits.caption(label, i // 10) for i, label in enumerate(labels)]
    check_finite_rows(np.isfinite(latents).all(axis=(1, 2, 3)), captions)


def scores(
    judge: DigitsJudge, latents: np.ndarray, images: np.ndarray, reference: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """distance (RMS of latents to the reference's), frechet and kernel (to the real digits), the standard error of the latter
    kernel_error, recognised (share), of n samples.

    latents, reference: (n, h, w, c). images: (n, height, width, 3) uint8. labels: the prompts' digits, (n,).
    Raises FloatingPointError, one line with the prompts, for latents that are no finite numbers.
    """
    check_latents(latents, labels)
    pixels = digits.to_pixels8(images)
    features = classifier.features(judge.judges, pixels)
    order = np.random.default_rng(0).permutation(len(labels))  # prompts take turns, and so would the parts of the estimate
    near = kernel.estimate_distance(features[order], _partners(judge, labels)[order], paired=True)
    return {
        "distance": float(np.sqrt(np.mean((latents - reference) ** 2))),
        "frechet": frechet.frechet_distance(frechet.moments(features), judge.real),
        "kernel": near.value,
        "kernel_error": near.error,
        "recognised": float(np.mean(classifier.read_classifier(judge.judges, pixels) == labels)),
    }


def _partners(judge: DigitsJudge, labels: np.ndarray) -> np.ndarray:
    """Features (n, d) of real digits, for each label another one that is the same digit."""
    chosen, shuffled = np.empty(len(labels), np.int64), np.random.default_rng(0).permutation(len(judge.digits))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        chosen[places] = np.resize(shuffled[judge.digits[shuffled] == label], len(places))
    return judge.features[chosen]


def make_digits_judge(size: int) -> DigitsJudge:
    """The judges of digits of so many pixels a side. Raises ValueError if scikit-learn is missing.

    The real digits are those that the base model was trained on: each also moved by a pixel, to eight sides.
    """
    images, labels = digits.load_digits(size)
    pixels = digits.to_pixels8(images)
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    moved = np.concatenate([digits.to_pixels8(_moved(images, *offset)) for offset in offsets])
    judges = classifier.fit(pixels, labels, moved, np.tile(labels, len(offsets)))
    features = classifier.features(judges, np.concatenate([pixels, moved]))
    return DigitsJudge(judges, features, np.tile(labels, len(offsets) + 1), frechet.moments(features))


def _moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images moved by up to one pixel; what comes in is black."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = images.shape[1:3]
    return padded[:, 1 - down : 1 - down + h, 1 - right : 1 - right + w]
