"""The emoji's base model at toy size: resumed as if never stopped, taken out at any time, gone on with from a folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from configs.common import asset
from configs.emoji_base import get_config
from proreflow_jax import load
from proreflow_jax.data import emoji, emoji_packages, training_set
from proreflow_jax.evaluation.page.markup import number
from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.jobs.pretrain import pretrain
from proreflow_jax.pretrained import pipeline
from proreflow_jax.reflow import loop, pretraining
from proreflow_jax.run import check_config
from proreflow_jax.run.stages import seed_key
from proreflow_jax.storage import sealed

pytestmark = pytest.mark.usefixtures("quick")
MODEL, STUDENT = Path(asset("emoji")), Path(asset("emoji_student"))
TOY = {
    "data.resolution": 8,
    "vae.block_out_channels": (8, 8),
    "vae.norm_num_groups": 4,
    "vae.steps": 2,
    "vae.batch": 8,
    "vae.optimizer.warmup_steps": 0,
    "unet.block_out_channels": (8,),
    "unet.down_block_types": ("DownBlock2D",),
    "unet.up_block_types": ("UpBlock2D",),
    "unet.norm_num_groups": 4,
    "unet.attention_head_dim": 2,
    "text.hidden_size": 8,
    "text.num_hidden_layers": 1,
    "text.num_attention_heads": 2,
    "text.intermediate_size": 16,
    "text.merges": 20,
    "diffusion.steps": 4,
    "diffusion.batch": 8,
    "diffusion.optimizer.warmup_steps": 1,
    "samples.rows": 1,
    "samples.columns": 2,
    "samples.steps": 2,
    "checkpoint_every": 2,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 20 pictures; models and runs go beside it."""
    folder = tmp_path_factory.mktemp("emoji")
    rng = np.random.default_rng(0)
    labels = ("waffle", "octopus", "glasses", "bee", "tree", "sun", "moon", "star", "cat", "dog")
    rows = [{"hex": f"{i:x}", "label": label, "tags": ["thing"], "group": "objects"} for i, label in enumerate(labels)]
    arrays, table = emoji.paths(folder, 8)
    images = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    np.savez(arrays, images=images, style=np.repeat([0, 1], 10), concept=np.tile(np.arange(10), 2))
    table.write_text(json.dumps({"styles": ["noto", "twemoji"], "concepts": rows}))
    return folder


def toy(folder: Path, name: str, **fields: object) -> ConfigDict:
    paths = {"name": name, "root": str(folder / "runs"), "data.path": str(folder)}
    return check_config.changed(get_config(), TOY | paths | {key.replace("__", "."): value for key, value in fields.items()})


