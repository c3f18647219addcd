"""The method on a rectified flow: its pairs, its loss, its sampler, and how a base model of this kind is opened."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_jit

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import RectifiedFlow, make_schedule
from proreflow_jax.flow.stock import untold_fields
from proreflow_jax.reflow.loss import LossRecipe, draw_examples, reflow_loss
from proreflow_jax.reflow.pairs import Frozen, PairRecipe, check_identity, cross_windows, text_context
from proreflow_jax.reflow.pretraining import draw_noise
from proreflow_jax.reflow.sampler import sample_latents
from proreflow_jax.run.base_identity import base_identity
from proreflow_jax.run.check_config import check_student
from proreflow_jax.run.open import base_flow
from proreflow_jax.run.read_config import read_config

FLOW = RectifiedFlow(3.0)
NETWORKS = tiny.toy_networks()._replace(schedule=FLOW)
TEACHER, STUDENT = Parameterization("flow"), Parameterization("velocity", 4)
TABLE = {"text_encoder": {"table.weight": tiny.random_params({"t": jax.ShapeDtypeStruct((30, tiny.WIDTH), "float32")}, 3)["t"]}}
IDS = np.arange(6 * tiny.LENGTH).reshape(6, tiny.LENGTH) % 30
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def params(name, seed):
    return jax.tree.map(jnp.asarray, tiny.random_params(getattr(NETWORKS, name).shapes, seed))


FROZEN = Frozen(
    jax.tree.map(jnp.asarray, TABLE), params("vae", 2), params("denoiser", 1), jnp.zeros(tiny.LENGTH, int), jax.random.key(0)
)


def pairs(start, steps=1, solver="ddim", windows=4):
    recipe = PairRecipe(windows, start, steps, solver, 1.0, 0.2, tiny.LATENT, "float32")
    batch = {"index": jnp.arange(6), "ids": jnp.asarray(IDS), "image": jnp.zeros((6, 8, 8, 3), jnp.uint8) + 90}
    return quick_jit(partial(cross_windows, recipe=recipe, flow=TEACHER, networks=NETWORKS))(FROZEN, batch)


@pytest.mark.parametrize("start", ["noise", "data"])
def test_an_untrained_student_has_no_loss_at_the_starts_of_its_teachers_steps(start):
    """The step-0 identity, through pairs, times, path and target: one Euler step a window is what the student says."""
    recipe = LossRecipe("velocity", 0.0, "fixed", 0.0, 1.0, 0, "float32")
    bound = {"flow": STUDENT, "networks": NETWORKS, "loss": recipe}
    draw = lambda pairs: draw_examples(FROZEN, pairs, jax.random.key(4), **bound)
    both = quick_jit(lambda pairs: reflow_loss(FROZEN.teacher, draw(pairs), **bound)[0])
    assert both(pairs(start)) < 1e-10
    assert both(pairs(start, steps=5)) > 1e-6


@pytest.mark.parametrize("steps", [4, 12])
def test_an_untrained_students_sample_is_its_teachers_in_euler_steps(steps):
    context = text_context(NETWORKS.condition, FROZEN.text, jnp.asarray(IDS))
    noise, bound = jax.random.normal(jax.random.key(1), (6, *tiny.LATENT)), {"denoiser": NETWORKS.denoiser, "schedule": FLOW}
    sample = lambda flow, **how: sample_latents(
        FROZEN.teacher, noise, context, context, **bound, flow=flow, steps=steps, guidance=1, **how
    )
    np.testing.assert_array_equal(quick_jit(lambda: sample(STUDENT))(), quick_jit(lambda: sample(TEACHER, solver="euler"))())


class Late(RectifiedFlow):
    """A schedule whose levels are read one grid step too late."""

    def sigma(self, t):
        return super().sigma(jnp.maximum(t - 1e-3, 0))


def test_the_identity_is_checked_before_training():
    context = text_context(NETWORKS.condition, FROZEN.text, jnp.asarray(IDS))
    check = lambda schedule, base=TEACHER, student=STUDENT: check_identity(
        FROZEN.teacher,
        context,
        tiny.LATENT,
        jax.random.key(1),
        denoiser=NETWORKS.denoiser,
        schedule=schedule,
        base=base,
        student=student,
    )
    assert check(FLOW) <= 1e-6 and check(RectifiedFlow(1.0), student=Parameterization("velocity", 8)) <= 1e-6
    assert check(make_schedule(**tiny.BETAS), base=Parameterization("epsilon")) is None
    with pytest.raises(ValueError, match="step-0 identity.*Euler step by .*at most 1e-05.*--config.model.path") as caught:
        check(Late(3.0))
    assert "\n" not in str(caught.value)


def test_noise_for_training_lies_on_the_line_and_its_weights_are_numbers():
    rows = {"mean": jnp.ones((64, *tiny.LATENT)), "std": jnp.zeros((64, *tiny.LATENT)), "ids": jnp.zeros((64, 1, 8), int)}
    draw = partial(draw_noise, None, schedule=FLOW, empty=jnp.zeros(8, int), drop=0.1, most_snr=5.0)
    drawn = quick_jit(draw)(rows, jax.random.key(0))
    s = (drawn["timestep"] / 1000)[:, None, None, None]
    np.testing.assert_allclose(drawn["z"], (1 - s) + s * drawn["eps"], atol=1e-6)
    assert np.all(np.isfinite(drawn["weight"])) and np.max(drawn["weight"]) <= 1


def test_a_student_of_a_flow_is_a_velocity_student():
    config = read_config("digits")
    for prediction in ("ddim_eps", "diff_eps", "ddim_v"):
        config.student.prediction = prediction
        with pytest.raises(
            ValueError, match=f"student.prediction={prediction}.*rectified flow.*--config.student.prediction=velocity"
        ):
            check_student(config, "flow")
    config.student.prediction = "velocity"
    check_student(config, "flow")


def test_a_base_model_is_read_by_its_schedulers_class(tmp_path):
    folder, config = tiny.write_model(tmp_path / "model"), read_config("digits")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER))
    base, networks = tiny.load(folder)
    assert base_flow(config, base) == TEACHER and networks.schedule == FLOW
    one = base_identity(base)["base.schedule"]
    base.scheduler["prediction_type"] = "epsilon"
    with pytest.raises(
        ValueError, match="prediction_type in the base model's scheduler_config.json='epsilon' must be one of flow$"
    ):
        base_flow(config, base)
    base.scheduler.pop("prediction_type")
    base.scheduler.update(untold_fields(3.0, 4))
    assert base_identity(base)["base.schedule"] == one
    base.scheduler.update(shift=2.0, shift_terminal=None)
    assert base_identity(base)["base.schedule"] != one
