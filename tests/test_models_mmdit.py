"""The MMDiT equals diffusers' SD3Transformer2DModel, block and whole, forward and gradient; all ways to compute it agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from tiny import random_params
from tiny_sd3 import MEMBERS, POOLED, STATES, TRANSFORMER
from torch_reference import draw, error, quick_jit, randomise, same, tensors, to_jax, twin

from proreflow_jax.models import layers, mmdit, network
from proreflow_jax.models.layers import POLICIES, Compute, rerun
from proreflow_jax.pretrained import weights
from proreflow_jax.runtime.mesh import batch_sharding, fsdp_spec, make_mesh, shardings

SIZE = (6, 10)  # of latents: 3 x 5 patches of a table of 5 x 5, so one crop is odd and one is whole
A = mmdit.architecture(TRANSFORMER)


def make(member: str, **changed: Any) -> tuple[Any, network.Network, dict[str, jax.Array]]:
    """(torch's network, ours, our parameters) with the same random weights."""
    module = randomise(SD3Transformer2DModel(**(TRANSFORMER | MEMBERS[member] | changed)))
    ours = network.make_denoiser(dict(module.config) | {"_class_name": "SD3Transformer2DModel"})
    params = weights.from_torch(tensors(module), ours.shapes, member)
    return module, ours, {name: jnp.asarray(value) for name, value in params.items()}


def inputs(size: tuple[int, int] = SIZE) -> list[torch.Tensor]:
    """Latents, timesteps (one of them fractional), text states, pooled states: torch's layout."""
    times = torch.tensor([1000.0, 249.5])
    return [draw(2, 16, *size), times, draw(2, 7, STATES, seed=2), draw(2, POOLED, seed=3)]


def reference(module: Any, x: torch.Tensor, times: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """diffusers' output."""
    return module(x, text, pooled, times, return_dict=False)[0]


@pytest.mark.parametrize(
    ("dual", "last", "normed"), [(False, False, False), (False, True, False), (True, False, True), (False, True, True)]
)
def test_joint_block(dual, last, normed):
    module = JointTransformerBlock(16, 2, 8, last, "rms_norm" if normed else None, dual)
    a = A._replace(normed=normed)
    ours = twin(module, lambda rngs: mmdit.JointBlock(a, dual, last, rngs))
    x, text, embedding = draw(2, 6, 16), draw(2, 5, 16, seed=2), draw(2, 16, seed=3)
    with torch.no_grad():
        words, image = module(x, text, embedding)
    found = ours((to_jax(x), to_jax(text)), to_jax(embedding))
    same(found[0], image)
    if not last:
        same(found[1], words)


@pytest.mark.parametrize(("side", "base", "width"), [(5, 2, 16), (24, 16, 64)])
def test_table_of_positions_is_diffusers_to_the_bit(side, base, width):
    expected = get_2d_sincos_pos_embed(width, side, base_size=base, output_type="pt").float()
    assert np.array_equal(mmdit.positions(side, base, width)[0], expected.numpy())


@pytest.mark.parametrize("member", MEMBERS)
def test_forward(member):
    module, ours, params = make(member)
    given = inputs()
    with torch.no_grad():
        expected = reference(module, *given)
    same(quick_jit(ours.apply)(params, *map(to_jax, given)), expected)


def test_gradients_by_every_parameter_and_by_the_input():
    """A dual block, a plain one, the last. The table of positions is a constant on both sides: its gradient is zero."""
    module, ours, params = make("3.5-medium", dual_attention_layers=[0])
    given = inputs((4, 2))
    given[0].requires_grad_(True)
    expected = reference(module, *given)
    r = draw(*expected.shape, seed=4)
    (expected * r).sum().backward()

    weighed = lambda params, x, *rest: (ours.apply(params, x, *rest) * to_jax(r)).sum()
    by_params, by_input = quick_jit(jax.grad(weighed, argnums=(0, 1)))(params, *map(to_jax, given))

    same(by_input, given[0].grad)
    assert ours.constants == {"pos_embed.pos_embed"} == by_params.keys() - dict(module.named_parameters()).keys()
    assert not by_params.pop("pos_embed.pos_embed").any()
    found = {name: torch.tensor(value) for name, value in weights.to_torch(by_params).items()}
    wanted = {name: value.grad for name, value in module.named_parameters()}
    assert found.keys() == wanted.keys()
    whole = torch.cat([value.flatten() for value in wanted.values()]).norm()
    near_zero = {name for name, value in wanted.items() if value.norm() < 1e-5 * whole}  # of keys' biases, of rows cut off
    far = {name: error(to_jax(found[name]), wanted[name]) for name in wanted.keys() - near_zero}
    assert np.max(list(far.values())) <= 5e-4, sorted(far.items(), key=lambda row: -row[1])[:3]
    every = lambda tree: torch.cat([tree[name].flatten() for name in wanted])
    same(to_jax(every(found)), every(wanted))


@pytest.mark.parametrize("member", MEMBERS)
def test_conversion_is_total_both_ways(member):
    module, ours, params = make(member)
    stored, back = tensors(module), weights.to_torch(params)
    assert back.keys() == stored.keys() == ours.shapes.keys()
    assert all(np.array_equal(back[name], stored[name]) for name in stored)


def test_init_holds_the_table_of_positions():
    module, ours, _ = make("3.5-medium")
    born = quick_jit(lambda key: ours.init(key)["pos_embed.pos_embed"])(jax.random.key(0))
    assert np.array_equal(born, tensors(module)["pos_embed.pos_embed"])


def in_bfloat16(ours: network.Network) -> Any:
    """The forward pass as the training step runs it: times stay float32, all else is bfloat16."""

    def apply(params: Any, x: Any, times: Any, *states: Any) -> Any:
        half = [value.astype(jnp.bfloat16) for value in (x, *states)]
        return ours.apply(network.cast(params, jnp.bfloat16), half[0], times, *half[1:])

    return apply


def test_bfloat16_is_near_float32_and_stays_bfloat16():
    module, ours, params = make("3.5-medium")
    given = inputs()
    with torch.no_grad():
        expected = reference(module, *given)
    same(quick_jit(in_bfloat16(ours))(params, *map(to_jax, given)), expected, 2e-2)
    jaxpr = jax.make_jaxpr(in_bfloat16(ours))(ours.shapes, *map(to_jax, given))
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    kinds = [{str(value.aval.dtype) for value in eqn.invars} for eqn in every_product(jaxpr.jaxpr)]
    assert len(kinds) > 30 and all(kind == {"bfloat16"} for kind in kinds)


def every_product(jaxpr: Any) -> list[Any]:
    """All products and convolutions of a program, those of inner ones too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(eqn)
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr"):
                found += every_product(value.jaxpr)
    return found


REFUSED = {
    "qk_norm": dict(qk_norm="layer_norm"),
    "rope_theta": dict(rope_theta=10000),
    "caption_projection_dim=8": dict(caption_projection_dim=8),
    "dual_attention_layers": dict(dual_attention_layers=[1, 2]),
    "pos_embed_max_size=None": dict(pos_embed_max_size=None),
    "pos_embed_max_size=1": dict(pos_embed_max_size=1),
    "multiple of 4": dict(num_attention_heads=1, attention_head_dim=6, caption_projection_dim=6),
}


@pytest.mark.parametrize("words", REFUSED)
def test_networks_of_another_kind_are_refused(words):
    with pytest.raises(ValueError, match=words) as caught:
        network.make_transformer(TRANSFORMER | REFUSED[words])
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_distilled_is_refused():
    with pytest.raises(ValueError, match="FluxTransformer2DModel is not distilled"):
        network.make_denoiser({"_class_name": "FluxTransformer2DModel"})


@pytest.mark.parametrize(("size", "words"), [((6, 5), "6 x 5 are not whole patches of 2"), ((4, 12), "2 x 6 patches are more")])
def test_latents_that_do_not_fit_are_refused(size, words):
    ours = network.make_transformer(TRANSFORMER)
    with pytest.raises(ValueError, match=words) as caught:
        jax.eval_shape(ours.apply, ours.shapes, *map(to_jax, inputs(size)))
    assert "--config.data.resolution" in str(caught.value) and "\n" not in str(caught.value)


def test_one_row_that_stands_for_many_equal_ones_is_all_of_them():
    """In the place of T5 stand 256 rows of zeros; one row that counts so often gives the same output."""
    module, ours, params = make("3.5-medium")
    short = network.make_transformer(dict(module.config), repeated=256)
    x, times, text, pooled = inputs((4, 4))
    rows = lambda count: torch.cat([text, torch.zeros(2, count, STATES)], dim=1)
    with torch.no_grad():
        expected = reference(module, x, times, rows(256), pooled)
    run = lambda net: quick_jit(net.apply)(params, *map(to_jax, (x, times, rows(1), pooled)))
    same(run(short), expected)
    assert error(run(ours), expected) > 1e-2  # without its number the row is only one


def block_loss(compute: Compute) -> Any:
    """(shapes, loss(params)) of a block, both streams in the loss."""
    net = network.network(lambda rngs: mmdit.JointBlock(A, False, False, rngs, compute=compute), {})
    x, text, given = to_jax(draw(2, 6, 16)), to_jax(draw(2, 5, 16, seed=2)), to_jax(draw(2, 16, seed=3))

    def loss(params: Any, embedding: Any = given) -> Any:
        image, words = rerun(compute.remat, net.apply, params, (x, text), embedding)
        return jnp.mean(image**2) + jnp.mean(words**2)

    return net.shapes, loss


@pytest.fixture(scope="module")
def block_params() -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in random_params(block_loss(Compute())[0], 0).items()}


def test_what_is_recomputed_changes_no_number_and_keeps_less(block_params):
    found = {policy: quick_jit(jax.value_and_grad(block_loss(Compute(remat=policy))[1]))(block_params) for policy in POLICIES}
    for policy in POLICIES:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[policy], found["none"])

    def kept(policy: str) -> int:
        given = block_params, jnp.zeros((2, 16))
        shapes = jax.eval_shape(lambda *both: jax.vjp(block_loss(Compute(remat=policy))[1], *both)[1], *given)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    sizes = [kept(policy) for policy in ("none", "products", "attention", "inputs")]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) == 4, sizes


def test_rows_of_equal_blocks_are_loops_in_a_tpu_program_alone():
    """4 dual blocks, 4 plain ones, the last: two loops. The numbers are those of the blocks in turn."""
    config = TRANSFORMER | MEMBERS["3.5-medium"] | dict(num_layers=9, dual_attention_layers=[0, 1, 2, 3])
    written, looped = (network.make_transformer(config, Compute(platform=platform)) for platform in ("cpu", "tpu"))
    given = list(map(to_jax, inputs((4, 4))))
    scans = [str(jax.make_jaxpr(net.apply)(net.shapes, *given)).count("scan[") for net in (written, looped)]
    assert scans == [0, 2] and looped.shapes == written.shapes
    module = randomise(SD3Transformer2DModel(**config))
    params = weights.from_torch(tensors(module), written.shapes, "many blocks")
    with torch.no_grad():
        expected = reference(module, *inputs((4, 4)))
    same(quick_jit(looped.apply)(params, *given), expected)


def test_a_sharded_block_is_the_block_of_one_device():
    """Weights over fsdp, gathered by each layer; its modulation and both streams. Gradients come back sharded."""
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    a = A._replace(normed=True)

    def loss(compute: Compute) -> Any:
        build = lambda rngs: layers.gathering(mmdit.JointBlock(a, True, False, rngs, compute=compute), compute)
        net = network.network(build, {})
        return net.shapes, lambda params, *states: sum((out**2).mean() for out in net.apply(params, states[:2], states[2]))

    shapes, alone = loss(Compute())
    params = random_params(shapes, 0)
    rows = [to_jax(draw(4, *shape, seed=1 + i)) for i, shape in enumerate([(6, 16), (5, 16), (16,)])]
    places = shardings(mesh, {name: fsdp_spec(value.shape, mesh) for name, value in params.items()})
    spread = jax.grad(loss(Compute(mesh=mesh))[1])
    step = quick_jit(spread, in_shardings=(places, *[batch_sharding(mesh)] * 3), out_shardings=places)
    found, expected = step(params, *rows), quick_jit(jax.grad(alone))(params, *rows)
    size = max(float(jnp.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * size, err_msg=name)
