"""The proof of an export: the same noise and prompts through our sampler and through stock diffusers, side by side.

Needs torch and diffusers (the extra `export-check`); nothing else in the package imports this file.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proreflow_jax import RunFailed, UserError
from proreflow_jax.exports.card import add_to_card
from proreflow_jax.exports.formats import FILES, is_flow
from proreflow_jax.flow import windows
from proreflow_jax.flow.stock import model_shift
from proreflow_jax.models.network import Params
from proreflow_jax.pretrained import lora_file, weights
from proreflow_jax.pretrained.sources import ModelSource
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import text_context
from proreflow_jax.run.experiment import Experiment, Weights, load_weights
from proreflow_jax.run.stages import EVALUATION_KEY, Stage, run_key
from proreflow_jax.storage import atomic, sealed

try:
    import diffusers
    import torch
    import transformers
except ImportError:
    raise UserError(
        "--check needs torch and diffusers: pip install torch diffusers transformers accelerate peft (the extra `export-check`)"
    ) from None

log = logging.getLogger(__name__)
LIMIT = 1e-3  # of the latents, for what carries the whole student in float32
COUNT = 8
RESULT = "replay.json"


def check_replay(experiment: Experiment, stage: Stage, folder: Path) -> float:
    """Largest difference between our latents and those of diffusers at guidance 1; written to <folder>/replay.json and
    onto the card.

    As many steps as windows, or twice as many where the folder carries our scheduler. Of a rectified flow both: as many by the
    folder's scheduler, told nothing else; twice as many by the same with the model's shift, told `sigmas`. A LoRA is compared
    with our own sum of base and LoRA, and its distance to the student, for what it cannot carry, is told. Half precision is
    told only.
    Raises RuntimeError if the difference exceeds 1e-3.
    """
    card = sealed.read_record(folder)
    sealed.check_undamaged(folder, card, "export it again with --overwrite")
    format_ = card["format"]
    steps = stage.windows * (2 if format_["scheduler"] == "windowed" else 1)
    prompts, student = _prompts(experiment), load_weights(experiment, stage)
    shape = (COUNT, *experiment.base.latent_shape)
    noise = np.asarray(jax.random.normal(run_key(experiment.config, EVALUATION_KEY, 0), shape))
    pipe = OPENERS[format_["form"]](folder, experiment.base.source)
    if format_["form"] != "diffusers" and experiment.config.model.clip_skip:
        _leave_out_layers(pipe.text_encoder, experiment.config.model.clip_skip)
    theirs = their_latents(pipe, prompts, noise, steps, **_told(experiment))
    carried = student
    if format_["form"] == "lora":
        carried = student._replace(params=_with_lora(experiment, folder, format_["names"]))
    to_student = _gap(our_latents(experiment, student, prompts, noise, steps), theirs)
    gap = _gap(our_latents(experiment, carried, prompts, noise, steps), theirs) if carried is not student else to_student
    twice = {}
    if is_flow(experiment.base.scheduler):
        sigmas = _told_sigmas(pipe, 2 * steps, stage.windows)
        more = their_latents(pipe, prompts, noise, 2 * steps, sigmas=sigmas)
        twice = {
            "told": {"steps": 2 * steps, "difference": _gap(our_latents(experiment, carried, prompts, noise, 2 * steps), more)}
        }
        gap = max(gap, twice["told"]["difference"])
    result = {
        "steps": steps,
        "images": COUNT,
        "guidance": 1.0,
        "largest_difference": gap,
        "largest_value": float(np.abs(theirs).max()),
    }
    result |= twice | {"to_student": to_student, "diffusers": diffusers.__version__, "torch": torch.__version__}
    atomic.write_json(folder / RESULT, result)
    add_to_card(folder, replay=result)
    log.info(
        "%s: %d steps in diffusers, largest difference of the latents %.1e (values to %.1f)%s",
        folder,
        steps,
        gap,
        result["largest_value"],
        f"; to the whole student {to_student:.1e}" if to_student != gap else "",
    )
    if format_["dtype"] == "float32" and not gap <= LIMIT:
        raise RunFailed(f"{folder}: diffusers' latents differ by {gap:.1e} from ours, must be at most {LIMIT:.0e}")
    return gap


def _gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def _told_sigmas(pipe: Any, steps: int, n: int) -> list[float]:
    """What a stock pipeline is told to take so many steps through n windows; its scheduler gets the model's shift back."""
    config = dict(pipe.scheduler.config)
    fields = {"shift": model_shift(config), "shift_terminal": None}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, **fields)
    return windows.sampling_nodes(steps, n)[:-1].tolist()


def _leave_out_layers(text_encoder: Any, count: int) -> None:
    """What `num_hidden_layers` less `count` does; diffusers' own clip_skip (0.42) fails with transformers 5."""
    encoder = getattr(text_encoder, "text_model", text_encoder).encoder
    encoder.layers = encoder.layers[:-count]


