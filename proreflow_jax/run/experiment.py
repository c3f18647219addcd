"""A config and its base model as one value: what every job works with."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import pipeline
from proreflow_jax.reflow.pairs import Networks
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.storage import paths

PAIR_KEY, TRAIN_KEY, EVALUATION_KEY = 1, 2, 3  # folded into the run's key, then the stage's windows


class Experiment(NamedTuple):
    """What every verb works with."""

    config: ConfigDict
    run: paths.Location
    base: pipeline.Pipeline
    networks: Networks
    flow: Parameterization  # of the base model
    stages: list[Stage]
    mesh: Mesh


class Weights(NamedTuple):
    """A network somebody hands on: how it is read, and the digest that lineage is made of."""

    params: Params
    flow: Parameterization
    digest: str  # of what was trained: the weights, or their factors
    factors: Params = {}  # low-rank, relative to the base model, where only these were trained


def run_key(config: ConfigDict, purpose: int, windows: int) -> jax.Array:
    """The one key of a job, from the run's seed, what it is for, and the stage."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), windows)
