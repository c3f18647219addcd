"""What XLA's compiler is told about a job's programs, by their machine and the network that they compute."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from proreflow_jax.models import network
from proreflow_jax.runtime import mesh


def compiler_options(denoiser: network.Network, machine: Mesh, config: ConfigDict) -> dict[str, str]:
    """Options of a job's jit on this mesh."""
    ours = network.cpu_options(denoiser, mesh.platform(machine))
    return ours | mesh.compiler_options(machine, config.mesh.sparse_cores)
