"""The base model's pretraining at toy size: a folder that stock diffusers opens and draws from; never overwrites."""

from pathlib import Path

import numpy as np
import pytest
from verb import CONFIG, run

from proreflow_jax.data import digits

TOY = {
    "data.resolution": 8,
    "data.shift": 0,
    "vae.block_out_channels": "(8, 8)",
    "vae.norm_num_groups": 4,
    "vae.steps": 2,
    "vae.optimizer.warmup_steps": 0,
    "unet.block_out_channels": "(8, 16)",
    "unet.norm_num_groups": 4,
    "unet.attention_head_dim": 2,
    "text.hidden_size": 8,
    "text.num_hidden_layers": 1,
    "text.num_attention_heads": 2,
    "text.intermediate_size": 16,
    "text.merges": 20,
    "diffusion.steps": 2,
    "diffusion.optimizer.warmup_steps": 0,
    "samples.rows": 0,
}


@pytest.mark.slow  # three compilations of a training step
def test_pretraining_writes_a_folder_that_diffusers_opens(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    digits.write_dataset(tmp_path / "data", 8, seed=0)
    fields = TOY | {"root": tmp_path / "runs", "data.path": tmp_path / "data"}
    words = [f"--config={CONFIG.with_name('digits_base.py')}", *(f"--config.{name}={value}" for name, value in fields.items())]
    ended = run("pretrain", *words, f"--out={tmp_path / 'base'}")
    assert ended.code == 0, ended.err
    page, run_folder = "report.html", tmp_path / "runs" / "digits_base"
    assert ended.err.startswith(f"page: {run_folder / page}") and "<b>finished</b>" in (run_folder / page).read_text()
    assert not (run_folder / "samples").exists()

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a handwritten seven"], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape == (1, 8, 8, 3) and np.isfinite(images).all()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*")}
    again = run("pretrain", *words, f"--out={tmp_path / 'base'}")
    assert again.code == 2 and str(tmp_path / "base") in again.err and len(again.err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "base").rglob("*")} == before
