"""The same losses on any mesh: 1 to 8 devices, data, fsdp, tensor and slices in several shapes, one process or several."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mesh_steps
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from mesh_steps import Trained, tiny_config, trained
from test_runtime_processes import run_pod
from tiny import quick_jit, random_params
from verb import environment

from configs.common import SHARDING_RULES
from proreflow_jax.models import attention, layers, network
from proreflow_jax.models.layers import Compute
from proreflow_jax.run.check_config import RULES, changed
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import digest, fold

pytestmark = pytest.mark.usefixtures("quick")
TOLERANCE = 1e-5  # relative


def on_devices(folder: Path, model: Path, axes: tuple[int, ...], accumulation: int = 1) -> Trained:
    """`trained` on a mesh of the first devices, as many as the axes multiply to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[: np.prod(axes)]))
        return trained(tiny_config(folder, model, axes, accumulation))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Trained:
    return on_devices(tmp_path_factory.mktemp("alone"), model, (1, 1, 1))


def same(losses: list[float], alone: Trained) -> None:
    assert len(losses) == len(alone.losses) == mesh_steps.STEPS
    assert len(set(alone.losses)) == mesh_steps.STEPS
    np.testing.assert_allclose(losses, alone.losses, rtol=TOLERANCE)


SHAPES = [  # (data, fsdp, tensor[, slices]), accumulation
    ((2, 1, 1), 1),
    ((1, 2, 1), 1),
    ((1, 1, 2), 1),
    ((2, 2, 1), 1),
    ((1, 4, 1), 1),
    ((1, 2, 2), 1),
    ((2, 2, 2), 1),
    ((1, 8, 1), 1),
    ((8, 1, 1), 1),
    ((1, 2, 2, 2), 1),
    ((1, 1, 1), 2),
    ((2, 1, 1), 2),
    ((1, 2, 1), 2),
    ((2, 2, 2), 2),
    ((1, 8, 1), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "accumulation"), SHAPES)
def test_any_mesh_gives_the_losses_of_one_device(
    tmp_path: Path, model: Path, alone: Trained, axes: tuple[int, ...], accumulation: int
) -> None:
    found = on_devices(tmp_path, model, axes, accumulation)
    same(found.losses, alone)
    query = found.state.params["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    rows, columns = query.sharding.shard_shape(query.shape)
    assert rows * columns * axes[1] * axes[2] == query.size  # born, and kept, in pieces over fsdp and tensor
    assert axes[2] == 1 or columns * axes[2] == query.shape[1]


def run_job(folder: Path, model: Path, processes: int, devices: int, axes: tuple[int, ...]) -> dict[str, Any]:
    """The losses and the weights' digest of a job's processes, which all say the same."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder / "programs", devices).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(Path(mesh_steps.__file__).parent.parent))
        words = [sys.executable, mesh_steps.__file__, str(folder), str(model), ",".join(map(str, axes)), "1"]
        assert run_pod(processes, devices, words, timeout=600) == [0] * processes
    told = [json.loads((folder / f"{k}.json").read_text()) for k in range(processes)]
    assert told == told[:1] * processes
    return told[0]


@pytest.mark.slow
def test_a_teacher_that_lies_whole_on_every_device_changes_no_number(tmp_path: Path, model: Path, alone: Trained) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:4]))
        config = changed(tiny_config(tmp_path, model, (1, 4, 1)), {"mesh.teacher": "whole"})
        same(trained(config).losses, alone)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 1, 2)])
def test_two_processes_of_two_devices_give_the_losses_of_one_device(
    tmp_path: Path, model: Path, alone: Trained, axes: tuple[int, ...]
) -> None:
    same(run_job(tmp_path, model, 2, 2, axes)["losses"], alone)


@pytest.mark.slow
def test_processes_of_a_data_mesh_make_the_very_bits_of_one(tmp_path: Path, model: Path) -> None:
    """One alone sums by its own threads, several over sockets, in another order: so gradients are summed in the devices'."""
    found = []
    for processes in (1, 2, 4):
        (tmp_path / str(processes)).mkdir()
        found.append(run_job(tmp_path / str(processes), model, processes, 4 // processes, (4, 1, 1)))
    alone = on_devices(tmp_path, model, (4, 1, 1))
    assert found == [{"losses": alone.losses, "digest": fold(digest(alone.state.params))}] * 3


def block(tensor: int) -> tuple[jax.Array, Any]:
    """What a transformer block computes, its layers split over so many devices by the configs' rules, and its program."""
    machine = mesh.make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    compute = Compute(mesh=machine)
    made = lambda rngs: layers.gathering(attention.TransformerBlock(64, 4, 48, rngs, compute), compute)
    net = network.network(made, {})
    rules = [(pattern, RULES[value]) for pattern, value in SHARDING_RULES]
    places = mesh.shardings(machine, mesh.specs(rules, {name: s.shape for name, s in net.shapes.items()}, machine))
    rng = np.random.default_rng(0)
    states = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 32, 64), (2, 8, 48))]
    whole = mesh.replicated(machine)
    params = {name: jax.device_put(value, places[name]) for name, value in random_params(net.shapes, 0).items()}
    program = quick_jit(net.apply, in_shardings=(places, whole, whole), out_shardings=whole).lower(params, *states).compile()
    assert tensor == 1 or places["attn1.to_q.weight"].spec == places["ff.net.0.proj.weight"].spec == PartitionSpec(
        None, "tensor"
    )
    assert tensor == 1 or places["attn1.to_out.0.weight"].spec == places["ff.net.2.weight"].spec == PartitionSpec("tensor")
    return program(params, *(jax.device_put(state, whole) for state in states)), program


def test_tensor_splits_the_work_of_attention_and_feed_forward_not_only_their_weights() -> None:
    (one, alone), (two, split) = block(1), block(2)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    work = lambda program: program.cost_analysis()["flops"]
    assert work(split) < 0.52 * work(alone)
    assert split.as_text().count(" all-reduce(") == 3  # one a layer: self-attention, cross-attention, feed-forward
