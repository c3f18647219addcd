"""Laws of a shift by resolution: diffusers' own at every number of tokens, and anything else refused."""

import numpy as np
import pytest

from proreflow_jax.flow.schedule import from_config
from proreflow_jax.pretrained.moving_shift import at_tokens

CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
MOVING = CONFIG | {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2, "base_image_seq_len": 4}


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [4, 100, 4096, 9000])
def test_a_shift_by_resolution_is_one_shift_at_each(tokens, kind):
    """That which the pipeline's own line gives the stock scheduler as mu, at all its sigmas."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(MOVING, time_shift_type=kind)
    mu = calculate_shift(tokens, 4, 4096, 0.4, 1.2)
    theirs.set_timesteps(sigmas=[0.999, 0.75, 0.5, 0.2], mu=mu)
    fixed = at_tokens(MOVING | {"time_shift_type": kind}, tokens)
    sigma = from_config(fixed).sigma(np.array([0.999, 0.75, 0.5, 0.2, 0.0]))
    np.testing.assert_allclose(theirs.sigmas.numpy(), sigma, rtol=1e-6)
    assert at_tokens(fixed, 7) == fixed and at_tokens(CONFIG, 7) == CONFIG


@pytest.mark.parametrize(
    "change", [{"time_shift_type": "cubic"}, {"max_image_seq_len": 4}, {"base_shift": None}, {"time_shift_type": None}]
)
def test_another_line_is_refused_by_its_fields(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*--config.model.path") as error:
        at_tokens(MOVING | change, 16)
    assert "\n" not in str(error.value)
