"""Kernel distance by its definition, unbiased of pairs too; a judge of concepts that sees no picture of the style it judges."""

import itertools

import numpy as np
import pytest

from proreflow_jax.evaluation import concepts, kernel


def rows(seed, n=40, d=6, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32) + np.float32(shift)


def test_the_distance_is_the_mean_of_the_kernel_over_pairs_of_different_pictures():
    x, y = rows(0, 5), rows(1, 4, shift=0.3)
    k = lambda a, b: (float(np.dot(a.astype(np.float64), b.astype(np.float64))) / 6 + 1) ** 3
    own = lambda z: np.mean([k(a, b) for a, b in itertools.permutations(z, 2)])
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel.kernel_distance(x, y) == pytest.approx(1000 * (own(x) + own(y) - 2 * across), rel=1e-10)
    across = np.mean([k(x[i], y[j]) for i in range(4) for j in range(4) if i != j])
    assert kernel.kernel_distance(x[:4], y, paired=True) == pytest.approx(1000 * (own(x[:4]) + own(y) - 2 * across), rel=1e-10)


def test_it_is_unbiased_of_independent_sets_and_of_pairs_that_depend_on_each_other():
    independent = [kernel.kernel_distance(rows(i, 20), rows(1000 + i, 20)) for i in range(300)]
    noise = lambda i: 0.5 * rows(2000 + i, 20)
    paired = [kernel.kernel_distance(rows(i, 20) + noise(i), rows(i, 20) + noise(5000 + i), paired=True) for i in range(300)]
    for values in (independent, paired):
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    biased = [kernel.kernel_distance(rows(i, 20) + noise(i), rows(i, 20) + noise(5000 + i)) for i in range(300)]
    assert np.mean(biased) < -3 * np.std(biased) / np.sqrt(300)  # pairs taken for independent pictures


def test_what_the_prompts_show_falls_out_of_a_paired_distance():
    """Spread over draws of prompts; the second picture is the first with a little noise."""
    pairs = [(rows(i), rows(i) + 0.1 * rows(500 + i)) for i in range(50)]
    paired = np.std([kernel.kernel_distance(x, y, paired=True) for x, y in pairs])
    apart = np.std([kernel.kernel_distance(x, rows(900 + i)) for i, (x, _) in enumerate(pairs)])
    assert paired < 0.3 * apart


def test_the_error_is_that_of_the_mean_over_disjoint_parts():
    x, y = rows(0, 50), rows(1, 50, shift=0.5)
    value, error = kernel.estimate_distance(x, y)
    parts = [kernel.kernel_distance(x[i::5], y[i::5]) for i in range(5)]
    assert value == kernel.kernel_distance(x, y) > 0
    assert error == pytest.approx(np.std(parts, ddof=1) / np.sqrt(5))


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="raise --config.evaluate.examples"):
        kernel.kernel_distance(rows(0, 1), rows(1))
    with pytest.raises(ValueError, match="raise --config.evaluate.examples"):
        kernel.kernel_distance(rows(0, 4), rows(1, 5), paired=True)
    with pytest.raises(ValueError, match="examples to 10 or more"):
        kernel.estimate_distance(rows(0, 9), rows(1))


@pytest.fixture(scope="module")
def styles():
    """30 concepts in 4 families with offsets of their own, 12 features."""
    rng = np.random.default_rng(0)
    concept, family = np.tile(np.arange(30), 4), np.repeat(np.arange(4), 30)
    centres, offsets = rng.standard_normal((30, 12)), 5 * rng.standard_normal((4, 12))
    features = centres[concept] + offsets[family] + 0.3 * rng.standard_normal((120, 12))
    return features.astype(np.float32), concept, family


def test_the_judge_knows_a_concept_in_a_style_it_has_not_seen(styles):
    features, concept, family = styles
    judge = concepts.fit_judge(features, concept, family, 2)
    values = concepts.discriminants(judge, features[family == 2])
    places = concepts.ranks(judge, values, concept[family == 2])
    assert (places == 0).mean() > 0.8
    shuffled = concepts.ranks(judge, values, np.roll(concept[family == 2], 1))
    assert (shuffled == 0).mean() < 0.2 and abs(shuffled.mean() - 14.5) < 5
    np.testing.assert_array_equal(places == 0, judge.concepts[values.argmax(axis=1)] == concept[family == 2])


def test_a_concept_s_score_is_its_place_among_all_and_falls_as_pictures_lose_it(styles):
    features, concept, family = styles
    judge, own = concepts.fit_judge(features, concept, family, 2), concept[family == 2]
    of = lambda x: concepts.concept_scores(judge, concepts.discriminants(judge, x), own)
    values = concepts.discriminants(judge, features[family == 2])
    every = np.stack([concepts.concept_scores(judge, values, np.full(30, number)) for number in range(30)])
    np.testing.assert_allclose(every.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(every.std(axis=0), 1, atol=1e-6)
    noise = np.random.default_rng(1).standard_normal((30, 12))
    means = [of(features[family == 2] + scale * noise).mean() for scale in (0, 1, 3)]
    assert means[0] > means[1] > means[2]


def test_the_judge_learns_nothing_from_the_labels_of_its_own_family(styles):
    features, concept, family = styles
    other = np.where(family == 2, (concept + 7) % 30, concept)
    one, two = (concepts.fit_judge(features, labels, family, 2) for labels in (concept, other))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_concept_that_no_other_family_shows_is_no_verdict(styles):
    features, concept, family = styles
    alone = (concept != 4) | (family == 2)
    judge = concepts.fit_judge(features[alone], concept[alone], family[alone], 2)
    assert 4 not in judge.concepts and len(judge.concepts) == 29


def test_one_family_cannot_be_judged(styles):
    features, concept, family = styles
    with pytest.raises(ValueError, match="two families"):
        concepts.fit_judge(features, concept, np.zeros_like(family), 0)
