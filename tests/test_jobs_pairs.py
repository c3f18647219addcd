"""What is fetched of a batch of pairs: rounded on the devices, bit for bit as the host rounded it, before it is gathered."""

import re
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs.pairs import jit_pairs
from proreflow_jax.reflow.pairs import RECORD, PairRecipe
from proreflow_jax.runtime import mesh

TOYS = tiny.toy_networks()
ROWS = 8


def inputs(loud: float = 1.0) -> tuple:
    machine, frozen = mesh.make_mesh(devices=jax.devices()[:4]), tiny.toy_frozen(TOYS)
    teacher = {name: value * (loud if name == "conv_out.weight" else 1) for name, value in frozen.teacher.items()}
    batch = jax.device_put(tiny.rows(ROWS), mesh.batch_sharding(machine))
    return jax.device_put(frozen._replace(teacher=teacher), mesh.replicated(machine)), batch


@cache
def program(storage: str) -> jax.stages.Compiled:
    stage = SimpleNamespace(
        pairs=PairRecipe(4, "noise", 1, "ddim", 1.0, 0.5, tiny.LATENT, "float32"), teacher=Parameterization("epsilon")
    )
    config = ConfigDict(dict(pairs=dict(storage=storage), mesh=dict(sparse_cores=True)))
    jitted = jit_pairs(stage, TOYS, mesh.make_mesh(devices=jax.devices()[:4]), config)
    return jitted.lower(*inputs()).compile(compiler_options=tiny.QUICK)


def test_states_rounded_on_the_devices_are_those_that_the_host_rounds():
    ours, whole = (jax.device_get(program(dtype)(*inputs())) for dtype in ("float16", "float32"))
    assert {*RECORD, "finite", "fits"} == ours.keys() and ours["states"].dtype == np.float16
    theirs = whole | {"states": whole["states"].astype(np.float16)}
    assert all(np.array_equal(ours[name].view(np.uint8), theirs[name].view(np.uint8)) for name in ours)
    assert ours["finite"].all() and ours["fits"].all()


def test_it_is_told_whether_the_teacher_or_the_storage_is_at_fault():
    for loud, finite in ((1e5, True), (1e38, False)):
        made = jax.device_get(program("float16")(*inputs(loud)))
        assert not made["fits"].any() and made["finite"].all() == made["finite"].any() == finite


def test_states_are_rounded_before_they_are_gathered():
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", program("float16").as_text())
    assert ("f16", "8,5,4,4,4") in gathered and not any(dtype == "f32" for dtype, _ in gathered)


EVERY = np.arange(1 << 16, dtype=np.uint32)
VALUES = np.concatenate(  # by chance; every exponent, on bfloat16's ties; float16's ties, its subnormals among them
    [
        np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32),
        (EVERY << 16) + 0x8000,
        0x32000000 + (EVERY << 12),
        0xB2000000 + (EVERY << 12),
    ]
).view(np.float32)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_the_devices_round_as_the_host_does(storage):
    values = VALUES[np.isfinite(VALUES) & ((VALUES == 0) | (np.abs(VALUES) >= np.finfo(np.float32).tiny))]
    with np.errstate(over="ignore"):
        ours, theirs = jax.jit(lambda x: x.astype(storage))(values), values.astype(jnp.dtype(storage))
    assert np.array_equal(np.asarray(ours).view(np.uint8), theirs.view(np.uint8))
