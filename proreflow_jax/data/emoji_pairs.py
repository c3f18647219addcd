"""The emoji pictures that a model is judged by: pairs of concept and style that its training saw, and pairs held out.

Chosen by their names' hashes, so a rebuilt dataset has the same ones.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from proreflow_jax import UserError
from proreflow_jax.data.emoji import Picture, hold_out

SEEN, HELD_OUT = "seen", "held-out"


class Pairs(NamedTuple):
    """Pictures of one kind, as numbers of the dataset's rows."""

    rows: Int[np.ndarray, " n"]  # whose prompts are drawn
    others: Int[np.ndarray, " m"]  # real pictures of the same kind beside them, m <= n


class Labels(NamedTuple):
    """What every picture of a dataset shows, as numbers."""

    concept: Int[np.ndarray, " n"]
    family: Int[np.ndarray, " n"]  # of styles
    group: Int[np.ndarray, " n"]


def choose_pairs(pictures: Sequence[Picture], count: int) -> dict[str, Pairs]:
    """{SEEN: pairs, HELD_OUT: pairs}, `count` of each or as many as there are.

    Only concepts of two families of styles or more are taken: the judge knows a concept by the other families.
    Raises ValueError if there are none.
    """
    families = defaultdict(set)
    for picture in pictures:
        families[picture.concept.hex].add(picture.family)
    usable = np.array([len(families[picture.concept.hex]) > 1 for picture in pictures], bool)
    order = np.array(sorted(range(len(pictures)), key=lambda i: _place(pictures[i].name)))
    hidden, chosen = hold_out(pictures), {}
    for name, mask in ((SEEN, usable & ~hidden), (HELD_OUT, usable & hidden)):
        rows = order[mask[order]]
        if not len(rows):
            raise UserError(f"the emoji dataset has no {name} pictures to judge by: make it anew by make_emoji")
        chosen[name] = Pairs(rows[:count], rows[count : 2 * count])
    return chosen


def labels_of(pictures: Sequence[Picture]) -> Labels:
    """Concepts, families and groups numbered in the order of their names."""
    columns = ([p.concept.hex for p in pictures], [p.family for p in pictures], [p.concept.group for p in pictures])
    concept, family, group = (np.unique(column, return_inverse=True)[1] for column in columns)
    return Labels(concept, family, group)


def _place(name: str) -> bytes:
    return hashlib.sha256(f"{name}/evaluation".encode()).digest()
