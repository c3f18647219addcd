"""The optimiser: schedules end where they say, clipping and decay do what their numbers say, the average warms up."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from proreflow_jax.reflow import train_step

BASE = {
    "learning_rate": 0.1,
    "schedule": "constant",
    "warmup_steps": 0,
    "steps": 100,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "decay_rules": ((r"bias$", False), (".*", True)),
    "clip_norm": 0.0,
}
PARAMS = {"conv.weight": jnp.full((2, 2), 2.0), "conv.bias": jnp.full((2,), 2.0)}


def config(**changes: object) -> ConfigDict:
    return ConfigDict({**BASE, **changes})


def one_update(cfg: ConfigDict, grads: dict, params: dict = PARAMS) -> dict:
    transform = train_step.make_optimizer(cfg)
    updates, _ = transform.update(grads, transform.init(params), params)
    return updates


@pytest.mark.parametrize(("schedule", "half", "end"), [("constant", 1, 1), ("cosine", 0.5, 0), ("linear", 0.5, 0)])
def test_schedules_pass_their_middle_and_reach_their_end(schedule: str, half: float, end: float) -> None:
    rate = train_step.learning_rate(config(schedule=schedule, warmup_steps=20))
    assert rate(20) == pytest.approx(0.1)
    assert rate(60) == pytest.approx(0.1 * half)
    assert rate(100) == pytest.approx(0.1 * end, abs=1e-9)
    assert rate(1000) == pytest.approx(0.1 * end, abs=1e-9)


def test_warmup_is_linear_and_the_first_step_learns() -> None:
    rate = train_step.learning_rate(config(warmup_steps=9))
    np.testing.assert_allclose([rate(s) for s in range(12)], np.minimum(np.arange(1, 13) / 10, 1) * 0.1, rtol=1e-6)
    assert train_step.learning_rate(config())(0) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_host_knows_the_rate_of_any_step_of_a_training_of_any_length(schedule: str) -> None:
    for steps in (100, 2**31 - 1):
        cfg = config(schedule=schedule, warmup_steps=7, steps=steps)
        at = [0, 3, 7, 50, steps // 2, steps - 1]
        host, device = (
            [float(rate(s)) for s in at] for rate in (train_step.learning_rate(cfg, np), train_step.learning_rate(cfg))
        )
        np.testing.assert_allclose(host, device, rtol=1e-5, atol=1e-8)


def test_the_update_follows_the_schedule() -> None:
    """Adam's first step has size one in every coordinate, so the update is the learning rate itself."""
    grads = {name: jnp.ones_like(value) * 7 for name, value in PARAMS.items()}
    updates = one_update(config(warmup_steps=4), grads)
    np.testing.assert_allclose(updates["conv.weight"], -0.1 / 5, rtol=1e-5)


def test_clipping_bounds_the_global_norm_and_zero_is_off() -> None:
    """With a large epsilon Adam's first step is proportional to the gradient, so clipping shows."""
    grads = {name: jnp.ones_like(value) * 100 for name, value in PARAMS.items()}
    raw, clipped, loose = (one_update(config(epsilon=1e6, clip_norm=c), grads) for c in (0.0, 1.0, 1e6))
    norm = float(optax.tree.norm(grads))
    np.testing.assert_allclose(clipped["conv.weight"] * norm, raw["conv.weight"], rtol=1e-3)
    np.testing.assert_allclose(loose["conv.weight"], raw["conv.weight"])


def test_decay_shrinks_only_what_its_rule_names() -> None:
    zero = {name: jnp.zeros_like(value) for name, value in PARAMS.items()}
    updates = one_update(config(weight_decay=0.5), zero)
    np.testing.assert_allclose(updates["conv.weight"], -0.1 * 0.5 * 2.0)
    np.testing.assert_array_equal(updates["conv.bias"], 0.0)


def test_a_parameter_without_a_decay_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--config\.optimizer\.decay_rules matches conv\.bias"):
        train_step.make_optimizer(config(weight_decay=0.1, decay_rules=(("weight", True),))).init(PARAMS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("schedule", "cosin"), ("steps", 0), ("warmup_steps", 101), ("beta2", 1.0), ("clip_norm", -1.0), ("momentum", 1)],
)
def test_a_wrong_field_is_named_by_its_flag(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"--config\.optimizer\.{field}"):
        train_step.make_optimizer(config(**{field: value}))


def test_a_missing_field_is_named_by_its_flag() -> None:
    with pytest.raises(ValueError, match=r"--config\.optimizer\.beta1: unknown or missing"):
        train_step.make_optimizer({name: value for name, value in BASE.items() if name != "beta1"})


def test_ema_warms_up_and_then_keeps_its_decay() -> None:
    old, new = {"w": jnp.zeros(3, jnp.bfloat16)}, {"w": jnp.ones(3, jnp.bfloat16)}
    for step, d in [(0, 0.1), (8, 0.5), (10_000, 0.99)]:
        got = train_step.ema(old, new, 0.99, step)["w"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, 1 - d, rtol=1e-6)


def test_ema_of_a_constant_is_that_constant_bit_for_bit() -> None:
    value = {"w": jnp.asarray([0.1, -3.7, 1e-20], jnp.float32)}
    np.testing.assert_array_equal(train_step.ema(value, value, 0.9999, 17)["w"], value["w"])
