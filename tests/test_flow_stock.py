"""Laws of the stock scheduler of a rectified flow: where it stops, told and untold, and that its step is the student's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.flow import solvers, stock, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import RectifiedFlow, from_config

FLOW = RectifiedFlow(3.0)
CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
GRID_TIMES = np.arange(1001) / 1000


@pytest.fixture
def flow_match():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("n, steps", [(1, 1), (2, 2), (4, 4), (8, 8), (2, 4), (4, 8), (8, 16), (4, 6), (4, 40)])
def test_told_sigmas_the_stock_scheduler_is_the_students_sampler(flow_match, n, steps):
    import torch

    told = flow_match.from_config(CONFIG)
    told.set_timesteps(sigmas=windows.told_sigmas(steps, n))
    nodes = windows.sampling_nodes(steps, n)
    np.testing.assert_allclose(told.sigmas.numpy(), FLOW.sigma(nodes), rtol=2e-7)
    np.testing.assert_allclose(told.timesteps.numpy(), FLOW.timestep(nodes[:-1]), rtol=2e-7)
    assert np.all(np.isin(windows.bounds(n), nodes))

    model, z = lambda z, t: jnp.tanh(z + t[:, None]), jax.random.normal(jax.random.key(0), (2, 8))
    step = solvers.make_step(Parameterization("velocity", n), FLOW, model)
    theirs = torch.from_numpy(np.array(z))
    for t, entry in zip(nodes[:-1], told.timesteps, strict=True):
        v = torch.from_numpy(np.array(model(jnp.asarray(theirs.numpy()), jnp.full(2, t, jnp.float32))))
        theirs = told.step(v, entry, theirs).prev_sample
    np.testing.assert_allclose(solvers.solve(step, z, nodes), theirs.numpy(), atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 20])
def test_two_fields_make_the_untold_scheduler_stop_at_every_bound(flow_match, n, shift):
    fields, bounds = stock.untold_fields(shift, n), RectifiedFlow(shift).sigma(windows.bounds(n))
    untold = flow_match(**fields)
    untold.set_timesteps(n)
    np.testing.assert_allclose(untold.sigmas.numpy(), bounds, atol=2e-7)
    for more in ((n - 1), 3 * (n - 1)) if n > 1 else (1, 3):  # with one window all steps lie in it
        untold.set_timesteps(n + more)
        assert np.max(np.min(np.abs(untold.sigmas.numpy()[:, None] - np.asarray(bounds)), axis=0)) < 2e-7
        assert n == 1 or untold.sigmas[-2] == pytest.approx(float(bounds[-2]), abs=1e-6)  # the last window in one step
    assert from_config({**CONFIG, **fields}) == RectifiedFlow(shift)
    assert from_config({**untold.config, "_class_name": CONFIG["_class_name"]}) == RectifiedFlow(shift)


def test_without_them_it_misses_all_but_the_first_and_spends_a_step_on_the_last_percent(flow_match):
    plain = flow_match(shift=3.0)
    plain.set_timesteps(4)
    bounds = np.asarray(FLOW.sigma(windows.bounds(4)))
    assert np.min(np.abs(plain.sigmas.numpy()[1:-1, None] - bounds)) > 0.008
    assert plain.sigmas[-2] == pytest.approx(0.0089, abs=1e-4)


def test_no_field_meets_the_bounds_at_both_n_and_2n_steps(flow_match):
    """The last sigma of M does not depend on M, and would have to be S(1/N) and S(1/2N)."""
    for fields in ({}, {"shift_terminal": 0.5}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}):
        scheduler, last = flow_match(**{"shift": 3.0, **fields}), []
        for steps in (4, 8):
            scheduler.set_timesteps(steps)
            last.append(float(scheduler.sigmas[-2]))
        assert last[0] == pytest.approx(last[1], rel=1e-5), fields


def test_a_shift_that_no_field_can_bring_is_refused():
    with pytest.raises(ValueError, match=r"shift 40.*1000 windows.*--config\.stages"):
        stock.untold_fields(40.0, 1000)


@pytest.mark.parametrize("n, steps", [(2, 2), (4, 4), (8, 8), (2, 8), (4, 8), (8, 40)])
def test_comfyuis_simple_stops_at_every_bound(n, steps):
    """Its table has S(1/1000) first; by its rule the step k begins at the entry k / steps of the way back."""
    table = np.asarray(FLOW.sigma(GRID_TIMES[1:]))
    visited = [table[len(table) - 1 - int(k * (len(table) / steps))] for k in range(steps)] + [0.0]
    np.testing.assert_allclose(visited, FLOW.sigma(windows.sampling_nodes(steps, n)), rtol=2e-7)
