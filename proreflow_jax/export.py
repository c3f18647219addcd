"""Write a stage's student for other tools: a diffusers folder, a single file, a LoRA, or a delta to merge elsewhere.

--form=diffusers    the base model's folder with the student's UNet and the scheduler it is read by (default)
--form=single-file  UNet, VAE and text encoder in one .safetensors under the names that A1111 and ComfyUI read
--form=lora         student minus base as a LoRA of --rank, by truncated SVD, for diffusers, A1111 and ComfyUI
                    (with --for=diffusers for diffusers alone, in its own names)
--form=delta        student minus base, for `merge` onto another fine-tune of the same base
Each is a folder with reflow.json and README.md (base, stages, digest, settings) and the scheduler's config. --check replays it.
"""

from ml_collections import ConfigDict

from proreflow_jax.run import cli
from proreflow_jax.storage import paths


def export(
    config: ConfigDict,
    *,
    stage: int,
    out: str,
    form: str,
    for_: str,
    dtype: str,
    rank: int,
    scheduler: str,
    check: bool,
    overwrite: bool,
) -> None:
    """The verb: one stage to a folder."""
    from proreflow_jax.exports.card import CARD, PAGE
    from proreflow_jax.exports.formats import choose_format
    from proreflow_jax.exports.place import OUT, check_out
    from proreflow_jax.exports.write import check_copies, export_stage
    from proreflow_jax.run.open import open_experiment
    from proreflow_jax.run.stages import find_stage

    export_format = choose_format(form, for_, dtype, rank, scheduler)
    if out:
        check_out(config, paths.parse_path(out, OUT))
    experiment = open_experiment(config)
    chosen = find_stage(experiment.stages, stage)
    check_copies(experiment.base.source)
    suffix = "" if form == "diffusers" else f"-{form}"
    target = paths.parse_path(out, OUT) if out else experiment.run / "export" / f"{chosen.folder.name}{suffix}"
    if check:  # torch and diffusers are an extra: find out before anything is written
        from proreflow_jax.exports import replay_in_diffusers

        cli.choose(form, tuple(replay_in_diffusers.OPENERS), "--check: --form")
    export_stage(experiment, chosen, target, overwrite, export_format)
    if check:
        copy = paths.local_copy(target)
        replay_in_diffusers.check_replay(experiment, chosen, copy)
        if copy != target:
            for name in (replay_in_diffusers.RESULT, PAGE, CARD):
                (target / name).upload(copy / name)


if __name__ == "__main__":
    options = {
        "stage": (2, "windows of the stage to export", (1, 1000)),
        "out": ("", "folder to write; empty: <run>/export/stage-N, with the form's name behind"),
        "form": ("diffusers", "diffusers, single-file, lora or delta"),
        "for": ("", "of a LoRA: diffusers, whose own names are written, every layer of which it takes; empty: most tools"),
        "dtype": ("float32", "of the tensors written: float32, float16 or bfloat16"),
        "rank": (64, "of the LoRA, capped at each layer's full rank; a student trained as a LoRA keeps its own", (1, 65536)),
        "scheduler": ("stock", "stock: diffusers' DDIM, steps = windows; windowed: ours, copied along, any steps from there"),
        "check": (False, "also sample it in diffusers from the same noise (the extra `export-check`)"),
        "overwrite": (False, "replace an export that stands there; anything else is never replaced"),
    }
    cli.start(export, __doc__, "emoji", options)
