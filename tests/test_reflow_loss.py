"""The loss of the paper: where times fall, what the target is, that a perfect student has none, that gradients stay home."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_jit

from proreflow_jax.flow import losses, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.loss import SPACES, LossRecipe, check_loss, draw_examples, draw_times, reflow_loss

TOYS = tiny.toy_networks()
FROZEN = tiny.toy_frozen(TOYS)
LOSS = LossRecipe("velocity", 1.0, "fixed", 0.0, 0.25, 0, "float32")
STUDENTS = [("velocity", "linear"), ("ddim_eps", "linear"), ("diff_eps", "linear"), ("ddim_eps", "first_order")]
STUDENTS += [("ddim_v", "linear"), ("ddim_v", "first_order")]
KEY = jax.random.key(3)
COUNT = 200_000  # times that are drawn, everywhere as many: arrays of one shape are compiled for once


def records(b, m, n):
    """Pair records with random states; those of m < n windows start somewhere."""
    rng = np.random.default_rng(0)
    states, first = rng.standard_normal((b, m + 1, *tiny.LATENT)), rng.integers(0, n - m + 1, b)
    return {"states": jnp.asarray(states, jnp.float32), "first": jnp.asarray(first, jnp.int32), "ids": tiny.rows(b)["ids"]}


@cache
def drawer(flow, loss, x64):
    return quick_jit(partial(draw_examples, flow=flow, networks=TOYS, loss=loss))


def drawn(flow, rows=None, loss=LOSS, key=KEY):
    """Examples of 32 records of whole trajectories, or of `rows`."""
    rows = records(32, flow.windows, flow.windows) if rows is None else rows
    return drawer(flow, loss, jax.config.jax_enable_x64)(FROZEN, rows, key)


@cache
def valuer(flow, loss, apply, x64):
    networks = TOYS._replace(denoiser=TOYS.denoiser._replace(apply=apply))
    return quick_jit(partial(reflow_loss, flow=flow, networks=networks, loss=loss))


def evaluated(params, x, flow, loss=LOSS, apply=tiny.toy_unet):
    return jax.device_get(valuer(flow, loss, apply, jax.config.jax_enable_x64)(params, x))


def says(params, z, t, *told):
    """A UNet that gives what it is told, whatever it is asked."""
    return params["out"]


@cache
def perfect(flow):
    """Examples in float64, to be called under x64, and the output that a perfect student gives."""
    assert jax.config.jax_enable_x64
    x = jax.tree.map(lambda v: v.astype(float) if v.dtype == jnp.float32 else v, drawn(flow))
    return x, {"out": quick_jit(partial(flow.from_velocity, TOYS.schedule))(x["z"], x["v"], x["window"])}


@pytest.mark.parametrize("n", [1, 8, 250])
def test_times_lie_in_their_window_start_included_end_excluded(n):
    k = jnp.arange(COUNT) % n
    w = draw_times(KEY, k, n, 0.1)
    np.testing.assert_array_equal(w.k, k)
    t, t_s, t_e = (np.round(1000 * np.asarray(x, np.float64), 3) for x in (w.t, w.t_s, w.t_e))
    np.testing.assert_array_equal(t_s, 1000 - 1000 // n * np.asarray(k))
    np.testing.assert_array_equal(t_e, t_s - 1000 // n)
    assert (t <= t_s).all() and (t > t_e).all()
    np.testing.assert_array_equal(t, np.round(t))


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_window_starts_come_with_their_probability(p):
    width, count = 125, COUNT
    w = draw_times(KEY, jnp.zeros(count, jnp.int32), 8, p)
    want = p + (1 - p) / width
    assert abs(float((w.t == w.t_s).mean()) - want) <= 4 * np.sqrt(want * (1 - want) / count)


def test_times_are_uniform_where_the_start_has_no_extra_weight():
    width, count = 125, COUNT
    w = draw_times(KEY, jnp.full(count, 5), 8, 0.0)
    seen = np.bincount(np.round(1000 * np.asarray(w.t_s - w.t)).astype(int), minlength=width)
    assert len(seen) == width
    chi_square = ((seen - count / width) ** 2 / (count / width)).sum()
    assert 124 - 4 * np.sqrt(248) < chi_square < 124 + 4 * np.sqrt(248)  # 124 degrees of freedom, four deviations


@pytest.mark.parametrize(("n", "steps"), [(2, 4), (4, 10), (8, 12), (8, 15), (4, 999), (8, 4), (1, 8)])
def test_the_times_that_come_more_often_are_those_of_a_sampler(n, steps):
    """Exactly the nodes of a sampler of so many steps, each as often as the others of its window; of no sampler the starts."""
    count = COUNT
    k = np.arange(count) % n
    t = np.round(1000 * np.asarray(draw_times(KEY, jnp.asarray(k), n, 1.0, steps).t, np.float64)).astype(int)
    stops = np.round(1000 * windows.sampling_nodes(max(steps, n), n)[:-1]).astype(int)
    for window in range(n):
        start = 1000 - 1000 // n * window
        inside = stops[(stops <= start) & (stops > start - 1000 // n)]
        times, often = np.unique(t[k == window], return_counts=True)
        assert set(times) == set(inside)
        mean = count / n / len(inside)
        assert np.abs(often - mean).max() < 5 * np.sqrt(mean)


@pytest.mark.parametrize("scale", [0.1, 7.0])
@pytest.mark.parametrize("space", SPACES)
def test_an_automatic_alpha_knows_no_scale(scale, space):
    flow, loss = Parameterization("velocity", 4), LOSS._replace(space=space, balance="auto", alpha=0.7)
    x = drawn(flow)
    bare = evaluated({"out": x["z"]}, x, flow, loss, says)[0]
    grown = evaluated({"out": scale * x["z"]}, x | {"v": scale * x["v"]}, flow, loss, says)[0]
    np.testing.assert_allclose(grown, scale**2 * bare, rtol=1e-5)


def test_an_automatic_alpha_of_one_counts_direction_twice():
    flow = Parameterization("velocity", 4)
    x = drawn(flow)
    turned = {"out": x["v"][:, ::-1]}  # as long as the target, so all of the error is direction
    once, twice = (evaluated(turned, x, flow, LOSS._replace(balance="auto", alpha=a), says)[0] for a in (0.0, 1.0))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)


def test_huber_bends_the_squared_error_only():
    flow = Parameterization("velocity", 4)
    x = drawn(flow)
    values = {d: evaluated({"out": x["z"]}, x, flow, LOSS._replace(huber=d), says)[0] for d in (0.0, 0.1, 1e3)}
    np.testing.assert_allclose(values[1e3], values[0.0], rtol=1e-3)
    bend = lambda z, v: losses.pseudo_huber(losses.squared_error(z, v), 0.1) + 1 - losses.cosine(z, v)
    np.testing.assert_allclose(values[0.1], np.mean(quick_jit(bend)(x["z"], x["v"])), rtol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (4, 4), (1, 1), (1, 2)])
def test_the_program_of_all_stages_draws_and_judges_as_that_of_one(m, n):
    """Of 8 windows at most: states are filled up, the windows are an argument."""
    own, loss = Parameterization("ddim_eps", n), LOSS._replace(window_start_prob=0.5, start_steps=12)
    rows, frozen = records(32, m, n), FROZEN._replace(windows=jnp.int32(n))
    filled = jnp.pad(rows["states"], ((0, 0), (0, 8 - m), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
    x, wide = drawn(own, rows, loss), own._replace(windows=8)
    y = drawer(wide, loss, jax.config.jax_enable_x64)(frozen, rows if m < n else rows | {"states": filled}, KEY)
    np.testing.assert_array_equal(x["window"].k, y["window"].k)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), x, y)
    (one, mine), (other, theirs) = (evaluated(FROZEN.teacher, x, flow, loss) for flow in (own, wide))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for name, sums in mine["window"].items():
        np.testing.assert_allclose(theirs["window"][name], np.pad(sums, (0, 8 - n)), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("m", [8, 1, 3])
def test_an_example_is_one_window_of_its_record_and_lies_on_its_chord(m):
    flow, b = Parameterization("velocity", 8), 128
    rows = records(b, m, 8)
    x = jax.device_get(drawn(flow, rows))
    w, first = x["window"], np.asarray(rows["first"])
    j = w.k - first
    assert (j >= 0).all() and (j < m).all() and len(set(j)) == m
    assert m == 8 or len(set(first)) > 1
    z_s, z_e = (np.asarray(rows["states"])[np.arange(b), i] for i in (j, j + 1))
    np.testing.assert_allclose(w.t_s, 1 - w.k / 8, atol=1e-7)
    np.testing.assert_allclose(w.t_e, 1 - (w.k + 1) / 8, atol=1e-7)
    np.testing.assert_allclose(x["v"], (z_e - z_s) * -8, rtol=1e-4, atol=1e-5)
    share = ((w.t_s - w.t) * 8).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(x["z"], z_s + share * (z_e - z_s), rtol=1e-4, atol=1e-5)


def test_windows_are_picked_evenly_and_context_is_the_prompts():
    flow, b = Parameterization("velocity", 4), 4000
    x = drawn(flow, records(b, 4, 4) | {"ids": jnp.broadcast_to(jnp.arange(8), (b, 8))})
    assert np.abs(np.bincount(x["window"].k) - 1000).max() < 4 * np.sqrt(1000 * 0.75)
    np.testing.assert_array_equal(x["context"].states[5], FROZEN.text["text_encoder"]["table.weight"][:8])


def test_states_may_be_stored_in_half_precision():
    flow = Parameterization("ddim_eps", 8)
    rows = records(32, 8, 8)
    half = rows | {"states": rows["states"].astype(jnp.bfloat16)}
    x = drawn(flow, half)
    assert x["z"].dtype == x["v"].dtype == jnp.float32
    same = drawn(flow, rows | {"states": half["states"].astype(jnp.float32)})
    np.testing.assert_array_equal(x["v"], same["v"])


@pytest.mark.parametrize("prediction, path", STUDENTS)
@pytest.mark.parametrize("space", SPACES)
def test_a_perfect_student_has_no_loss(prediction, path, space):
    """In float64, with the network itself an arithmetic fact."""
    flow, loss = Parameterization(prediction, 4, path), LOSS._replace(space=space)
    with jax.enable_x64(True):
        x, right = perfect(flow)
        value, metrics = evaluated(right, x, flow, loss, says)
        off, _ = evaluated({"out": 1.01 * right["out"]}, x, flow, loss, says)
    assert abs(float(value)) < 1e-10 < 1e-6 < float(off)
    assert np.abs(metrics["window"]["relative_error"]).max() < 1e-10
    np.testing.assert_allclose(metrics["window"]["cosine"], metrics["window"]["count"], rtol=1e-10)


@pytest.mark.parametrize("prediction, path", STUDENTS)
def test_a_student_with_the_targets_output_lands_on_the_clean_end(prediction, path):
    """Crossing the rest of the window from z_t with the perfect output ends at the pair's second state."""
    flow = Parameterization(prediction, 4, path)
    with jax.enable_x64(True):
        x, right = perfect(flow)
        move = quick_jit(partial(flow.advance, TOYS.schedule))
        end = np.asarray(move(x["z"], right["out"], x["window"], x["window"].t_e))
        k = np.asarray(x["window"].k)
    np.testing.assert_allclose(end, np.asarray(records(32, 4, 4)["states"])[np.arange(32), k + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_the_sums_of_the_windows_add_up_to_the_mean(space):
    flow, loss = Parameterization("ddim_eps", 8), LOSS._replace(space=space)
    value, metrics = evaluated(FROZEN.teacher, drawn(flow), flow, loss)
    sums = metrics["window"]
    assert all(values.shape == (8,) for values in sums.values()) and sums["count"].sum() == 32
    np.testing.assert_allclose(sums["loss"].sum() / 32, value, rtol=1e-5)


def test_a_window_holds_the_sums_of_its_own_examples():
    flow = Parameterization("velocity", 8)
    x = drawn(flow)
    _, metrics = evaluated(FROZEN.teacher, x, flow)

    @quick_jit
    def by_hand(x):
        out = tiny.toy_unet(FROZEN.teacher, x["z"], 1000 * x["window"].t - 1, x["context"].states)
        cosine = losses.cosine(out, x["v"])
        return {"cosine": cosine, "loss": losses.squared_error(out, x["v"]) + 1 - cosine}

    k = np.asarray(x["window"].k)
    for name, rows in by_hand(x).items():
        want = [np.asarray(rows)[k == i].sum() for i in range(8)]
        np.testing.assert_allclose(metrics["window"][name], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(metrics["window"]["count"], np.bincount(k, minlength=8))


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_the_direction_term_is_free_of_scale(scale):
    flow = Parameterization("velocity", 4)
    x = drawn(flow)
    square, both = LOSS._replace(alpha=0.0), LOSS._replace(alpha=5.0)
    term = lambda out: evaluated({"out": out}, x, flow, both, says)[0] - evaluated({"out": out}, x, flow, square, says)[0]
    size = float(jnp.mean(x["v"] ** 2)) * max(1.0, scale) ** 2
    assert abs(term(scale * x["v"])) < 1e-6 * size
    assert abs(term(-scale * x["v"]) - 10.0) < 1e-6 * size


def test_velocity_and_output_space_agree_where_the_network_gives_velocities():
    flow = Parameterization("velocity", 4)
    values = [float(evaluated(FROZEN.teacher, drawn(flow), flow, LOSS._replace(space=space))[0]) for space in SPACES]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


def test_the_network_computes_in_the_asked_dtype_and_the_loss_in_float32():
    flow, seen = Parameterization("ddim_eps", 4), []

    def watched(params, z, timestep, context, *added):
        seen.append((params["conv_in.weight"].dtype, z.dtype, timestep.dtype, context.dtype))
        return tiny.toy_unet(params, z, timestep, context)

    networks, loss = TOYS._replace(denoiser=TOYS.denoiser._replace(apply=watched)), LOSS._replace(dtype="bfloat16")
    mean = lambda params, x: reflow_loss(params, x, flow=flow, networks=networks, loss=loss)[0]
    value, gradient = jax.eval_shape(jax.value_and_grad(mean), FROZEN.teacher, drawn(flow))
    assert seen == [(jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16)]
    assert value.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in gradient.values())


@pytest.mark.parametrize("start", pairs.STARTS)
def test_no_gradient_reaches_teacher_text_encoder_or_autoencoder(start):
    recipe = pairs.PairRecipe(4, start, 2, "ddim", 2.0, 0.1, tiny.LATENT, "float32")
    flow, rows = Parameterization("ddim_eps", 4), tiny.rows(4)

    def value(student, arrays):
        frozen = FROZEN._replace(**arrays)
        made = pairs.cross_windows(frozen, rows, recipe=recipe, flow=Parameterization("epsilon"), networks=TOYS)
        x = draw_examples(frozen, made, KEY, flow=flow, networks=TOYS, loss=LOSS)
        return reflow_loss(student, x, flow=flow, networks=TOYS, loss=LOSS)[0]

    arrays = {name: getattr(FROZEN, name) for name in ("teacher", "text", "vae")}
    ours, theirs = quick_jit(jax.grad(value, argnums=(0, 1)))(FROZEN.teacher, arrays)
    assert all(np.abs(g).max() > 0 for g in ours.values())
    assert all(not np.any(g) for g in jax.tree.leaves(theirs))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"space": "image"}, "--config.loss.space='image' must be one of velocity, output"),
        ({"window_start_prob": 1.5}, "--config.loss.window_start_prob=1.5 must be in"),
        ({"window_start_prob": float("nan")}, "--config.loss.window_start_prob=nan must be in"),
        ({"alpha": -1.0}, "--config.loss.alpha=-1.0 must not be negative"),
        ({"balance": "running"}, "--config.loss.balance='running' must be one of fixed, auto"),
        ({"huber": -0.1}, "--config.loss.huber=-0.1 must not be negative"),
        ({"start_steps": 2000}, "--config.loss.start_steps=2000 must be in"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check_loss(LOSS._replace(**changes))
    check_loss(LOSS)


def test_one_draw_serves_every_example_with_its_own_time_and_window():
    flow, loss = Parameterization("velocity", 8), LOSS._replace(window_start_prob=0.0)
    x, again, other = (jax.device_get(drawn(flow, loss=loss, key=key)) for key in (KEY, KEY, jax.random.key(4)))
    assert len(set(x["window"].t)) > 25
    np.testing.assert_array_equal(again["z"], x["z"])
    assert (other["window"].k != x["window"].k).any() and (other["window"].t != x["window"].t).any()
