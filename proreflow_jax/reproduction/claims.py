"""What may be said of two methods: the rule by which a difference counts, and the gate that a testbed has to pass before.

A difference counts if the means over seeds are further apart than three pooled standard deviations of a seed. So the spread is
below a third of each effect that is claimed. Everything else is undecided, and so is everything at a budget where the gate is
closed.

The gate: (a) the teacher comes nearer to real data with each doubling of its steps, by a factor of four and more from 2 steps
to the most; (b) a baseline that is known to work, the grid's `baseline`, is nearer to the teacher's many-step result at 4 steps
than the untouched teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SPREADS, FACTOR, AT = 3.0, 4.0, (2, 4)  # of the rule, of (a), and the steps at which methods are compared
DISTANCE = "distance"  # the measure of (b), which every testbed has
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
Cells = Mapping[str, Sequence[Mapping[str, Any]]]  # method -> its cells at one budget, one a seed


class Gate(NamedTuple):
    """Whether claims may be made."""

    measure: str  # of (a)
    teacher: dict[int, float]  # its mean by steps, from 2 on
    falls: bool  # (a)
    baseline: dict[int, str]  # (b): budget -> a verdict

    @property
    def factor(self) -> float:
        """How much nearer to real data the teacher is at the most steps than at the fewest."""
        means = list(self.teacher.values())
        return means[0] / means[-1] if means else 0.0

    def is_open(self, budget: int) -> bool:
        """Whether claims may be made at this budget."""
        return self.falls and self.factor >= FACTOR and self.baseline.get(budget) == BETTER


def values(cells: Sequence[Mapping[str, Any]], measure: str, steps: int) -> list[float]:
    """One number a seed."""
    return [cell["steps"][str(steps)][measure] for cell in cells]


def beyond(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether a difference counts, by the rule on top of this file; false for a single seed."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return False
    pooled = np.sqrt((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 2)
    return bool(abs(np.mean(ours) - np.mean(theirs)) > SPREADS * pooled)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """BETTER (less), WORSE or UNDECIDED, of ours against theirs."""
    if not beyond(ours, theirs):
        return UNDECIDED
    return BETTER if np.mean(ours) < np.mean(theirs) else WORSE


def paired(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], measure: str, steps: int
) -> tuple[list[float], list[float]]:
    """The numbers of two methods at the seeds that both have."""
    by_seed = {cell["seed"]: cell for cell in other}
    both = [cell for cell in one if cell["seed"] in by_seed]
    return values(both, measure, steps), values([by_seed[cell["seed"]] for cell in both], measure, steps)


def make_gate(budgets: Mapping[int, Cells], teacher: str, baseline: str, measure: str) -> Gate:
    """The gate of a grid. budgets: budget -> cells, the teacher's among each."""
    first = next(iter(budgets.values()))[teacher]
    steps = [s for s in sorted(int(s) for s in first[0]["steps"]) if s >= min(AT)]
    means = {s: float(np.mean(values(first, measure, s))) for s in steps}
    numbers = list(means.values())
    falls = len(numbers) > 1 and all(a > b for a, b in zip(numbers, numbers[1:], strict=False))
    at = {
        budget: verdict(*paired(cells[baseline], cells[teacher], DISTANCE, max(AT)))
        for budget, cells in budgets.items()
        if baseline in cells and str(max(AT)) in cells[baseline][0]["steps"]
    }
    return Gate(measure, means, falls, at)


def make_claims(
    budgets: Mapping[int, Cells], pairs: Sequence[tuple[str, str, str]], measures: Sequence[str], gate: Gate
) -> list[dict[str, Any]]:
    """Every comparison (what, method, other method) at each budget, steps and measure that both have.

    change: of the mean, relative to the other method's. verdict: UNDECIDED where the gate is closed, whatever the numbers.
    """
    claims = []
    for budget, cells in budgets.items():
        for what, one, other in pairs:
            if one not in cells or other not in cells:
                continue
            for steps in [s for s in AT if str(s) in cells[one][0]["steps"]]:
                for measure in measures:
                    ours, theirs = paired(cells[one], cells[other], measure, steps)
                    if not ours:
                        continue
                    claims.append(
                        {
                            "what": what, "method": one, "other": other, "budget": budget, "steps": steps, "measure": measure,
                            "change": float(np.mean(ours) / np.mean(theirs) - 1), "beyond": beyond(ours, theirs),
                            "verdict": verdict(ours, theirs) if gate.is_open(budget) else UNDECIDED,
                        }
                    )  # fmt: skip
    return claims
