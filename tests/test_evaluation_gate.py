"""A testbed passes, or does not, by the numbers of made curves."""

import pytest

from proreflow_jax.evaluation import gate
from proreflow_jax.evaluation.gate import StudentScore


def over_seeds(mean, apart=0.1, common=0.0):
    """Three seeds with a spread of `apart`, beside what all rows share by seed."""
    return {seed: mean + apart * sign + common * sign for seed, sign in enumerate((-1, 0, 1))}


GOOD = {64: over_seeds(10), 32: over_seeds(10.1), 16: over_seeds(13), 8: over_seeds(20), 4: over_seeds(40), 2: over_seeds(90)}


def test_a_falling_curve_passes():
    verdict = gate.falls_with_steps(GOOD)
    assert verdict.passed, verdict
    assert verdict.sentence().startswith("(a) passed: 90 / 40 / 20 / 13 / 10.1 / 10 at 2 / 4 / 8 / 16 / 32 / 64 steps; ")
    assert "2 steps are 9 times as far as 64" in verdict.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({8: over_seeds(13.1)}, "8 -> 16 falls by 0.1 +- "),  # no fall beyond the spread
        ({64: over_seeds(12)}, "32 -> 64 falls by -1.9"),  # a rise at the end
        ({2: over_seeds(40.5)}, "at least 4 times"),  # 4.05 times, within the spread of 4
        ({2: over_seeds(70, 20)}, "at least 4 times"),  # by less than twice the spread
    ],
)
def test_a_curve_that_does_not_fall_enough_does_not_pass(change, said):
    odd = {8: {0: 13.0, 1: 13.3, 2: 13.0}} if 8 in change else change
    verdict = gate.falls_with_steps(GOOD | odd)
    assert verdict.passed is False and said in verdict.reason, verdict


def test_a_last_step_within_the_spread_is_no_rise():
    wide = {64: {0: 10.2, 1: 10.0, 2: 10.3}, 32: over_seeds(10.1)}
    assert gate.falls_with_steps(GOOD | wide).passed


def test_a_teacher_that_reaches_the_real_pictures_passes():
    zero = {64: over_seeds(-0.1), 32: over_seeds(0.0), 16: over_seeds(1), 8: over_seeds(2), 4: over_seeds(4), 2: over_seeds(9)}
    verdict = gate.falls_with_steps(zero)
    assert verdict.passed and "not told from real pictures" in verdict.reason


def test_one_seed_measures_nothing():
    for verdict in gate.judge_testbed({n: {0: values[0]} for n, values in GOOD.items()}, []):
        assert verdict.passed is None and "not measured" in verdict.sentence()


def test_what_all_seeds_share_is_no_spread():
    """Each seed moves all rows by as much: the falls are exact."""
    shared = {n: over_seeds(values[1], 0.01, common=5.0) for n, values in GOOD.items()}
    assert gate.spread_is_small([("fall", gate.difference(shared[2], shared[4]))]).passed


def test_gains_count_beyond_three_spreads():
    say = lambda *gains: gate.gain_sentence("a student", dict(zip(("nearer by", "better by"), gains, strict=True)))
    clear, small, lost = (gate.Difference(*pair) for pair in ((4.0, 1.0), (2.9, 1.0), (-4.0, 1.0)))
    assert say(clear, clear) == "a student: nearer by 4 +- 1, better by 4 +- 1; all beyond three spreads"
    assert say(small, clear).endswith("; not beyond three spreads: nearer")
    assert say(clear, lost).endswith("better by -4 +- 1; not beyond three spreads: better")
    assert say(clear, gate.Difference(4.0, None)) == "a student: one seed has no spread"


def test_the_baseline_wins_only_beyond_the_spread():
    rows = lambda value, apart=0.1: [
        StudentScore("2-window student", 2, 2, over_seeds(1)),
        StudentScore("4-window student", 4, 4, {0: value, 1: value + apart, 2: value}),
    ]
    of = lambda students: {verdict.name: verdict for verdict in gate.judge_testbed(GOOD, students)}
    assert of(rows(30.0))["b"].passed is True
    assert of(rows(50.0))["b"].passed is False
    assert of(rows(39.0, 9.0))["b"].passed is False
    assert of([])["b"].passed is None and of([])["b"].reason == "the run has no 4-window student in 4 steps"
    claims = of(rows(39.0, 9.0))["c"]
    assert claims.passed is False and claims.reason.endswith(
        "undecided, spread above a third: 4-window student against the teacher, 4 steps"
    )
    assert of(rows(30.0))["c"].passed is True