def weights(folder: Path) -> dict[str, bytes]:
    """All files but the record, which names the run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != sealed.RECORD]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def moved(one: Path, other: Path) -> set[str]:
    """Components whose files differ."""
    a, b = weights(one), weights(other)
    assert set(a) == set(b)
    return {name.split("/")[0] for name in a if a[name] != b[name]}


def check_page(run: Path, *words: str) -> None:
    """Its newest numbers are those of metrics.jsonl; it has these words, and loads nothing from elsewhere."""
    page = (run / "report.html").read_text()
    trained = [name for name in ("vae", "diffusion") if (run / name).is_dir()]
    lines = {name: json.loads((run / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in trained}
    keys = [(name, key) for name in trained for key in ("loss", "error", "kl") if key in lines[name]]
    assert re.findall(r"</i>mean <b>(.*?)</b>", page) == [number(lines[name][key]) for name, key in keys]
    assert [word for word in words if word not in page] == []
    addresses = re.findall(r"<[^>]* src=['\"]?([^'\" >]+)", page)
    assert addresses and all(address.startswith("data:") for address in addresses) and page.count("<script") == 1


def pictures(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in weights(run).items() if name.startswith("samples/")}


def killed_at(step: int) -> Callable[[int, dict], None]:
    """Stands in for the loop's look at a diffusion step's numbers; those of the autoencoder have a "kl"."""

    def check(done: int, values: dict) -> None:
        if done == step and "kl" not in values:
            raise KeyboardInterrupt

    return check


@pytest.mark.slow  # five programs are compiled
def test_a_training_may_be_stopped_gone_on_with_and_looked_into(folder, monkeypatch):
    pretrain(toy(folder, "whole"), str(folder / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "check_finite", killed_at(3))
        pretrain(toy(folder, "cut"), str(folder / "resumed"))
    check_page(folder / "runs" / "cut", "diffusion: 2 of 4 steps", "random weights", "written at the end")
    pretrain(toy(folder, "cut"), str(folder / "snapshot"), snapshot=True)
    assert moved(folder / "snapshot", folder / "whole") == {"unet", "text_encoder"}
    pretrain(toy(folder, "cut"), str(folder / "resumed"))
    assert weights(folder / "resumed") == weights(folder / "whole")
    check_page(folder / "runs" / "cut", "<b>finished</b>", "--config=emoji_base", str(folder / "resumed"))
    painted = pictures(folder / "runs" / "cut")
    assert painted == pictures(folder / "runs" / "whole") and len(painted) == 1 + 1 + 2

    model = pipeline.load_pipeline(folder / "whole")
    assert model.latent_shape == (4, 4, 16) and model.scaling > 0
    assert all(row.author in (folder / "whole" / "README.md").read_text() for row in emoji_packages.STYLES)
    lines = (folder / "whole" / "prompts.txt").read_text().splitlines()
    assert len(lines) == (~emoji.hold_out(emoji.load_emoji(folder, 8).pictures)).sum() and all(lines)

    pretrain(toy(folder, "other", start=str(folder / "whole")), str(folder / "onward"))
    assert moved(folder / "whole", folder / "onward") == {"unet", "text_encoder"}
    loaded = pipeline.load_pipeline(folder / "onward").params["unet"]
    apart = max(float(np.abs(loaded[name] - value).max()) for name, value in model.params["unet"].items())
    assert 0 < apart < 5e-3  # a few small steps
    check_page(folder / "runs" / "other", "<b>finished</b>", "taken over from the start", str(folder / "whole"))


def test_what_does_not_fit_is_said_in_a_line(folder):
    with pytest.raises(FileNotFoundError, match="snapshot"):
        pretrain(toy(folder, "nothing"), str(folder / "no"), snapshot=True)
    with pytest.raises(ValueError, match=r"data\.kind"):
        pretrain(toy(folder, "kind", data__kind="stones"), str(folder / "no"))


def test_every_wording_is_drawn_anew():
    ids = jnp.arange(4)[None, :, None] + 10 * jnp.arange(2000)[:, None, None]
    first, second = (pretraining.draw_wording(ids, jax.random.key(seed))[:, 0] for seed in (0, 1))
    np.testing.assert_array_equal(first // 10, np.arange(2000))
    assert np.bincount(first % 10).min() > 400
    assert 0.2 < float((first == second).mean()) < 0.3


def test_the_weight_makes_errors_of_clean_pictures_count_alike():
    """Error of eps x weight = error of x0 x min(SNR, most)."""
    schedule = make_schedule("scaled_linear", 0.00085, 0.012)
    batch = {"mean": jnp.zeros((500, 1, 1, 1)), "std": jnp.ones((500, 1, 1, 1)), "ids": jnp.zeros((500, 1, 3), jnp.int32)}
    draw = lambda most: pretraining.draw_noise(
        None, batch, jax.random.key(0), schedule=schedule, empty=jnp.zeros(3, jnp.int32), drop=0.1, most_snr=most
    )
    weighted, plain = draw(5.0), draw(0.0)
    assert "weight" not in plain
    np.testing.assert_array_equal(weighted["z"], plain["z"])
    snr = jnp.exp(schedule.log_snr((weighted["timestep"] + 1) / 1000))
    np.testing.assert_allclose(weighted["weight"] * snr, jnp.minimum(snr, 5.0), rtol=1e-3)


def test_the_model_that_comes_along_is_what_its_page_says():
    page, data = (MODEL / "README.md").read_text(), get_config().data
    assert emoji_packages.credits_table() in page
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 40e6
    assert (MODEL / "prompts.txt").read_text().splitlines() == training_set.known_prompts(data)
    hidden = emoji.hold_out(emoji.load_emoji(data.path, data.resolution).pictures)
    assert f"{(~hidden).sum():,} pictures" in page and f"{hidden.sum()} more held out" in page


@pytest.mark.parametrize(("model", "steps", "guidance"), [(MODEL, 4, 3.0), (STUDENT, 2, 1.0)])
def test_diffusers_draws_with_them_what_this_package_draws(model, steps, guidance):
    ours, prompt = load(model), "an octopus, fluent 3d style"
    noise = jax.random.normal(seed_key(3), (1, *ours.base.latent_shape))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    start = torch.tensor(np.moveaxis(np.asarray(noise), -1, 1))
    theirs = pipe(prompt, latents=start, num_inference_steps=steps, guidance_scale=guidance, output_type="latent").images
    mine = ours(prompt, steps=steps, guidance=guidance, seed=3, output="latent")
    np.testing.assert_allclose(np.moveaxis(mine, -1, 1), theirs, atol=1e-3)


def test_the_student_that_comes_along_is_small_and_of_two_windows():
    assert sum(path.stat().st_size for path in STUDENT.rglob("*") if path.is_file()) < 25e6
    assert load(STUDENT).flow.windows == 2
