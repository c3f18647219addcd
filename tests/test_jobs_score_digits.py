"""The digits' yardstick is at its floor for what the base model was trained on."""

from pathlib import Path

import numpy as np

from configs.digits_base import get_config
from proreflow_jax.data import digits, training_set
from proreflow_jax.evaluation import classifier, frechet, kernel
from proreflow_jax.jobs.score_digits import make_digits_judge


def test_draws_of_the_training_set_are_nearer_than_unmoved_digits(tmp_path: Path) -> None:
    config = get_config()
    config.data.path = str(tmp_path / "digits")
    images, _ = training_set.load_training_set(config.data)
    judge = make_digits_judge(config.data.resolution)
    sizes, near = {}, {}
    for name, pictures in (("training set", images), ("unmoved", digits.load_digits(config.data.resolution)[0])):
        rows = np.random.default_rng(0).choice(len(pictures), 1000, replace=False)
        features = classifier.features(judge.judges, digits.to_pixels8(pictures[rows]))
        sizes[name] = frechet.frechet_distance(frechet.moments(features), judge.real)
        near[name] = kernel.estimate_distance(features, judge.sample)
    assert abs(near["training set"].value) < 4 * near["training set"].error < near["unmoved"].value, near
    assert sizes["training set"] < 0.15 < 0.3 < sizes["unmoved"], sizes