def _with_lora(experiment: Experiment, folder: Path, names: str) -> Params:
    """The base model's denoiser with the LoRA of a folder, in our layout; float32, as diffusers is told to add them."""
    name, stored = experiment.base.denoiser_name, weights.Tensors([folder / FILES["lora"]])
    base = {weight: value.astype(np.float32) for weight, value in experiment.base.source.tensors(name).items()}
    factors = lora_file.from_peft(stored, base, name) if names == "diffusers" else lora_file.from_kohya(stored, base)
    return weights.from_torch(lora_file.apply_factors(base, factors), experiment.networks.denoiser.shapes, str(folder))


def _prompts(experiment: Experiment) -> list[str]:
    from proreflow_jax.data import digits, kinds

    if kinds.is_digits(experiment.config.data):
        return [digits.caption(i, 0) for i in range(COUNT)]
    return [f"a photograph, number {i}" for i in range(COUNT)]


def our_latents(experiment: Experiment, student: Weights, prompts: list[str], noise: np.ndarray, steps: int) -> np.ndarray:
    """Latents (n, h, w, c) of our sampler, scaled."""
    n = experiment.networks
    ids = jnp.asarray(experiment.base.tokenizer.encode(prompts))
    context = jax.jit(partial(text_context, n.condition))(experiment.base.text, ids)
    sample = partial(
        sampler.sample_latents, denoiser=n.denoiser, schedule=n.schedule, flow=student.flow, steps=steps, guidance=1.0
    )
    return np.asarray(jax.jit(sample)(student.params, jnp.asarray(noise), context, context))


def _told(experiment: Experiment) -> dict[str, Any]:
    """SDXL's micro-conditioning where the config has another than diffusers' own, the model's resolution."""
    names = {"original_size": "original_size", "crop": "crops_coords_top_left", "target_size": "target_size"}
    return {names[name]: tuple(value) for name, value in experiment.config.conditioning.items() if any(value)}


def their_latents(pipe: Any, prompts: list[str], noise: np.ndarray, steps: int, **told: Any) -> np.ndarray:
    """The same from a pipeline of diffusers, told nothing but the number of steps, guidance 1, and SDXL's sizes."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))
    out = pipe(prompts, num_inference_steps=steps, guidance_scale=1.0, latents=latents, output_type="latent", **told).images
    return out.numpy().transpose(0, 2, 3, 1)


def _open_folder(folder: Path, base: ModelSource) -> Any:
    index = atomic.read_json(folder / "model_index.json")
    ours = index["scheduler"][0] != "diffusers"  # then the folder carries the scheduler's code, which is this package's
    absent = dict.fromkeys(name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [""])[0] is None)
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=ours, dtype=torch.float32, **absent)


def _open_single_file(folder: Path, base: ModelSource) -> Any:
    return _with_scheduler(_from_file(folder / FILES["single-file"], base), folder)


def _from_file(path: Path, base: ModelSource, **parts: Any) -> Any:
    """The file alone knows no sizes and no tokenizer: those come from the base model's folder."""
    kinds = {"xl": diffusers.StableDiffusionXLPipeline, "sd3": diffusers.StableDiffusion3Pipeline}
    kind = kinds.get(base.family, diffusers.StableDiffusionPipeline)
    if base.family == "sd3":
        parts |= _encoders_beside(base) | _third_encoder(base)
    return kind.from_single_file(str(path), config=str(base.folder), local_files_only=True, dtype=torch.float32, **parts)


def _encoders_beside(base: ModelSource) -> dict[str, Any]:
    """The CLIPs that a single file of SD 3 lacks, from the folder beside it."""
    kind = transformers.CLIPTextModelWithProjection
    return {name: kind.from_pretrained(base.folder / name) for name in base.beside if name != "text_encoder_3"}


def _third_encoder(base: ModelSource) -> dict[str, Any]:
    """T5 as a pipeline takes it, None where there is none: diffusers 0.42 loses the table of a single file's own."""
    if "text_encoder_3" not in base.components:
        return {"text_encoder_3": None, "tokenizer_3": None}
    encoder = transformers.T5EncoderModel(transformers.T5Config.from_pretrained(base.folder / "text_encoder_3"))
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in base.tensors("text_encoder_3").items()}
    encoder.load_state_dict({**encoder.state_dict(), **tensors})
    return {"text_encoder_3": encoder.eval()}


def _open_lora(folder: Path, base: ModelSource) -> Any:
    if base.file is None:
        pipe = _open_folder(base.folder, base)
    else:
        pipe = _from_file(base.file, base, **({"vae": None} if base.vae else {}))  # a file may lack it, latents need none
    pipe.load_lora_weights(folder, weight_name=FILES["lora"])
    return _with_scheduler(pipe, folder)


def _with_scheduler(pipe: Any, folder: Path) -> Any:
    kind = atomic.read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    pipe.scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    return pipe


OPENERS = {
    "diffusers": _open_folder,
    "single-file": _open_single_file,
    "lora": _open_lora,
}  # form -> (folder, base model) -> pipeline
