"""Write a stage's student as a diffusers folder with the stock DDIM scheduler; --check replays it in diffusers.

Everything but the UNet and the scheduler is copied from the base model as it is.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import cli
from proreflow_jax.checks import check_export
from proreflow_jax.experiment import Experiment, load_weights, open_experiment, to_host
from proreflow_jax.flow.prediction import JUMPS
from proreflow_jax.models import weights
from proreflow_jax.reflow.stages import Stage, find_stage
from proreflow_jax.reflow.teacher import Flow
from proreflow_jax.runtime import files

log = logging.getLogger(__name__)
CARD = "reflow.json"
SCHEDULER = {  # with these a ddim_eps or ddim_v student of N windows in N steps is the stock DDIMScheduler, exactly
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "thresholding": False,
    "steps_offset": 1,
    "rescale_betas_zero_snr": False,
}
BETAS = ("_diffusers_version", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")


def export(config: ConfigDict, stage: int, out: str, check: bool, overwrite: bool) -> None:
    """The verb: one stage to a folder."""
    experiment = open_experiment(config)
    chosen = find_stage(experiment.stages, stage)
    target = Path(out) if out else experiment.run / "export" / chosen.folder.name
    if check:  # torch and diffusers are an extra: find out before anything is written
        from proreflow_jax import replay
    if not check or overwrite or not target.exists():
        run_stage(experiment, chosen, target, overwrite, again=not out)
    if check:
        replay.check(experiment, chosen, target)


def run_stage(experiment: Experiment, stage: Stage, target: Path, overwrite: bool = False, again: bool = True) -> None:
    """Writes the folder; with `again`, one that already holds this very student is left as it is.

    Raises ValueError if the folder holds something else, or if the student's reading has no stock scheduler.
    """
    check_export(experiment.config)
    student = load_weights(experiment, stage)
    if again and not overwrite and (target / CARD).is_file() and files.read_json(target / CARD)["digest"] == student.digest:
        log.info("%s: is there", target)
        return
    base = experiment.base
    with files.atomic_folder(target, overwrite) as draft:
        shutil.copytree(
            base.folder, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet", "scheduler", ".*", "README*")
        )
        (draft / "unet").mkdir()
        shutil.copy(base.folder / "unet" / "config.json", draft / "unet" / "config.json")
        tensors = weights.to_torch(to_host(student.params), np.float32)
        weights.save_tensors(draft / "unet" / "diffusion_pytorch_model.safetensors", tensors)
        (draft / "scheduler").mkdir()
        files.write_json(draft / "scheduler" / "scheduler_config.json", scheduler_config(base.scheduler, student.flow))
        _set_scheduler(draft / "model_index.json")
        card = {"windows": stage.windows, "digest": student.digest, "guidance": experiment.config.pairs.guidance}
        files.write_json(draft / CARD, {**card, "flow": student.flow._asdict(), "base": str(base.folder)})
    log.info("%s: %d-window student for diffusers, num_inference_steps=%d", target, stage.windows, stage.windows)


def scheduler_config(base: dict, flow: Flow) -> dict:
    """scheduler_config.json of the stock DDIM scheduler on the base model's betas, for a student of this reading."""
    return {**{name: base[name] for name in BETAS if name in base}, **SCHEDULER, "prediction_type": JUMPS[flow.prediction]}


def _set_scheduler(path: Path) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    files.write_json(path, {**index, "scheduler": ["diffusers", "DDIMScheduler"]})


if __name__ == "__main__":
    options = {
        "stage": (2, "windows of the stage to export"),
        "out": ("", "folder to write; empty: <run>/export/stage-N"),
        "check": (False, "also sample it in diffusers from the same noise (pip install 'proreflow_jax[export-check]')"),
        "overwrite": (False, "replace an existing folder"),
    }
    cli.start(export, __doc__, "configs/digits.py", options)
