"""An opened run as one value: the config, its base model, its stages, the mesh. Built in `run.open`, used by every job."""

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.reflow.pairs import Networks
from proreflow_jax.reflow.stages import Stage
from proreflow_jax.run.train_state import StateLayout
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.storage.paths import Location


class BaseUNet:
    """The base model's UNet on its devices: read when asked for, kept until it is freed, read again if asked again."""

    def __init__(self, read: Callable[[], Params]) -> None:
        self._read, self._params, self._digest = read, None, ""

    def params(self) -> Params:
        """The weights by torch names, float32."""
        if self._params is None:
            self._params = self._read()
        return self._params

    def digest(self) -> str:
        """The digest of the weights, worked out once."""
        self._digest = self._digest or fold(digest(self.params()))
        return self._digest

    def free(self) -> None:
        """Drops the weights; their memory is free once no caller holds them."""
        self._params = None


class Experiment(NamedTuple):
    """What every job works with."""

    config: ConfigDict
    run: Location  # the run's folder
    base: Pipeline  # all of the base model but the UNet's weights
    unet: BaseUNet
    networks: Networks
    flow: Parameterization  # of the base model
    stages: list[Stage]
    layout: StateLayout
    mesh: Mesh


class Weights(NamedTuple):
    """A network that is handed on: how it is parameterized, and the digest that lineage is made of."""

    params: Params
    flow: Parameterization
    digest: str  # of what was trained: the weights, or their factors
    factors: Params = {}  # low-rank, relative to the base model, where only these were trained
