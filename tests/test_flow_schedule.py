"""Laws of the time axis: one t per table entry, one function to the network's input, rates that fit the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.flow import schedule as sch

SD = sch.make_schedule("scaled_linear", 0.00085, 0.012)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
GRID_TIMES = np.arange(1001) / 1000
TABLES = [("scaled_linear", 0.00085, 0.012), ("linear", 1e-4, 0.02), ("squaredcos_cap_v2", 1e-4, 0.02)]


@pytest.mark.parametrize("beta_schedule, beta_start, beta_end", TABLES)
def test_tables_are_diffusers(beta_schedule, beta_start, beta_end):
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.DDIMScheduler(beta_schedule=beta_schedule, beta_start=beta_start, beta_end=beta_end)
    ours = sch.make_schedule(beta_schedule, beta_start, beta_end).alphas_cumprod
    np.testing.assert_allclose(ours, stock.alphas_cumprod.numpy(), rtol=2e-5)  # theirs is a float32 product


def test_timestep_of_every_grid_point_is_its_entry():
    expected = np.concatenate([[0], np.arange(1000)])
    backwards = jnp.float32(1) - jnp.arange(1000, -1, -1, dtype=jnp.float32) * jnp.float32(0.001)  # loses digits
    thirds = jnp.float32(0.25) + jnp.arange(251, dtype=jnp.float32) / 250 * jnp.float32(0.25)
    np.testing.assert_array_equal(SD.timestep(jnp.asarray(GRID_TIMES)), expected)
    np.testing.assert_array_equal(SD.timestep(backwards), expected)
    np.testing.assert_array_equal(SD.timestep(thirds), expected[250:501])
    assert SD.timestep(0.5).dtype == jnp.float32


def test_timestep_between_grid_points_is_not_rounded():
    np.testing.assert_allclose(SD.timestep(jnp.array([0.1234, 0.50005])), [122.4, 499.05], rtol=1e-6)


@pytest.mark.parametrize("x64, rtol", [(False, 5e-7), (True, 1e-13)])
@pytest.mark.parametrize("table", TABLES)
def test_levels_equal_the_table_on_the_grid(table, x64, rtol):
    schedule = sch.make_schedule(*table)
    squares = np.concatenate([schedule.alphas_cumprod[:1], schedule.alphas_cumprod])
    with jax.enable_x64(x64):
        t = jnp.asarray(GRID_TIMES)
        np.testing.assert_allclose(schedule.alpha(t), np.sqrt(squares), rtol=4 * rtol if table[0][0] == "s" else rtol)
        np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - squares), rtol=rtol)


def test_levels_fall_between_grid_points():
    t = jnp.linspace(0.001, 1, 5000)
    for table in TABLES:
        assert np.all(np.diff(sch.make_schedule(*table).log_snr(t)) < 0), table


def test_rates_are_the_derivatives_of_the_levels():
    with jax.enable_x64(True):
        t, h = jnp.linspace(0.0013, 0.9991, 777), 1e-7
        da, ds = SD.rates(t)
        np.testing.assert_allclose(da, (SD.alpha(t + h) - SD.alpha(t - h)) / (2 * h), rtol=1e-5)
        np.testing.assert_allclose(ds, (SD.sigma(t + h) - SD.sigma(t - h)) / (2 * h), rtol=1e-5)


def test_rates_are_continuous_across_grid_points():
    with jax.enable_x64(True):
        t = jnp.asarray(GRID_TIMES[2:1000])
        before, here, after = SD.rates(t - 1e-9), SD.rates(t), SD.rates(t + 1e-9)
        for b, h, a in zip(before, here, after, strict=True):
            np.testing.assert_allclose(b, h, rtol=1e-5)
            np.testing.assert_allclose(a, h, rtol=1e-5)


def test_below_the_first_entry_nothing_changes():
    flat = jnp.array([0.0, 0.0004, 0.00099])
    assert np.all(np.asarray(SD.alpha(flat)) == np.asarray(SD.alpha(0.001)))
    assert all(np.all(np.asarray(rate) == 0) for rate in SD.rates(flat))
    np.testing.assert_allclose(SD.rates(0.001)[1], SD.rates(0.001002)[1], rtol=1e-2)  # at the edge the limit from above


def test_low_precision_times_are_promoted():
    assert SD.alpha(jnp.asarray(0.5, jnp.bfloat16)).dtype == jnp.float32


def test_a_schedule_lives_in_a_closure_and_as_a_static():
    assert jax.jit(lambda s, t: s.alpha(t), static_argnums=0)(SD, jnp.array([0.5])) == SD.alpha(jnp.array([0.5]))


def test_from_config_reads_scheduler_config_json():
    np.testing.assert_array_equal(sch.from_config(CONFIG | {"steps_offset": 1}).alphas_cumprod, SD.alphas_cumprod)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"num_train_timesteps": 500}, "500"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"beta_start": None}, "beta_start"),
        ({"beta_end": 1.0}, "alphas_cumprod"),
    ],
)
def test_unusable_configs_are_refused_in_one_line(change, word):
    with pytest.raises(ValueError, match=word) as error:
        sch.from_config(CONFIG | change)
    assert "\n" not in str(error.value)
    assert "--config." in str(error.value)
