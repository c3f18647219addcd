"""What the real XLA:TPU compiler makes of joint attention at SD 3.5's true width: kernels that fit, no pass over scores.

Slow: each compilation takes a minute of a quiet core. Skipped where libtpu is not installed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_program as tpu

from proreflow_jax.models import layers, network
from proreflow_jax.models.joint_attention import JointAttention
from proreflow_jax.models.layers import Compute
from proreflow_jax.runtime.mesh import fsdp_spec

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow
ROWS, WIDTH, HEADS = 2, 1536, 24  # rows of a chip; SD 3.5 medium


def compiled(tokens: int, text: int) -> Any:
    """Value and gradient for v5e:2x2, weights sharded over the four chips, in bfloat16; the last text token counts as 256."""
    mesh = tpu.slice_mesh("v5e:2x2", data=1, fsdp=4)
    compute = Compute("auto", "none", "tpu", mesh)
    build = lambda rngs: JointAttention(HEADS, WIDTH // HEADS, True, rngs, repeated=256, compute=compute)
    net = network.network(lambda rngs: layers.gathering(build(rngs), compute), {})
    params = {name: tpu.abstract(v.shape, mesh, *fsdp_spec(v.shape, mesh)) for name, v in net.shapes.items()}
    rows = [tpu.abstract((4 * ROWS, length, WIDTH), mesh, ("data", "fsdp")) for length in (tokens, text)]
    loss = lambda *given: sum(out.astype(jnp.float32).sum() for out in net.apply(*given))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(params, *rows).compile()


@pytest.mark.parametrize(("tokens", "text"), [(1024, 78), (1024, 333), (4096, 333)])  # 512 pixels without T5, with; 1,024
def test_a_joint_sequence_takes_two_kernels(tokens, text):
    """Scores never lie in memory, and nothing is filled up but text to 128 lanes."""
    program = compiled(tokens, text)
    words = program.as_text()
    assert sorted(tpu.kernels_of(words)) == ["bwd", "fwd"] and tpu.activation_pads(words, tokens) == []
    assert not [shape for _, shape, _, _ in tpu.instructions(words) if f"{HEADS},{tokens},{tokens}]" in shape]
    print(tokens, program.memory_analysis().temp_size_in_bytes >> 20, "MiB of scratch")  # noqa: T201
