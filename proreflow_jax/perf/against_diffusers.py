"""The denoiser's forward against diffusers' on the machine at hand: the same architecture, weights and inputs, in turns.

Both are timed in one process: ours, theirs, ours, theirs. A disturbance of the machine then disturbs both, and each turn has a
ratio. Both run on one device, a CPU with all its cores. Needs torch and diffusers (the extra `export-check`).
"""

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.models.network import cast, cpu_options
from proreflow_jax.perf import chips, dummy_arrays, flops
from proreflow_jax.perf.measure import run_spread, work
from proreflow_jax.pretrained import weights
from proreflow_jax.pretrained.pipeline import T5
from proreflow_jax.pretrained.t5_tokenizer import LENGTH
from proreflow_jax.run.check_config import changed
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import open_outline
from proreflow_jax.runtime import mesh

try:
    import diffusers
    import torch
except ImportError:
    raise UserError(
        "--against=diffusers needs both: pip install torch diffusers transformers accelerate peft (the extra `export-check`)"
    ) from None

ALONE = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1}
Inputs = dict[str, np.ndarray]  # latents (b,h,w,c), timesteps (b,), states (b,s,d), SDXL's and SD 3's pooled, SDXL's time_ids


def compare(config: ConfigDict, rows: int, turns: int) -> dict[str, Any]:
    """Seconds of both, the ratio ours / theirs of each turn, and the largest difference of the results.

    Args:
      rows: images at once.
      turns: of each, after one that is not counted. On a CPU in float32, elsewhere in --config.model.dtype.
    """
    experiment = open_outline(changed(config, ALONE), jax.devices()[:1])
    on_cpu = mesh.platform(experiment.mesh) == "cpu"
    dtype = "float32" if on_cpu else config.model.dtype
    inputs = _inputs(experiment, rows)
    params = dummy_arrays.filled(experiment, _placed(experiment))
    theirs = _theirs(experiment, params, inputs, dtype, "cpu" if on_cpu else "cuda")
    ours = _ours(experiment, params, inputs, dtype)
    del params
    gap = np.abs(ours() - theirs())
    times = np.array([[_seconds(ours), _seconds(theirs)] for _ in range(turns)])
    device, net = experiment.mesh.devices.flat[0], experiment.networks.denoiser
    useful = flops.total(flops.count(net.apply, net.shapes, *inputs.values()))
    return {
        "network": {"unet": "UNet"}.get(experiment.base.denoiser_name, experiment.base.denoiser_name),
        "images": rows,
        "dtype": dtype,
        "device": device.device_kind,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ours": run_spread(times[:, 0]),
        "theirs": run_spread(times[:, 1]),
        "ratio": run_spread(times[:, 0] / times[:, 1]),
        "largest_difference": float(gap.max()),
        **work(useful, float(np.median(times[:, 0])), 1, chips.chip_of(device.device_kind)),
    }


def _seconds(forward: Callable[[], np.ndarray]) -> float:
    start = perf_counter()
    forward()
    return perf_counter() - start


def _placed(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    place, shapes = mesh.replicated(experiment.mesh), experiment.networks.denoiser.shapes
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for name, s in shapes.items()}


def _inputs(experiment: Experiment, rows: int) -> Inputs:
    """Noise, a time and text states, the same for both."""
    draws, config = np.random.default_rng(0), experiment.networks.denoiser.config
    normal = lambda *shape: draws.standard_normal((rows, *shape), np.float32)
    encoders = [experiment.base.networks[name] for name in experiment.base.text if name != T5]
    length = max(encoder.config.get("max_position_embeddings", 77) for encoder in encoders)
    inputs = {"latents": normal(*experiment.base.latent_shape), "timesteps": np.full(rows, 500, np.float32)}
    if "joint_attention_dim" in config:  # the last row is one of T5's, or stands for all that it would give
        rest = LENGTH if T5 in experiment.base.networks else 1
        return inputs | {
            "states": normal(length + rest, config["joint_attention_dim"]),
            "pooled": normal(config["pooled_projection_dim"]),
        }
    inputs["states"] = normal(length, config["cross_attention_dim"])
    if config.get("addition_embed_type") == "text_time":
        ids = 6 * config["addition_time_embed_dim"]
        inputs["pooled"] = normal(config["projection_class_embeddings_input_dim"] - ids)
        inputs["time_ids"] = np.tile(np.float32([1024, 1024, 0, 0, 1024, 1024]), (rows, 1))
    return inputs


def _ours(experiment: Experiment, params: Any, inputs: Inputs, dtype: str) -> Callable[[], np.ndarray]:
    net, place = experiment.networks.denoiser, mesh.replicated(experiment.mesh)
    computed, exact = jax.jit(lambda p: cast(p, dtype))(params), ("timesteps", "time_ids")
    arrays = [jax.device_put(jnp.asarray(v, None if n in exact else dtype), place) for n, v in inputs.items()]
    apply = jax.jit(net.apply, compiler_options=cpu_options(net, mesh.platform(experiment.mesh)))
    return lambda: np.asarray(apply(computed, *arrays), np.float32)


def _theirs(experiment: Experiment, params: Any, inputs: Inputs, dtype: str, device: str) -> Callable[[], np.ndarray]:
    """diffusers' network with our weights; on a GPU in channels_last with cuDNN's choice by trial."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.backends.cudnn.benchmark = True
    name = experiment.networks.denoiser.config.get("_class_name", "UNet2DConditionModel")
    with torch.device("meta"):
        rival = getattr(diffusers, name).from_config(experiment.networks.denoiser.config)
    kind, tensors = getattr(torch, dtype), weights.to_torch(params)
    own = lambda array: torch.from_numpy(array if array.flags.writeable else array.copy()).to(kind)
    rival.load_state_dict({name: own(array) for name, array in tensors.items()}, assign=True)
    rival = rival.to(device, memory_format=_format(device)).eval()
    if name == "SD3Transformer2DModel" and T5 not in experiment.base.networks:
        states = inputs["states"]
        inputs = inputs | {"states": np.concatenate([states[:, :-1], np.repeat(states[:, -1:], LENGTH, 1)], axis=1)}
    fed = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
    latents, states = fed["latents"].permute(0, 3, 1, 2).to(kind), fed["states"].to(kind)
    latents = latents.contiguous(memory_format=_format(device))
    more: dict[str, Any] = {}
    if "time_ids" in fed:
        more["added_cond_kwargs"] = {"text_embeds": fed["pooled"].to(kind), "time_ids": fed["time_ids"]}
    elif "pooled" in fed:
        more["pooled_projections"] = fed["pooled"].to(kind)
    order = {"timestep": fed["timesteps"], "encoder_hidden_states": states, "return_dict": False, **more}

    def forward() -> np.ndarray:
        with torch.inference_mode():
            out = rival(latents, **order)[0]
        return out.permute(0, 2, 3, 1).float().cpu().numpy()

    return forward


def _format(device: str) -> Any:
    return torch.contiguous_format if device == "cpu" else torch.channels_last
