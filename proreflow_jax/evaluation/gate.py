"""What a testbed must show before methods are compared on it, in words: passed, not passed, or not measured.

(a) the teacher's distance to real pictures falls with its steps, and at the fewest is at least RATIO times that at the most;
(b) a student of 4 windows (PeRFlow is the baseline meant) is nearer to real pictures than the teacher in 4 steps;
(c) the spread over seeds is below a third of every effect that is claimed.

Seeds are of the noise and shared by all rows, so falls and effects are differences of the same seed, and their spread is that
of these differences. A difference counts where it is more than SPREADS times its spread.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from proreflow_jax.evaluation.protocols import mean_and_spread

RATIO = 4.0  # of the fewest steps' distance to the most steps'
SPREADS = 2.0
THIRD = 3.0  # effect over spread
BASELINE = 4  # windows and steps of (b)

Values = Mapping[int, float]  # {seed: number}
WORDS = {True: "passed", False: "not passed", None: "not measured"}


class Verdict(NamedTuple):
    """One of (a), (b), (c)."""

    name: str
    passed: bool | None  # None: not measured
    reason: str

    def sentence(self) -> str:
        """In words."""
        return f"({self.name}) {WORDS[self.passed]}: {self.reason}"


class StudentScore(NamedTuple):
    """A student's distances to real pictures, in so many steps."""

    method: str  # such as "4-window student"
    windows: int
    steps: int
    values: Values


class Difference(NamedTuple):
    """First minus second, by the seeds that both have."""

    mean: float
    spread: float | None  # None of one seed

    def exceeds(self, times: float) -> bool:
        """Whether it is above 0 by more than so many spreads; never of one seed."""
        return self.spread is not None and self.mean > times * self.spread

    def said(self) -> str:
        """Such as "1.2 +- 0.1"."""
        return f"{self.mean:.3g}" + ("" if self.spread is None else f" +- {self.spread:.2g}")


def judge_testbed(teacher: Mapping[int, Values], students: Sequence[StudentScore]) -> list[Verdict]:
    """(a), (b) and (c) by distances to real pictures. teacher: {steps: distances}. Effects are those of (a) and (b)'s kind:
    the teacher's fewest steps against its most, and each student against the teacher in as many steps.
    """
    few, many = min(teacher), max(teacher)
    effects = [(f"teacher, {few} against {many} steps", difference(teacher[few], teacher[many]))] if few < many else []
    for student in students:
        if student.steps in teacher:
            name = against_teacher(student.method, student.steps)
            effects.append((name, difference(teacher[student.steps], student.values)))
    baseline = next((each.values for each in students if (each.windows, each.steps) == (BASELINE, BASELINE)), None)
    return [falls_with_steps(teacher), baseline_wins(teacher.get(BASELINE), baseline), spread_is_small(effects)]


def against_teacher(method: str, steps: int) -> str:
    """What is compared, in words."""
    return f"{method} against the teacher, {steps} steps"


def gain_sentence(name: str, gains: Mapping[str, Difference]) -> str:
    """What a student gains by every measure, and which of it counts. gains: by words that take a number behind them."""
    if any(gain.spread is None for gain in gains.values()):
        return f"{name}: one seed has no spread"
    text = ", ".join(f"{words} {gain.said()}" for words, gain in gains.items())
    small = [words.removesuffix(" by") for words, gain in gains.items() if not gain.exceeds(THIRD)]
    return f"{name}: {text}; " + (f"not beyond three spreads: {', '.join(small)}" if small else "all beyond three spreads")


def difference(first: Values, second: Values) -> Difference:
    """The paired difference. Raises ValueError if they have no seed in common."""
    return Difference(*mean_and_spread({seed: first[seed] - second[seed] for seed in first if seed in second}))


def falls_with_steps(curve: Mapping[int, Values]) -> Verdict:
    """(a). curve: {steps: distances to real pictures} of the teacher."""
    steps = sorted(curve)
    if len(steps) < 2 or any(len(curve[n]) < 2 for n in steps):
        return Verdict("a", None, "it needs the teacher at two numbers of steps and two seeds at least")
    means = {n: mean_and_spread(curve[n])[0] for n in steps}
    pairs = list(zip(steps, steps[1:], strict=False))
    short = [(n, m) for n, m in pairs[:-1] if not difference(curve[n], curve[m]).exceeds(SPREADS)]
    n, m = pairs[-1]
    if difference(curve[m], curve[n]).exceeds(SPREADS):  # the last may stay where it is, not rise
        short.append((n, m))
    few, many = steps[0], steps[-1]
    enough = difference(curve[few], {seed: RATIO * value for seed, value in curve[many].items()})
    text = [f"{' / '.join(f'{means[n]:.3g}' for n in steps)} at {' / '.join(map(str, steps))} steps"]
    text += [f"{n} -> {m} falls by {difference(curve[n], curve[m]).said()} only" for n, m in short]
    text.append(
        f"{few} steps are {means[few] / means[many]:.2g} times as far as {many}"
        if means[many] > 0
        else f"{many} steps are not told from real pictures"
    )
    if not enough.exceeds(SPREADS):
        text.append(f"at least {RATIO:g} times is needed, by more than twice the spread")
    return Verdict("a", not short and enough.exceeds(SPREADS), "; ".join(text))


def baseline_wins(teacher: Values | None, student: Values | None) -> Verdict:
    """(b). Distances to real pictures of the teacher and of a 4-window student, both in 4 steps; None: there is none."""
    if not teacher or not student:
        lacking = "teacher" if not teacher else f"{BASELINE}-window student"
        return Verdict("b", None, f"the run has no {lacking} in {BASELINE} steps")
    gain = difference(teacher, student)
    if gain.spread is None:
        return Verdict("b", None, f"the student is nearer by {gain.said()}; one seed has no spread")
    return Verdict("b", gain.exceeds(SPREADS), f"the {BASELINE}-window student is nearer to real pictures by {gain.said()}")


def spread_is_small(effects: Sequence[tuple[str, Difference]]) -> Verdict:
    """(c). effects: what is claimed, by name."""
    if not effects or any(effect.spread is None for _, effect in effects):
        return Verdict("c", None, "it needs effects over two seeds at least")
    undecided = [name for name, effect in effects if not abs(effect.mean) > THIRD * effect.spread]
    text = [f"{name}: {effect.said()}" for name, effect in effects]
    text += [f"undecided, spread above a third: {', '.join(undecided)}"] if undecided else []
    return Verdict("c", not undecided, "; ".join(text))
