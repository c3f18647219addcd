"""The chain's order, the step-0 identity, and sampling: what a student does before it has learned anything."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_jit

from configs.digits import get_config
from proreflow_jax.flow import windows
from proreflow_jax.flow.parameterization import JUMPS, Parameterization
from proreflow_jax.flow.schedule import NoiseTable, grid_time, make_schedule
from proreflow_jax.flow.solvers import as_epsilon, make_step
from proreflow_jax.reflow.pairs import check_identity, identity_gap, make_predict, text_context
from proreflow_jax.reflow.sampler import check_sampling, decode, sample_latents
from proreflow_jax.run import stages
from proreflow_jax.run.stages import plan_stages

TOYS = tiny.toy_networks()
FROZEN = tiny.toy_frozen(TOYS)
SCHEDULE = TOYS.schedule
EPSILON, STUDENT = Parameterization("epsilon"), Parameterization("ddim_eps", 8)


def contexts(count=4):
    ids = tiny.rows(count)["ids"]
    states = lambda rows: text_context(TOYS.condition, FROZEN.text, rows)
    return states(ids), states(FROZEN.empty[None])


NOISE = jax.random.normal(jax.random.key(5), (4, *tiny.LATENT))


def test_stages_come_in_order_each_from_the_one_before():
    plan = plan_stages(get_config(), Path("run"), EPSILON, tiny.LATENT)
    assert [stage.windows for stage in plan] == [8, 4, 2]
    assert [stage.folder for stage in plan] == [Path("run/stage-8"), Path("run/stage-4"), Path("run/stage-2")]
    assert [stage.parent for stage in plan] == [stage.maker for stage in plan] == [None, plan[0], plan[1]]
    assert [stage.teacher for stage in plan] == [EPSILON, plan[0].student, plan[1].student]
    assert [stage.pairs.steps for stage in plan] == [8, 8, 8]  # 8 solver steps; then 4 Euler steps in each of two old windows
    assert stages.find_stage(plan, 4) is plan[1]


@pytest.mark.parametrize(
    "counts, words",
    [
        ((), "--config.stages is empty"),
        ((3,), "must divide 1000"),
        ((8, 0), "must divide 1000"),
        ((8, 5), "5 must be a smaller divisor of 8"),
        ((4, 8), "8 must be a smaller divisor of 4"),
        ((4, 4), "4 must be a smaller divisor of 4"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(counts, words):
    with pytest.raises(ValueError, match=words) as caught:
        stages.check_counts(counts)
    assert "\n" not in str(caught.value) and "--config.stages" in str(caught.value)


def test_an_unknown_stage_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"--stage=5 is not a stage.*\[8, 4, 2\]"):
        stages.find_stage(plan_stages(get_config(), Path("run"), EPSILON, tiny.LATENT), 5)


def gap(n, path="linear", schedule=SCHEDULE, denoiser=TOYS.denoiser, prediction="ddim_eps"):
    measure = quick_jit(
        partial(identity_gap, denoiser=denoiser, schedule=schedule, student=Parameterization(prediction, n, path))
    )
    return float(measure(FROZEN.teacher, NOISE, contexts()[0]))


@pytest.mark.parametrize("n, path", [(1, "linear"), (8, "linear"), (1000, "linear"), (4, "first_order")])
@pytest.mark.parametrize("prediction", JUMPS)
def test_an_untrained_student_is_its_teacher_one_ddim_step_a_window(n, path, prediction):
    assert gap(n, path, prediction=prediction) <= 1e-5


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_the_identity_holds_where_a_good_network_makes_both_terms_cancel(name):
    schedule = make_schedule(name, 1e-4, 0.02)
    level = lambda p, z, time, *told: schedule.sigma((time + 1) / 1000).reshape(-1, 1, 1, 1) * z
    assert gap(1, schedule=schedule, denoiser=TOYS.denoiser._replace(apply=level)) <= 1e-5


class Late(NoiseTable):
    """A schedule whose levels are read one grid step too late: its table and its functions disagree."""

    def log_snr(self, t):
        return super().log_snr(jnp.maximum(t - 1e-3, 0))


class Cosine(NoiseTable):
    """A schedule whose functions are those of another table."""

    def log_snr(self, t):
        return make_schedule("squaredcos_cap_v2", 0.0, 0.0).log_snr(t)


def identity(schedule=SCHEDULE, base=EPSILON, student=STUDENT, params=FROZEN.teacher):
    arrays = (contexts()[0], tiny.LATENT, jax.random.key(1))
    return check_identity(params, *arrays, denoiser=TOYS.denoiser, schedule=schedule, base=base, student=student)


@pytest.mark.parametrize("wrong", [Late, Cosine])
def test_a_wrong_schedule_is_refused_before_training(wrong):
    with pytest.raises(ValueError, match="step-0 identity.*at most 1e-05.*--config.model.path") as caught:
        identity(wrong(SCHEDULE.alphas_cumprod))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused_before_training():
    with pytest.raises(ValueError, match="differs from its teacher's DDIM step by nan"):
        identity(params={name: value * jnp.nan for name, value in FROZEN.teacher.items()})


def test_the_identity_is_checked_only_where_it_holds_by_design():
    assert identity() <= 1e-5
    assert identity(student=Parameterization("velocity", 8)) is None
    assert identity(base=Parameterization("v_prediction")) is None
    assert identity(base=Parameterization("v_prediction"), student=Parameterization("ddim_v", 8)) <= 1e-5
    assert gap(8, prediction="velocity") > 0.01


def sampled(flow, steps, guidance=1):
    options = {"flow": flow, "steps": steps, "guidance": guidance}
    sample = partial(sample_latents, denoiser=TOYS.denoiser, schedule=SCHEDULE, **options)
    return np.asarray(quick_jit(sample)(FROZEN.teacher, NOISE, *contexts()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_computes_in_the_dtype_that_is_asked_for(dtype):
    """The UNet gets weights, latents and states of that dtype; what it gives is carried on in float32."""
    dtypes = []

    def apply(params, z, t, *context):
        dtypes.append({str(array.dtype) for array in jax.tree.leaves((params, z, context))})
        return TOYS.denoiser.apply(params, z, t, *context)

    denoiser, options = TOYS.denoiser._replace(apply=apply), {"flow": STUDENT, "steps": 8, "guidance": 1, "dtype": dtype}
    latents = jax.eval_shape(
        partial(sample_latents, denoiser=denoiser, schedule=SCHEDULE, **options), FROZEN.teacher, NOISE, *contexts()
    )
    assert dtypes and all(each == {dtype} for each in dtypes) and latents.dtype == jnp.float32


def by_hand(flow, times, predict):
    """Windows crossed one after another by `advance`, in plain Python."""
    z = NOISE
    for t, u in zip(times[:-1], times[1:], strict=True):
        t, u = jnp.full(4, t, jnp.float32), jnp.full(4, u, jnp.float32)
        z = flow.advance(SCHEDULE, z, predict(z, t), windows.locate(t, flow.windows), u)
    return z


def student_predict(z, t):
    return tiny.toy_unet(FROZEN.teacher, z, SCHEDULE.timestep(t), contexts()[0].states)


@pytest.mark.parametrize("prediction, path", [("velocity", "linear"), ("diff_eps", "linear"), ("ddim_eps", "first_order")])
@pytest.mark.parametrize("steps", [4, 6])
def test_a_student_crosses_its_windows_one_after_another(prediction, path, steps):
    flow = Parameterization(prediction, 4, path)
    times = windows.bounds(4) if steps == 4 else np.array([1000, 875, 750, 625, 500, 250, 0]) / 1000
    want = jax.jit(lambda: by_hand(flow, times, student_predict))()
    np.testing.assert_allclose(sampled(flow, steps), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction, kind", JUMPS.items())
def test_an_untrained_ddim_student_samples_as_its_teacher_does(prediction, kind):
    np.testing.assert_allclose(
        sampled(Parameterization(prediction, 8), 8), sampled(Parameterization(kind), 8), rtol=1e-4, atol=1e-4
    )


def test_guidance_pushes_away_from_the_negative_prompts():
    context, negative = contexts()
    denoiser = lambda z, t, c: tiny.toy_unet(
        FROZEN.teacher, z, SCHEDULE.timestep(t), jnp.broadcast_to(c.states, context.states.shape)
    )
    guided = lambda z, t: denoiser(z, t, negative) + 4.0 * (denoiser(z, t, context) - denoiser(z, t, negative))
    flow = Parameterization("ddim_eps", 4)
    want = jax.jit(lambda: by_hand(flow, windows.bounds(4), guided))()
    ours = sampled(flow, 4, guidance=4.0)
    np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-3)
    assert np.abs(ours - sampled(flow, 4)).max() > 1e-2


def test_fewer_steps_than_windows_are_refused():
    with pytest.raises(ValueError, match="3 sampling steps, must be at least the number of windows, 4"):
        check_sampling(3, Parameterization("velocity", 4))
    check_sampling(4, Parameterization("velocity", 4))
    check_sampling(1, EPSILON)
    with pytest.raises(ValueError, match="0 sampling steps"):
        check_sampling(0, EPSILON)


def test_images_are_the_decoded_latents_in_eight_bits():
    latents = 0.3 * NOISE
    images = np.asarray(decode(TOYS.vae, FROZEN.vae, latents, TOYS.scaling))
    pixels = np.asarray(tiny.toy_vae(FROZEN.vae, latents / TOYS.scaling, "decode"))
    assert images.dtype == np.uint8 and images.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(images, np.clip((pixels + 1) / 2, 0, 1) * 255, atol=0.51)
    assert images.min() == 0 and images.max() == 255


def test_a_prediction_type_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="prediction_type 'score'.*must be one of epsilon"):
        as_epsilon("score", SCHEDULE, student_predict)
    assert as_epsilon("epsilon", SCHEDULE, student_predict) is student_predict


def test_a_student_step_stays_in_the_window_its_time_lies_in():
    """On a bound it takes the window that begins there."""
    flow = Parameterization("diff_eps", 4)
    step = make_step(flow, SCHEDULE, student_predict)
    t, u = jnp.full(4, grid_time(750)), jnp.full(4, grid_time(600))
    w = windows.Window(jnp.full(4, 1), t, t_s=jnp.full(4, 0.75), t_e=jnp.full(4, 0.5))
    want = flow.advance(SCHEDULE, NOISE, student_predict(NOISE, t), w, u)
    np.testing.assert_allclose(step(NOISE, t, u, None)[0], want, rtol=1e-5, atol=1e-5)


def test_a_prediction_is_float32_whatever_it_is_computed_in():
    t, context = jnp.full(4, 0.5), contexts()[0]
    exact = make_predict(TOYS.denoiser, SCHEDULE, FROZEN.teacher)(NOISE, t, context)
    coarse = make_predict(TOYS.denoiser, SCHEDULE, FROZEN.teacher, "bfloat16")(NOISE, t, context)
    assert coarse.dtype == jnp.float32 and 1e-4 < np.abs(coarse - exact).max() < 0.2
