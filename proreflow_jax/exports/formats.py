"""What an export looks like: its form, its file, its scheduler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import JUMPS, Parameterization
from proreflow_jax.flow.stock import FLOW_MATCH, model_shift, untold_fields
from proreflow_jax.pretrained.sources import STUDENT
from proreflow_jax.pretrained.weights import file_name
from proreflow_jax.run import cli
from proreflow_jax.run.check_config import STORAGE


def denoiser_file(component: str) -> Path:
    """The weights of the network that was distilled, in a diffusers folder; component: "unet" or "transformer"."""
    return Path(component) / file_name(component)


class Format(NamedTuple):
    """What an export looks like; the defaults are those of the verb."""

    form: str = "diffusers"
    dtype: str = "float32"  # of the tensors written
    rank: int = 64  # of a LoRA
    scheduler: str = "stock"
    names: str = "kohya"  # of a LoRA's tensors: for most tools, or "diffusers" for that one alone


FILES = {"single-file": "model.safetensors", "lora": "pytorch_lora_weights.safetensors", "delta": "delta_weights.safetensors"}
SCHEDULERS = ("stock", "windowed")
SCHEDULER = {  # with these a ddim_eps or ddim_v student of N windows in N steps is the stock DDIMScheduler, exactly
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "thresholding": False,
    "steps_offset": 1,
    "rescale_betas_zero_snr": False,
}
OURS = "WindowedFlowScheduler"
WINDOWED = Path(__file__).with_name("windowed_scheduler.py")  # needs torch: copied, never imported here
BETAS = ("_diffusers_version", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
STOCK = Format()


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler_config.json is that of a rectified flow."""
    return scheduler.get("_class_name") == FLOW_MATCH


def check_scheduler(base: Mapping[str, Any], kind: str) -> None:
    """Raises UserError, one line, if a student of a model with this scheduler_config.json is not read by such a scheduler."""
    if is_flow(base) and kind != "stock":
        raise UserError(
            f"--scheduler={kind}: a rectified flow's student is read by the stock scheduler, at more steps than windows too if "
            "told `sigmas`: leave it out"
        )


def student_scheduler_config(base: Mapping[str, Any], flow: Parameterization, kind: str = "stock") -> dict[str, Any]:
    """scheduler_config.json on the base model's betas, for a student of this prediction type: stock, or ours for any steps.

    Of a rectified flow's student the stock scheduler, with the two fields by which it stops at the windows' bounds untold.
    """
    check_scheduler(base, kind)
    if is_flow(base):
        return {**base, **untold_fields(model_shift(base), flow.windows), STUDENT: flow.windows}
    betas = {name: base[name] for name in BETAS if name in base}
    if kind == "stock":
        return {**betas, **SCHEDULER, "prediction_type": JUMPS[flow.prediction], STUDENT: flow.windows}
    betas.pop("trained_betas", None)
    return {**betas, "_class_name": OURS, **flow._asdict()}


def choose_format(form: str, reader: str, dtype: str, rank: int, scheduler: str) -> Format:
    """The flags of `export`, checked. Raises ValueError, one line."""
    cli.choose(form, ("diffusers", *FILES), "--form")
    cli.choose(dtype, STORAGE, "--dtype")
    cli.choose(scheduler, SCHEDULERS, "--scheduler")
    cli.choose(reader, ("", "diffusers"), "--for")
    if reader and form != "lora":
        raise UserError(f"--for={reader} chooses the names in a LoRA file: say --form=lora, or leave it out")
    if rank < 1:
        raise UserError(f"--rank={rank} must be at least 1")
    if scheduler == "windowed" and form != "diffusers":
        raise UserError(f"--scheduler=windowed travels in a diffusers folder, not in --form={form}: leave one of them out")
    return Format(form, dtype, rank, scheduler, reader or Format().names)
