"""Pairs: an example's numbers depend on nothing but its index, and what a pair holds is the teacher's own trajectory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_jit

from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization, convert
from proreflow_jax.flow.schedule import grid_time
from proreflow_jax.flow.solvers import make_step
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.pairs import PairRecipe, make_predict, text_context
from proreflow_jax.reflow.sampler import sample_latents

TOYS = tiny.toy_networks()
FROZEN = tiny.toy_frozen(TOYS)
RECIPE = PairRecipe(4, "noise", 2, "ddim", 1.0, 0.0, tiny.LATENT, "float32")
TEACHER = Parameterization("epsilon")


@cache
def maker(flow, recipe):
    return quick_jit(partial(pairs.cross_windows, recipe=recipe, flow=flow, networks=TOYS))


def make(count=16, first=0, flow=TEACHER, frozen=FROZEN, batch=None, **changes):
    return jax.device_get(maker(flow, RECIPE._replace(**changes))(frozen, batch or tiny.rows(count, first)))


def spoken(ids):
    """The text states of prompts."""
    return text_context(TOYS.condition, FROZEN.text, jnp.asarray(ids))


def crossed(step, z, nodes):
    """All states of a solver, bounds in front."""
    solve = quick_jit(lambda z, nodes: solvers.solve(step, z, nodes, keep=True)[1])
    return np.asarray(solve(jnp.asarray(z), jnp.asarray(nodes, jnp.float32)))


def sampled(flow, steps, ids, noise):
    sample = partial(sample_latents, denoiser=TOYS.denoiser, schedule=TOYS.schedule, flow=flow, steps=steps, guidance=1)
    context = spoken(ids)
    return np.asarray(quick_jit(sample)(FROZEN.teacher, jnp.asarray(noise), context, jax.tree.map(lambda x: x[:1], context)))


@pytest.mark.parametrize("start", pairs.STARTS)
def test_an_example_is_the_same_whatever_batch_it_is_in(start):
    options = {"start": start, "dropout": 0.5, "guidance": 2.0}
    whole, part = make(16, **options), make(3, first=4, **options)
    np.testing.assert_allclose(part["states"], whole["states"][4:7], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(part["first"], whole["first"][4:7])
    np.testing.assert_array_equal(part["ids"], whole["ids"][4:7])


def test_examples_differ_from_each_other_and_between_jobs():
    states = make()["states"][:4]
    assert min(np.abs(states[i] - states[j]).max() for i in range(4) for j in range(i)) > 0.1
    other = make(frozen=FROZEN._replace(key=jax.random.key(1)))["states"][:4]
    assert np.abs(states - other).max() > 0.1


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_from_noise_the_bounds_are_the_teachers_own_trajectory(solver):
    made = make(solver=solver)
    assert made["states"].shape == (16, 5, *tiny.LATENT) and not made["first"].any()
    step = make_step(
        TEACHER, TOYS.schedule, lambda z, t: make_predict(TOYS.denoiser, TOYS.schedule, FROZEN.teacher)(z, t, context), solver
    )
    context = spoken(made["ids"])
    states = crossed(step, made["states"][:, 0], windows.sampling_nodes(8, 1))
    np.testing.assert_allclose(made["states"], np.moveaxis(states[::2], 0, 1), rtol=1e-4, atol=1e-5)


def test_from_noise_the_first_state_is_unit_noise_and_the_last_is_the_teachers_sample():
    made = make()
    noise = made["states"][:, 0]  # 1024 numbers
    assert abs(noise.mean()) < 4 / 32 and abs(noise.std() - 1) < 4 / 45
    want = sampled(TEACHER, 8, made["ids"], noise)
    np.testing.assert_allclose(made["states"][:, -1], want, rtol=1e-4, atol=1e-5)


def test_from_data_the_first_state_is_the_noised_latent_at_the_start_of_its_window():
    """Seen through an autoencoder without spread, so that the noise is what is left."""

    def thinned(params, x, method):
        mean = x[:, ::2, ::2, :1].repeat(4, -1)
        return mean, 0 * mean

    sharp = TOYS._replace(vae=TOYS.vae._replace(apply=thinned))
    batch = tiny.rows(256)
    recipe = RECIPE._replace(start="data", steps=1)
    made = jax.device_get(quick_jit(partial(pairs.cross_windows, recipe=recipe, flow=TEACHER, networks=sharp))(FROZEN, batch))
    assert made["states"].shape == (256, 2, *tiny.LATENT)
    x0 = TOYS.scaling * (np.asarray(batch["image"])[:, ::2, ::2, :1] / 127.5 - 1.0)
    t_s = grid_time(1000 - 250 * made["first"])
    levels = quick_jit(lambda t: (TOYS.schedule.alpha(t), TOYS.schedule.sigma(t)))(t_s)
    a, s = (np.asarray(level).reshape(-1, 1, 1, 1) for level in levels)
    noise = (made["states"][:, 0] - a * x0) / s
    for k in range(4):
        here = noise[made["first"] == k]
        assert len(here) > 40 and abs(here.mean()) < 0.08 and abs(here.std() - 1) < 0.06
        assert abs(np.mean(here * x0.repeat(4, -1)[made["first"] == k])) < 0.03


def test_from_data_the_second_state_is_the_teachers_at_the_end_of_its_window():
    made = make(start="data")
    assert len(set(made["first"])) > 1
    context = spoken(made["ids"])
    step = make_step(
        TEACHER, TOYS.schedule, lambda z, t: make_predict(TOYS.denoiser, TOYS.schedule, FROZEN.teacher)(z, t, context)
    )
    begin = 1000 - 250 * made["first"]
    nodes = np.stack([begin - cut for cut in (0, 125, 250)]) / 1000
    states = crossed(step, made["states"][:, 0], nodes)
    np.testing.assert_allclose(made["states"][:, 1], states[-1], rtol=1e-4, atol=1e-5)


def test_encode_scales_the_latents_and_draws_them_from_the_posterior():
    images = jnp.full((400, 8, 8, 3), 100, jnp.uint8)
    encode = quick_jit(lambda vae, images, key: pairs.encode(TOYS, vae, images, jax.random.split(key, 400)))
    latents = np.asarray(encode(FROZEN.vae, images, jax.random.key(0)))
    mean, std = TOYS.vae.apply(FROZEN.vae, jnp.full((1, 8, 8, 3), 100 / 127.5 - 1), method="encode")
    assert np.abs(latents.mean(0) / TOYS.scaling - mean[0]).max() < 5 * float(std.max()) / 20
    np.testing.assert_allclose(latents.std(0) / TOYS.scaling, std[0], rtol=0.25)


def test_latents_and_texts_may_come_with_the_batch():
    """Rows with the posterior and the states, as a cache has them, give the pairs of images and prompts."""
    rows = tiny.rows(16)
    mean, std = quick_jit(partial(pairs.posterior, TOYS))(FROZEN.vae, rows["image"])
    kept = {"index": rows["index"], "ids": rows["ids"], "mean": mean, "std": std, "text": spoken(rows["ids"]).states}
    options = {"start": "data", "dropout": 0.5, "guidance": 2.0}
    wanted, found = make(batch=rows, **options), make(batch=kept, frozen=FROZEN._replace(vae={}), **options)
    assert wanted.keys() == set(pairs.RECORD)
    for name in pairs.RECORD:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6)
    dropped = (found["ids"] == np.asarray(FROZEN.empty)).all(axis=1)
    assert 2 < dropped.sum() < 14
    given = np.where(dropped[:, None, None], spoken(FROZEN.empty[None]).states, kept["text"])
    np.testing.assert_array_equal(found["text"], given)  # for who trains on these pairs at once
    other = make(batch=kept | {"text": kept["text"] + 1}, frozen=FROZEN._replace(vae={}), **options)
    changed = np.abs(other["states"][:, 1] - found["states"][:, 1]).max(axis=(1, 2, 3)) > 1e-4
    np.testing.assert_array_equal(changed, ~dropped)


def test_dropout_gives_teacher_and_student_the_same_empty_prompt():
    batch = tiny.rows(16)
    dropped = make(batch=batch, dropout=0.5)
    empty = (dropped["ids"] == np.asarray(FROZEN.empty)).all(axis=1)
    kept = (dropped["ids"] == np.asarray(batch["ids"])).all(axis=1)
    assert 2 < empty.sum() < 14 and (empty ^ kept).all()
    again = make(batch={**batch, "ids": jnp.asarray(dropped["ids"])})
    np.testing.assert_allclose(again["states"], dropped["states"], rtol=1e-5, atol=1e-5)
    assert np.abs(make(batch=batch)["states"] - dropped["states"])[empty].max() > 1e-2


@pytest.mark.parametrize("dropout, who", [(0.0, "nobody"), (1.0, "all")])
def test_dropout_at_its_ends(dropout, who):
    ids = make(16, dropout=dropout)["ids"]
    want = tiny.rows(16)["ids"] if who == "nobody" else np.broadcast_to(FROZEN.empty, ids.shape)
    np.testing.assert_array_equal(ids, want)


def test_guidance_changes_the_pairs_by_its_formula_and_one_does_not():
    plain, same, strong = (make(guidance=scale)["states"] for scale in (1.0, 1, 3.0))
    np.testing.assert_array_equal(plain, same)
    assert np.abs(plain - strong).max() > 1e-2
    ids = tiny.rows(16)["ids"]
    predict = make_predict(TOYS.denoiser, TOYS.schedule, FROZEN.teacher)
    empty = jnp.broadcast_to(FROZEN.empty, ids.shape)
    guided = lambda z, t: predict(z, t, spoken(empty)) + 3.0 * (predict(z, t, spoken(ids)) - predict(z, t, spoken(empty)))
    states = crossed(make_step(TEACHER, TOYS.schedule, guided), strong[:, 0], windows.sampling_nodes(8, 4))
    np.testing.assert_allclose(strong[:, -1], states[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction, path", [("velocity", "linear"), ("ddim_eps", "linear"), ("ddim_eps", "first_order")])
def test_a_student_of_twice_the_windows_makes_pairs_by_its_own_sampler(prediction, path):
    student = Parameterization(prediction, 8, path)
    made = make(flow=student, steps=4)
    want = sampled(student, 16, made["ids"], made["states"][:, 0])
    np.testing.assert_allclose(made["states"][:, -1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_a_teacher_of_any_prediction_type_gives_the_same_pairs(kind):
    """The same noise prediction, spoken in another prediction type."""

    def speak(params, z, timestep, context, *added):
        return convert("epsilon", kind, TOYS.schedule, z, tiny.toy_unet(params, z, timestep, context), (timestep + 1) / 1000)

    networks = TOYS._replace(denoiser=TOYS.denoiser._replace(apply=speak))
    jitted = quick_jit(partial(pairs.cross_windows, recipe=RECIPE, flow=Parameterization(kind), networks=networks))
    np.testing.assert_allclose(jitted(FROZEN, tiny.rows(16))["states"], make()["states"], rtol=1e-3, atol=1e-3)


def test_the_teacher_can_compute_in_bfloat16():
    exact, coarse = make()["states"], make(dtype="bfloat16")["states"]
    assert coarse.dtype == np.float32
    assert 1e-4 < np.abs(exact - coarse).max() < 0.3
    np.testing.assert_array_equal(exact[:, 0], coarse[:, 0])


@pytest.mark.parametrize(
    "changes, flow, words",
    [
        ({"windows": 3}, TEACHER, "must divide 1000"),
        ({"steps": 0}, TEACHER, "--config.pairs.steps"),
        ({"steps": 251}, TEACHER, "1 to 250"),
        ({"start": "middle"}, TEACHER, "--config.pairs.start='middle' must be one of noise, data"),
        ({"solver": "magic"}, TEACHER, "--config.pairs.solver='magic' must be one of ddim"),
        ({}, Parameterization("velocity", 10), "a stage of 4 windows cannot learn from 10"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused(changes, flow, words):
    with pytest.raises(ValueError, match=words) as caught:
        pairs.check_pair_steps(RECIPE._replace(**changes), flow)
    assert "\n" not in str(caught.value) and "--config" in str(caught.value)


def test_recipes_that_can_be_carried_out_pass():
    pairs.check_pair_steps(RECIPE, TEACHER)
    pairs.check_pair_steps(RECIPE, Parameterization("velocity", 8))
