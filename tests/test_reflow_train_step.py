"""The update: the same however a batch is cut up or spread over devices, compiled once, and equal to stored numbers."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from tiny import quick_jit

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import make_unet
from proreflow_jax.pretrained import write_pipeline
from proreflow_jax.reflow import pairs
from proreflow_jax.reflow.loss import LossRecipe, draw_examples, reflow_loss
from proreflow_jax.reflow.train_step import averaged, init_state, make_optimizer, state_shardings, train_step
from proreflow_jax.runtime import mesh, stacks

TOYS = tiny.toy_networks()
FROZEN = tiny.toy_frozen(TOYS)
STUDENT, TEACHER = Parameterization("ddim_eps", 4), Parameterization("epsilon")
RECIPE = pairs.PairRecipe(4, "noise", 1, "ddim", 1.0, 0.1, tiny.LATENT, "float32")
LOSS = LossRecipe("velocity", 1.0, "fixed", 0.0, 0.25, 0, "float32")
OPTIMIZER = dict(
    learning_rate=1e-2, schedule="constant", warmup_steps=0, steps=10, beta1=0.9, beta2=0.99, epsilon=1e-3,
    weight_decay=0.01, decay_rules=((".*", True),), clip_norm=1.0,
)  # fmt: skip
ADAM = make_optimizer(OPTIMIZER)
GENTLE = make_optimizer(OPTIMIZER | {"learning_rate": 1e-3})
KEY = jax.random.key(7)
GOLDEN = {"losses": [10.390501, 11.048759, 9.118498], "weights": 32.499902}  # of `real_model` on one device


def step_of(networks, online=True, accumulation=1, unroll=False, adam=ADAM):
    examples = partial(draw_examples, flow=STUDENT, networks=networks, loss=LOSS)
    made = partial(pairs.cross_windows, recipe=RECIPE, flow=TEACHER, networks=networks)
    return partial(
        train_step,
        draw=(lambda frozen, batch, key: examples(frozen, made(frozen, batch), key)) if online else examples,
        loss=partial(reflow_loss, flow=STUDENT, networks=networks, loss=LOSS),
        optimizer=adam,
        ema_decay=0.9,
        accumulation=accumulation,
        unroll=unroll,
    )


@cache
def jitted(**options):
    return quick_jit(step_of(TOYS, **options))


def trained(step, count=1, average=True):
    state, numbers = init_state(FROZEN.teacher, ADAM, average), []
    for i in range(count):
        state, metrics = step(state, FROZEN, tiny.rows(16, 16 * i), KEY)
        numbers.append(jax.device_get(metrics))
    return jax.device_get(state), numbers


def same(ours, theirs, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


@pytest.mark.parametrize("parts, unroll", [(2, False), (4, False), (4, True)])
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts, unroll):
    whole, cut = trained(jitted()), trained(jitted(accumulation=parts, unroll=unroll))
    same(whole[0], cut[0])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(whole[1][0][name], cut[1][0][name], rtol=1e-5)
    ratio = lambda numbers: numbers["window"]["loss"] / np.maximum(numbers["window"]["count"], 1e-9)
    np.testing.assert_allclose(ratio(whole[1][0]), ratio(cut[1][0]), rtol=1e-4)


def test_stored_and_online_pairs_mean_the_same():
    made = quick_jit(partial(pairs.cross_windows, recipe=RECIPE, flow=TEACHER, networks=TOYS))
    stored = lambda state, frozen, batch, key: jitted(online=False)(state, frozen, made(frozen, batch), key)
    ours, theirs = trained(stored, 2), trained(jitted(), 2)
    same(ours, theirs)


def test_the_average_follows_the_weights_or_is_not_there():
    with_average, _ = trained(jitted(), 3)
    without, _ = trained(jitted(), 3, average=False)
    same(with_average.params, without.params, 1e-6)
    assert without.ema == {}
    want = {name: np.asarray(value) for name, value in FROZEN.teacher.items()}
    state = init_state(FROZEN.teacher, ADAM, True)
    for i in range(3):
        state, _ = jitted()(state, FROZEN, tiny.rows(16, 16 * i), KEY)
        decay = min(0.9, (1 + i) / (10 + i))
        want = {name: decay * want[name] + (1 - decay) * np.asarray(state.params[name]) for name in want}
    same(jax.device_get(state.ema), want)
    assert averaged(state) is state.ema
    assert averaged(state._replace(ema={})) is state.params


def test_numbers_are_finite_and_the_loss_falls_on_one_batch():
    state, losses = init_state(FROZEN.teacher, ADAM, False), []
    for _ in range(30):
        state, numbers = jitted()(state._replace(step=jnp.zeros((), jnp.int32)), FROZEN, tiny.rows(16), KEY)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(numbers)))
        losses.append(float(numbers["loss"]))
    assert set(numbers) == {"loss", "grad_norm", "window"}
    assert losses[-1] < 0.8 * losses[0]


def test_every_step_has_its_own_randomness_and_the_same_step_the_same():
    draw = lambda frozen, batch, key: {"x": jax.random.normal(key, (2, 1))}
    loss = lambda params, drawn: (jnp.sum(params["w"] * drawn["x"]), {"x": drawn["x"][0, 0]})
    step = quick_jit(partial(train_step, draw=draw, loss=loss, optimizer=ADAM, ema_decay=0.0, accumulation=1, unroll=True))
    first = init_state({"w": jnp.ones(1)}, ADAM, False)
    once, numbers = step(first, None, {}, KEY)
    _, later = step(once, None, {}, KEY)
    _, again = step(first, None, {}, KEY)
    assert int(once.step) == 1
    assert numbers["x"] == again["x"] != later["x"]


def test_gradients_summed_in_the_order_of_the_devices_are_the_same_gradients():
    machine = mesh.make_mesh(4, devices=jax.devices()[:4])
    rows, whole = mesh.batch_sharding(machine), mesh.replicated(machine)
    step = partial(step_of(TOYS, accumulation=2, unroll=True), in_order=machine)
    step = quick_jit(step, in_shardings=(whole, whole, rows, whole), out_shardings=whole)
    step = step.lower(init_state(FROZEN.teacher, ADAM, True), FROZEN, tiny.rows(16), KEY).compile()
    text = step.as_text()
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert "all-to-all" in text and all("/gather" in line for line in sums)  # picks of rows: one addend is not zero
    (found, numbers), (wanted, expected) = trained(step, 2), trained(jitted(), 2)
    same(found, wanted)
    for ours, theirs in zip(numbers, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        ratio = lambda n: n["window"]["loss"] / np.maximum(n["window"]["count"], 1e-9)
        np.testing.assert_allclose(ratio(ours), ratio(theirs), rtol=1e-4)


def test_a_state_in_stacks_goes_the_same_way():
    weights = {name: jnp.arange(3.0) + i for i, name in enumerate("abc")} | {"d": jnp.ones(2)}
    table = stacks.stack_table(weights, {"a": 0, "b": 1, "c": 0, "d": 0})
    draw = lambda frozen, batch, key: {"x": jax.random.normal(key, (4, 3))}
    loss = lambda p, drawn: (jnp.mean((drawn["x"] @ (p["a"] * p["b"] - p["c"]) + p["d"].sum()) ** 2), {})
    step = partial(train_step, draw=draw, loss=loss, optimizer=ADAM, ema_decay=0.5, accumulation=1, unroll=True)
    apart, together = quick_jit(step), quick_jit(partial(step, tables=(table,)))
    start, losses = init_state(weights, ADAM, True), []
    state, held = start, stacks.stack(start, table)
    for _ in range(3):
        state, numbers = apart(state, None, {}, KEY)
        held, alike = together(held, None, {}, KEY)
        losses.append((numbers["loss"], alike["loss"]))
    assert set(held.params) == {"a", "b", "d"} and held.params["a"].shape == (2, 3)
    same(stacks.unstack(held, table), state)
    same(*zip(*losses, strict=True))


def on_mesh(networks, frozen, shape, student=None, adam=ADAM, jit=quick_jit):
    """Losses of a few steps with the state and batch spread over a (data, fsdp) mesh; and how often it was compiled."""
    machine = mesh.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    init = partial(init_state, optimizer=adam, average=True)
    places = state_shardings(machine, [(".*", mesh.FSDP)], jax.eval_shape(init, frozen.teacher))
    student = frozen.teacher if student is None else student
    copied = {name: jnp.copy(value) for name, value in student.items()}  # the step gives its state away
    state = jax.tree.map(jax.device_put, init(copied), places)
    rows, everywhere = mesh.batch_sharding(machine), mesh.replicated(machine)
    frozen = jax.device_put(frozen, everywhere)
    shardings = {"in_shardings": (places, None, rows, None), "out_shardings": (places, None)}
    step = jit(step_of(networks, unroll=True, adam=adam), **shardings, donate_argnums=0)
    losses = []
    for i in range(3):
        state, numbers = step(state, frozen, mesh.put_batch(machine, jax.device_get(tiny.rows(16, 16 * i)), 16), KEY)
        losses.append(float(numbers["loss"]))
    split = {name for name, value in state.params.items() if not value.sharding.is_fully_replicated}
    return losses, step._cache_size(), split, jax.device_get(state)


@pytest.fixture(scope="module")
def alone():
    return on_mesh(TOYS, FROZEN, (1, 1))


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (8, 1), (2, 4)])
def test_any_mesh_gives_the_same_losses_and_weights_and_compiles_once(alone, shape):
    losses, compiled, split, state = on_mesh(TOYS, FROZEN, shape)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    same(state.params, alone[3].params)
    assert compiled == alone[1] == 1
    assert bool(split) == (shape[1] > 1)


def test_moments_and_average_lie_as_their_parameter_and_counters_everywhere():
    machine = mesh.make_mesh(2, 4)
    shapes = jax.eval_shape(lambda p: init_state(p, ADAM, True), FROZEN.teacher)
    places = state_shardings(machine, [("bias", PartitionSpec()), (".*", mesh.FSDP)], shapes)
    kernel = PartitionSpec(None, "fsdp")
    found = {jax.tree_util.keystr(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(places)}
    kernels = [spec for name, spec in found.items() if "conv_in.weight" in name]
    assert kernels == [kernel] * 4  # the parameter, its average, both moments
    others = [spec for name, spec in found.items() if ".weight" not in name]
    assert len(others) >= 6 and all(spec == PartitionSpec() for spec in others)


def real_model():
    """(networks, frozen arrays, student): a real UNet of one level, random weights; the rest are toys."""
    blocks = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    networks = TOYS._replace(denoiser=make_unet(write_pipeline.unet_config(tiny.UNET | blocks, tiny.TEXT, tiny.LATENT)))
    teacher, student = (jax.tree.map(jnp.asarray, tiny.random_params(networks.denoiser.shapes, seed)) for seed in (0, 1))
    return networks, FROZEN._replace(teacher=teacher), student


@pytest.mark.slow
def test_golden_step_of_a_real_unet_on_a_mesh():
    """The stored numbers are of one device; here the state lies over two."""
    networks, frozen, student = real_model()
    losses, compiled, split, state = on_mesh(networks, frozen, (1, 2), student, GENTLE)
    size = float(np.sqrt(sum(np.sum(value.astype(np.float64) ** 2) for value in state.params.values())))
    found = {"losses": losses, "weights": size}
    message = (
        f"a train step gives other numbers than it did: {found}. If you meant to change the network, the draws, the loss or "
        "the optimiser, say so in the commit and put these numbers into GOLDEN; otherwise something broke."
    )
    assert compiled == 1 and len(split) > 20
    np.testing.assert_allclose(losses, GOLDEN["losses"], rtol=3e-5, err_msg=message)
    np.testing.assert_allclose(size, GOLDEN["weights"], rtol=1e-5, err_msg=message)
