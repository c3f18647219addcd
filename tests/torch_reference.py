"""Torch modules as the reference for our networks: the same random weights on both sides, compared in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from proreflow_jax.models import network
from proreflow_jax.pretrained import weights

torch.set_num_threads(1)
TOLERANCE = 1e-4  # of ||ours - torch|| / ||torch|| in float32
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = partial(jax.jit, compiler_options=QUICK)  # compiles in a third of the time, computes the same


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew, norms included: fresh ones are 1 and 0 and would hide a mixed-up name."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        fan_in = max(1, value[0].numel() if value.ndim > 1 else 1)
        centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        value.data = centre + (0.3 * noise if value.ndim == 1 else noise / fan_in**0.5)
    return module.eval()


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's state dict as numpy, torch's names and layout."""
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def twin(module: torch.nn.Module, build: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> Callable[..., Any]:
    """Randomises `module`; returns our block with the same weights, one program. Names and shapes must agree in full.

    A size is handed over by name, `shape`.
    """
    ours = network.network(build, {})
    found = weights.from_torch(tensors(randomise(module, seed)), ours.shapes, type(module).__name__)
    return partial(quick_jit(ours.apply, static_argnames="shape"), {name: jnp.asarray(value) for name, value in found.items()})


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_jax(x: torch.Tensor) -> jnp.ndarray:
    """A torch tensor as a jax array; images (b c h w) become (b h w c)."""
    return jnp.asarray((x.permute(0, 2, 3, 1) if x.ndim == 4 else x).detach().numpy())


def error(ours: Any, reference: torch.Tensor) -> float:
    """||ours - reference|| / ||reference||, both in our layout; the shapes must be equal."""
    a, b = np.asarray(ours).astype(np.float64), np.asarray(to_jax(reference), np.float64)
    if a.shape != b.shape:
        raise AssertionError(f"shape {a.shape} instead of {b.shape}")
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def same(ours: Any, reference: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Asserts that the relative error is at most `tolerance`."""
    found = error(ours, reference)
    assert found <= tolerance, f"relative error {found:.2e} is above {tolerance:.0e}"
