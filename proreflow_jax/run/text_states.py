"""Text states from a cache in the place of text encoders: T5-XXL, 19 GB in float32, then never lies on the chips.

A run of Stable Diffusion 3 whose data are a cache with text states reads a prompt's states there, and the empty prompt's are
computed once, on the host. The encoders of Stable Diffusion 1, 2 and XL are small: they lie on every device, cache or not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax.data import kinds, records
from proreflow_jax.data.loader import Source, epoch_places
from proreflow_jax.models.network import Context
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.reflow.pairs import text_context
from proreflow_jax.run.dataset import cached_fields


def spares_encoders(config: ConfigDict, base: Pipeline) -> bool:
    """Whether a run's jobs read text states from a cache, and no text encoder lies on their devices."""
    return base.denoiser_name == "transformer" and kinds.TEXTS[0] in cached_fields(config)


def host_context(base: Pipeline, prompts: Sequence[str]) -> Context:
    """The conditioning by prompts, computed on the host's CPU where jax has it; numpy arrays, one row a prompt."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        host = jax.local_devices()[0]
    with jax.default_device(host):
        return jax.device_get(jax.jit(partial(text_context, base.condition))(base.text, base.tokenizer.encode(prompts)))


class WithText:
    """Pair records with the text states of their prompts, as they lie in the cache that the pairs were made from.

    Record i is of example i. Where its prompt was dropped the states are still the prompt's: the step replaces them, by `ids`.
    """

    def __init__(self, pairs: records.PairRecords, cache: Source, seed: int) -> None:
        self._pairs, self._cache, self._seed = pairs, cache, seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (place,) = epoch_places([index], self._seed, len(self._cache))
        item = self._cache[place]
        return self._pairs[index] | {name: np.asarray(item[name]) for name in kinds.TEXTS if name in item}
