"""Stable Diffusion's networks at their true size: torch and ours, each in a process of its own, one after the other.

`python tests/full_size.py torch NAME FOLDER` writes what diffusers or transformers compute into FOLDER, then `ours` in place
of `torch` compares ours with it and prints what it found as one line of JSON. `write` and `load` are the two halves of the
reading test. Every tensor is drawn from its own name, alike on both sides, so that no file of gigabytes lies between them;
both processes hold the weights once. Sizes are those of the published config.json files; the counts prove them.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
UNET = dict(
    act_fn="silu",
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=4,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-5,
    norm_num_groups=32,
    out_channels=4,
)
SD = UNET | dict(
    block_out_channels=[320, 640, 1280, 1280],
    down_block_types=[CROSS[0]] * 3 + [PLAIN[0]],
    up_block_types=[PLAIN[1]] + [CROSS[1]] * 3,
)
SD_15 = SD | dict(attention_head_dim=8, cross_attention_dim=768, sample_size=64)
SD_21 = SD | dict(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, sample_size=96, use_linear_projection=True)
SDXL = UNET | dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280],
    cross_attention_dim=2048,
    down_block_types=[PLAIN[0]] + [CROSS[0]] * 2,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
    transformer_layers_per_block=[1, 2, 10],
    up_block_types=[CROSS[1]] * 2 + [PLAIN[1]],
    use_linear_projection=True,
)
VAE = dict(
    act_fn="silu",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    in_channels=3,
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    out_channels=3,
    sample_size=512,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
SD_35_MEDIUM = dict(
    attention_head_dim=64,
    caption_projection_dim=1536,
    dual_attention_layers=list(range(13)),
    in_channels=16,
    joint_attention_dim=4096,
    num_attention_heads=24,
    num_layers=24,
    out_channels=16,
    patch_size=2,
    pooled_projection_dim=2048,
    pos_embed_max_size=384,
    qk_norm="rms_norm",
    sample_size=128,
)
VAE_SD3 = VAE | dict(
    latent_channels=16,
    sample_size=1024,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
T5_XXL = dict(
    architectures=["T5EncoderModel"],
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
)
VAE_XL = VAE | dict(force_upcast=True, sample_size=1024, scaling_factor=0.13025)
TEXT = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1, layer_norm_eps=1e-5, max_position_embeddings=77, vocab_size=49408)
COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim", "hidden_act")
PLAIN_TEXT, PROJECTED = ["CLIPTextModel"], ["CLIPTextModelWithProjection"]
text = lambda kind, *row: TEXT | dict(zip(COLUMNS, row, strict=True), architectures=kind)
CLIP_L = text(PLAIN_TEXT, 768, 3072, 12, 12, 768, "quick_gelu")
CLIP_H = text(PLAIN_TEXT, 1024, 4096, 23, 16, 512, "gelu")  # SD 2 leaves out the last of OpenCLIP's 24 layers
BIG_G = text(PROJECTED, 1280, 5120, 32, 20, 1280, "gelu")


class Case(NamedTuple):
    """One network: its kind, its config.json, how many parameters the published one has, (h, w) of its latents."""

    kind: str
    config: dict
    parameters: int
    size: tuple[int, int] = (0, 0)


CASES = {
    "SD 1.5 UNet": Case("unet", SD_15, 859_520_964, (64, 64)),
    "SD 2.1 UNet": Case("unet", SD_21, 865_910_724, (64, 64)),
    "SDXL UNet": Case("unet", SDXL, 2_567_463_684, (64, 64)),
    "SD 3.5 medium transformer": Case("mmdit", SD_35_MEDIUM, 2_469_663_936, (64, 64)),  # 226,492,416 of them its positions
    "SD 1.5 VAE": Case("vae", VAE, 83_653_863, (32, 32)),
    "SDXL VAE": Case("vae", VAE_XL, 83_653_863, (32, 40)),
    "CLIP-L text": Case("text", CLIP_L, 123_060_480),
    "OpenCLIP-H text": Case("text", CLIP_H, 340_387_840),
    "OpenCLIP-bigG text": Case("text", BIG_G, 694_659_840),
}
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",  # else all bfloat16 weights lie in float32 at once
    "xla_llvm_disable_expensive_passes": True,
}
ROUNDED = QUICK | {"xla_allow_excess_precision": False}  # XLA may not skip a rounding to bfloat16
GB = 1e9


def memory(field: str) -> float:
    """Bytes of this process now (VmRSS) or at its highest (VmHWM). Unlike ru_maxrss the latter begins anew at exec."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that belong to a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


