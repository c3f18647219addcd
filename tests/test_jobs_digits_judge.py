"""The digits' yardstick is at its floor for what the base model was trained on."""

from pathlib import Path

import numpy as np

from configs.digits_base import get_config
from proreflow_jax.data import digits, training_set
from proreflow_jax.evaluation import classifier, frechet
from proreflow_jax.jobs.digits_judge import make_digits_judge, scores


def test_draws_of_the_training_set_are_nearer_than_unmoved_digits(tmp_path: Path) -> None:
    config = get_config()
    config.data.path = str(tmp_path / "digits")
    images, _ = training_set.load_training_set(config.data)
    judge = make_digits_judge(config.data.resolution)
    unmoved, labels = digits.load_digits(config.data.resolution)
    count, known = len(unmoved), {image.tobytes(): label for image, label in zip(unmoved, labels, strict=True)}
    shown = [known[image.tobytes()] for image in images[4 * count : 5 * count]]  # the fifth of nine places: not moved
    sizes, near = {}, {}
    for name, pictures, each in (("training set", images, np.array(shown)), ("unmoved", unmoved, labels)):
        rows = np.random.default_rng(0).choice(len(pictures), 1000, replace=False)
        features = classifier.features(judge.judges, digits.to_pixels8(pictures[rows]))
        sizes[name] = frechet.frechet_distance(frechet.moments(features), judge.real)
        latents = np.zeros((1000, 1, 1, 1))
        near[name] = scores(judge, latents, pictures[rows], latents, each[rows % count])
    assert abs(near["training set"]["kernel"]) < 3 * near["training set"]["kernel_error"] < near["unmoved"]["kernel"], near
    assert sizes["training set"] < 0.15 < 0.3 < sizes["unmoved"], sizes
