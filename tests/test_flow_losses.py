"""Laws of the losses: one number per example, direction apart from size, gradients finite where norms vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proreflow_jax.flow import losses

KEY_V, KEY_T = jax.random.split(jax.random.key(0))
V = jax.random.normal(KEY_V, (3, 4, 5, 2))
TARGET = jax.random.normal(KEY_T, (3, 4, 5, 2))
SCALES = jnp.array([1e-3, 2.0, 300.0])[:, None, None, None]


@pytest.mark.parametrize("loss", [losses.squared_error, losses.cosine, losses.relative_error])
def test_one_number_per_example_that_no_other_example_enters(loss):
    whole = loss(V, TARGET)
    assert whole.shape == (3,)
    np.testing.assert_allclose(whole, [loss(V[i : i + 1], TARGET[i : i + 1])[0] for i in range(3)], rtol=1e-6)


def test_values_against_numpy():
    v, target = (np.asarray(x, np.float64).reshape(3, -1) for x in (V, TARGET))
    norm = np.linalg.norm
    np.testing.assert_allclose(losses.squared_error(V, TARGET), ((v - target) ** 2).mean(1), rtol=1e-5)
    cosine = (v * target).sum(1) / norm(v, axis=1) / norm(target, axis=1)
    np.testing.assert_allclose(losses.cosine(V, TARGET), cosine, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses.relative_error(V, TARGET), norm(v - target, axis=1) / norm(target, axis=1), rtol=1e-5)


def test_the_direction_term_is_zero_under_positive_scaling_and_two_under_negative():
    np.testing.assert_allclose(1 - losses.cosine(SCALES * TARGET, TARGET), 0, atol=1e-6)
    np.testing.assert_allclose(1 - losses.cosine(-SCALES * TARGET, TARGET), 2, atol=1e-6)


def test_the_direction_term_pulls_across_the_vector_only():
    grad = jax.grad(lambda v: losses.cosine(v, TARGET).sum())(V)
    np.testing.assert_allclose(jnp.sum(grad * V, axis=(1, 2, 3)), 0, atol=1e-6)
    assert float(jnp.abs(grad).max()) > 1e-3


@pytest.mark.parametrize("r", [0.3, 1.0, 2.5])
def test_the_direction_weight_is_the_cosine_term_that_the_squared_error_holds_already(r):
    weight = losses.direction_weight(TARGET)
    v = r * TARGET[::-1] * jnp.sqrt(weight / weight[::-1])[:, None, None, None]
    parts = weight / 2 * (r - 1) ** 2 + r * weight * (1 - losses.cosine(v, TARGET))
    np.testing.assert_allclose(losses.squared_error(v, TARGET), parts, rtol=1e-5, atol=1e-6)


def test_pseudo_huber_is_the_error_far_below_delta_and_its_root_far_above():
    small, large = jnp.array([1e-4, 3e-4]), jnp.array([1e6, 4e6])
    np.testing.assert_allclose(losses.pseudo_huber(small, 1.0), small, rtol=1e-4)
    np.testing.assert_allclose(losses.pseudo_huber(large, 0.5), jnp.sqrt(large), rtol=1e-2)
    assert np.isfinite(jax.grad(lambda e: losses.pseudo_huber(e, 0.1).sum())(jnp.zeros(2))).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-13, 1e-11])
def test_values_and_gradients_are_finite_near_zero(size):
    tiny = size * jnp.ones_like(V)
    both = lambda v, t: losses.squared_error(v, t) + 1 - losses.cosine(v, t)
    for v, target in ((tiny, TARGET), (V, tiny), (tiny, tiny)):
        values, grads = jax.value_and_grad(lambda v, t: both(v, t).sum(), argnums=(0, 1))(v, target)
        assert np.isfinite(values) and all(np.all(np.isfinite(g)) for g in grads)
        assert np.all(np.isfinite(losses.relative_error(v, target)))


def test_bfloat16_is_summed_in_float32():
    low = losses.squared_error(V.astype(jnp.bfloat16), TARGET.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, losses.squared_error(V, TARGET), rtol=2e-2)
