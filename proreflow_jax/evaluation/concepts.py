"""A judge of what a picture shows: linear discriminants over image features, fitted in closed form, so the same every time.

Every family of styles is judged by discriminants fitted to the other families alone, so the judge has seen no picture of the
style it judges, and real pictures of that style give the ceiling under the same terms. Each family is centred at its own mean
(of its real pictures, without their labels), as styles differ most in what they have throughout.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from proreflow_jax import UserError

NAME = "concepts-lda"  # beside every share
SHRINK = 0.5  # share of the identity in the covariance within concepts; real pictures: top-1 .50 at .02, .52 at .1, .53 at .3


class ConceptJudge(NamedTuple):
    """Discriminants of the concepts that the other families show; of one family."""

    mean: Float[np.ndarray, " d"]  # of the family that it judges
    weight: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    concepts: Int[np.ndarray, " c"]  # their numbers


def fit_judge(
    features: Float[np.ndarray, "n d"], concepts: Int[np.ndarray, " n"], families: Int[np.ndarray, " n"], family: int
) -> ConceptJudge:
    """The judge of one family, fitted to real pictures of the others.

    Args:
      features, concepts, families: of all real pictures; concepts and families are numbers.
      family: the one to judge; of its pictures only the mean is used.

    Raises ValueError if there is no picture of the family, or none of another.
    """
    own = families == family
    if own.all() or not own.any():
        raise UserError("the judge of concepts needs pictures of two families of styles at least: make the dataset anew")
    x = features.astype(np.float64)
    for number in np.unique(families):
        x[families == number] -= x[families == number].mean(axis=0)
    x, labels = x[~own], concepts[~own]
    known, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    centres = np.zeros((len(known), x.shape[1]))
    np.add.at(centres, index, x)
    centres /= count[:, None]
    apart = x - centres[index]
    within = apart.T @ apart / max(len(x) - len(known), 1)
    ridge = SHRINK * np.trace(within) / len(within)
    weight = np.linalg.solve((1 - SHRINK) * within + ridge * np.eye(len(within)), centres.T)
    bias = -0.5 * np.einsum("cd,dc->c", centres, weight)
    return ConceptJudge(features[own].mean(axis=0, dtype=np.float64), weight, bias, known)


def discriminants(judge: ConceptJudge, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
    """The discriminants of pictures of the judge's family: the greatest is its verdict, judge.concepts[argmax]."""
    return (features - judge.mean) @ judge.weight + judge.bias


def ranks(judge: ConceptJudge, values: Float[np.ndarray, "n c"], concepts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many concepts the judge puts before each picture's own; 0: it is the verdict.

    values: of `discriminants`. concepts: numbers of the pictures' own, all of them known to the judge.
    """
    return (values > _own(judge, values, concepts)[:, None]).sum(axis=1)


def concept_scores(
    judge: ConceptJudge, values: Float[np.ndarray, "n c"], concepts: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """How far each picture's own concept stands above the mean of all concepts, in standard deviations over these.

    Of one kind with a CLIP score: it tells how well a picture fits its prompt where a share of right verdicts only counts them.
    values, concepts: as `ranks` takes them.
    """
    return (_own(judge, values, concepts) - values.mean(axis=1)) / values.std(axis=1)


def _own(judge: ConceptJudge, values: Float[np.ndarray, "n c"], concepts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return values[np.arange(len(values)), np.searchsorted(judge.concepts, concepts)]