class Drawn(Mapping[str, np.ndarray]):
    """Weights of a network in torch's layout, each drawn when it is asked for; norms too are away from 1 and 0."""

    def __init__(self, shapes: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        value = normal(name, shape)
        if name == "pos_embed.pos_embed":  # a table that is added as it is
            return value
        value *= 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        return value + np.float32(1) if len(shape) == 1 and name.endswith("weight") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def inputs(case: Case) -> list[np.ndarray]:
    """What the network is called with, in torch's layout."""
    h, w = case.size
    if case.kind == "vae":
        return [normal("images", (1, 3, 8 * h, 8 * w)), normal("latents", (1, 4, h, w))]
    if case.kind == "text":
        ids = np.random.default_rng(0).integers(0, 49406, (2, 77))
        ids[:, 0], ids[0, 9:], ids[1, 76] = 49406, 49407, 49407  # a short prompt and one of full length
        return [ids]
    if case.kind == "mmdit":
        states = normal("context", (1, 333, case.config["joint_attention_dim"])), normal("pooled", (1, 2048))
        return [normal("latents", (1, 16, h, w)), np.array([749.5], np.float32), *states]
    context = normal("context", (1, 77, case.config["cross_attention_dim"]))
    given = [normal("latents", (1, 4, h, w)), np.array([749.5], np.float32), context]
    sizes = np.array([[8 * h, 8 * w, 0, 16, 8 * h, 8 * w]], np.float32)
    return [*given, normal("pooled", (1, 1280)), sizes] if "addition_embed_type" in case.config else given


def torch_module(case: Case) -> Any:
    """The reference without weights: nothing is allocated or initialised."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)
    with torch.device("meta"):
        if case.kind != "text":
            kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "mmdit": SD3Transformer2DModel}
            return kinds[case.kind].from_config(case.config)
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        return kinds[case.config["architectures"][0]](CLIPTextConfig(**case.config))


def fill(module: Any) -> dict[str, list[int]]:
    """Draws the weights of a module of `torch_module`; returns their shapes."""
    import torch

    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    weights = {name: torch.from_numpy(value) for name, value in Drawn(shapes).items()}
    module.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):
        folder, _, leaf = name.rpartition(".")
        if name in shapes:
            continue
        if leaf != "position_ids":
            raise AssertionError(f"{name} is a buffer that nobody has filled")
        module.get_submodule(folder).position_ids = torch.arange(buffer.shape[-1])[None]
    module.eval()
    return shapes


def torch_outputs(case: Case, module: Any) -> dict[str, Any]:
    """The reference's outputs, torch's layout."""
    import torch

    given = [torch.from_numpy(value) for value in inputs(case)]
    with torch.no_grad():
        if case.kind == "unet":
            added = dict(zip(("text_embeds", "time_ids"), given[3:], strict=False)) or None
            return {"output": module(*given[:3], added_cond_kwargs=added, return_dict=False)[0]}
        if case.kind == "mmdit":
            x, times, context, pooled = given
            return {"output": module(x, context, pooled, times, return_dict=False)[0]}
        if case.kind == "vae":
            moments = module.encode(given[0]).latent_dist
            return {"mean": moments.mean, "std": moments.std, "image": module.decode(given[1]).sample}
        found = module(given[0], output_hidden_states=True)
    pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
    return {"last": found.last_hidden_state, "penultimate": found.hidden_states[-2], "pooled": pooled}


def to_ours(value: np.ndarray) -> np.ndarray:
    """Images (b c h w) as (b h w c)."""
    return np.ascontiguousarray(value.transpose(0, 2, 3, 1)) if value.ndim == 4 else value


def run_torch(case: Case, folder: Path) -> dict[str, Any]:
    """Computes the reference; writes shapes.json and torch.safetensors."""
    module, start = torch_module(case), time.perf_counter()
    shapes, drawn = fill(module), time.perf_counter()
    found = {name: to_ours(value.numpy()) for name, value in torch_outputs(case, module).items()}
    save_file(found, folder / "torch.safetensors")
    (folder / "shapes.json").write_text(json.dumps(shapes))
    return dict(draw_s=drawn - start, run_s=time.perf_counter() - drawn, peak_gb=memory("VmHWM") / GB)


def our_network(case: Case) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """(our network, outputs by name of (params, *inputs))."""
    from proreflow_jax.models import network

    makers = dict(unet=network.make_unet, mmdit=network.make_transformer, vae=network.make_vae, text=network.make_text_encoder)
    ours = makers[case.kind](case.config)

    def outputs(params: Any, *given: Any) -> dict[str, Any]:
        if case.kind in ("unet", "mmdit"):
            return {"output": ours.apply(params, *given)}
        if case.kind == "text":
            return ours.apply(params, *given)._asdict()
        mean, std = ours.apply(params, given[0], method="encode")
        return {"mean": mean, "std": std, "image": ours.apply(params, given[1], method="decode")}

    return ours, outputs


def timed(outputs: Callable[..., Any], options: dict[str, Any], *given: Any) -> tuple[dict[str, np.ndarray], float, float]:
    """(outputs as float32, seconds of compiling, seconds of running)."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(outputs).lower(*given).compile(compiler_options=options)
    middle = time.perf_counter()
    found = {name: np.asarray(value, np.float32) for name, value in compiled(*given).items()}
    return found, middle - start, time.perf_counter() - middle


def errors(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """||found - wanted|| / ||wanted|| of every output; names and shapes must agree."""
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in wanted.items()}:
        raise AssertionError(f"outputs {sorted(found)} are not {sorted(wanted)}, or of another shape")
    norm = lambda value: float(np.linalg.norm(value.astype(np.float64)))
    return {name: norm(found[name].astype(np.float64) - wanted[name]) / norm(wanted[name]) for name in wanted}


def run_ours(case: Case, folder: Path) -> dict[str, Any]:
    """Compares ours in float32 with the reference, then ours in bfloat16 with ours in float32; weights lie once in memory."""
    import jax.numpy as jnp

    from proreflow_jax.pretrained import weights

    start = time.perf_counter()
    ours, outputs = our_network(case)
    built_s, start = time.perf_counter() - start, time.perf_counter()
    params = weights.from_torch(Drawn(json.loads((folder / "shapes.json").read_text())), ours.shapes, str(folder))
    for name in ours.shapes:
        params[name] = jnp.asarray(params[name])
    drawn, count = time.perf_counter() - start, sum(value.size for value in params.values())
    given = [jnp.asarray(to_ours(value)) for value in inputs(case)]
    full, compile_s, run_s = timed(outputs, QUICK, params, *given)
    numbers = dict(
        parameters=count, build_s=built_s, draw_s=drawn, compile_s=compile_s, run_s=run_s, float32_gb=memory("VmHWM") / GB
    )

    for name in ours.shapes:  # as reflow/predict.py's make_predict: times and sizes stay float32
        params[name] = params[name].astype(jnp.bfloat16)
    exact = {"unet": (1, 4), "mmdit": (1,)}.get(case.kind, ())
    halved = [x if i in exact or x.dtype == jnp.int32 else x.astype(jnp.bfloat16) for i, x in enumerate(given)]
    half, compile_s, run_s = timed(outputs, ROUNDED, params, *halved)
    numbers |= dict(bfloat16_compile_s=compile_s, bfloat16_run_s=run_s, peak_gb=memory("VmHWM") / GB)
    return numbers | dict(float32=errors(full, load_file(folder / "torch.safetensors")), bfloat16=errors(half, full))


def run_write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes config.json and the drawn weights as diffusers lays them out."""
    module = torch_module(case)
    fill(module)
    module.save_pretrained(folder)
    return dict(file_gb=(folder / "diffusion_pytorch_model.safetensors").stat().st_size / GB)


def run_load(case: Case, folder: Path) -> dict[str, Any]:
    """Reads them as the verbs do; memory is the peak above what the process held before."""
    from proreflow_jax.models import network
    from proreflow_jax.pretrained import config_fields, weights

    ours = network.make_unet(config_fields.read_config(folder, "unet"))
    before, start = memory("VmRSS"), time.perf_counter()
    params = weights.from_torch(weights.read_tensors(folder), ours.shapes, str(folder))
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    held = sum(value.nbytes for value in params.values())
    drawn = Drawn({name: value.shape for name, value in params.items() if value.ndim == 1})
    exact = all(np.array_equal(params[name], value) for name, value in drawn.items())
    return dict(load_s=seconds, peak_gb=peak / GB, model_gb=held / GB, ratio=peak / held, exact=exact)


if __name__ == "__main__":
    side, name, folder = sys.argv[1:]
    sides = dict(torch=run_torch, ours=run_ours, write=run_write, load=run_load)
    sys.stdout.write(json.dumps(sides[side](CASES[name], Path(folder))) + "\n")
