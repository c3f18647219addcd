"""A small rectified flow from scratch: the draw's laws, a folder that both open, resumed as if never stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_flow
from ml_collections import ConfigDict
from tiny import quick_jit
from tiny_flow import toy
from verb import run

from configs import digits_base, digits_flow_base
from proreflow_jax import UserError
from proreflow_jax.data import digits
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import RectifiedFlow, from_config
from proreflow_jax.jobs import pretrain_networks
from proreflow_jax.jobs.pretrain import pretrain
from proreflow_jax.pretrained import pipeline
from proreflow_jax.reflow import flow_pretraining, loop, sampler
from proreflow_jax.run import check_config, nearest_config

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy's folder."""
    return tiny_flow.write_model(tmp_path_factory.mktemp("flow") / "model")


@pytest.fixture(scope="module")
def diffusion(model: Path) -> pretrain_networks.Diffusion:
    """A toy's networks."""
    return pretrain_networks.make_diffusion(toy(model), model)


@pytest.fixture(scope="module")
def drawn() -> Callable[..., dict[str, np.ndarray]]:
    """A function density, shift -> what is drawn of 4000 examples whose latents are 3 +- 0.5, three in ten prompts dropped."""
    ids = jnp.arange(1, 3, dtype=jnp.int32)[None, :, None] + jnp.zeros((4000, 2, 3), jnp.int32)
    batch = {"mean": jnp.full((4000, 1, 1, 2), 3.0), "std": jnp.full((4000, 1, 1, 2), 0.5), "ids": ids}
    rest = dict(empty=jnp.zeros(3, jnp.int32), drop=0.3)
    draw = lambda density, shift: flow_pretraining.draw_flow(
        None, batch, jax.random.key(0), schedule=RectifiedFlow(shift), density=density, **rest
    )
    return lambda mean, std, shift: jax.device_get(
        jax.jit(draw, static_argnums=1)(flow_pretraining.LogitNormal(mean, std), shift)
    )


def test_times_are_logit_normal_and_then_shifted(drawn):
    """The logit of a time is normal, and the shift adds its logarithm."""
    levels = drawn(0.5, 0.7, 3.0)["timestep"].astype(np.float64) / 1000
    logits = np.log(levels / (1 - levels)) - np.log(3.0)
    assert levels.min() > 0 and levels.max() < 1
    assert abs(logits.mean() - 0.5) < 0.04 and abs(logits.std() - 0.7) < 0.03
    assert abs(np.mean(np.abs(logits - 0.5) < 0.7) - 0.683) < 0.03  # of a normal


def test_states_lie_between_data_and_noise_and_v_is_their_difference(drawn):
    d = drawn(0.5, 0.7, 3.0)
    s = (d["timestep"] / 1000)[:, None, None, None]
    x0, eps = d["z"] - s * d["v"], d["z"] + (1 - s) * d["v"]
    assert abs(x0.mean() - 3) < 0.05 and abs(x0.std() - 0.5) < 0.03
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.03
    assert abs(np.corrcoef(x0.ravel(), eps.ravel())[0, 1]) < 0.05


def test_prompts_are_dropped_and_wordings_drawn(drawn):
    shares = np.bincount(drawn(0.5, 0.7, 3.0)["ids"][:, 0]) / 4000
    np.testing.assert_allclose(shares, [0.3, 0.35, 0.35], atol=0.03)


def test_an_untrained_flow_predicts_zero_and_its_table_of_positions_is_no_parameter(model, diffusion):
    """So the first loss is E|v|^2, and weight decay and averages leave the table alone."""
    joint = {name: jnp.full(x.shape, 0.1) for name, x in jax.eval_shape(diffusion.init, jax.random.key(0)).items()}
    zero = [name for name in joint if pretrain_networks.ZEROS.search(name.removeprefix("transformer/"))]
    assert len(zero) == 2 * (2 * 2 + 1 + 1) and "transformer/proj_out.weight" in zero
    joint |= {name: jnp.zeros_like(joint[name]) for name in zero}
    table = "pos_embed.pos_embed"
    assert f"transformer/{table}" not in joint and set(diffusion.constants) == {table}
    parts = diffusion.apart(joint)
    assert {name: set(p) for name, p in parts.items()} == {name: set(one.shapes) for name, one in diffusion.networks.items()}
    assert diffusion.join(parts).keys() == joint.keys()
    begin, loss = pretrain_networks.draw_and_loss(toy(model), diffusion, np.zeros(20, np.int32))
    batch = {"mean": jnp.zeros((4, 4, 4, 4)), "std": jnp.ones((4, 4, 4, 4)), "ids": jnp.ones((4, 1, 20), jnp.int32)}
    examples = begin(None, batch, jax.random.key(1))
    value, _ = quick_jit(loss)(joint, examples)
    np.testing.assert_allclose(value, jnp.mean(examples["v"] ** 2), rtol=1e-6)


def test_its_folder_opens_as_the_schedule_and_the_networks_that_were_trained(model, diffusion):
    opened = pipeline.load_pipeline(model)
    assert opened.denoiser_name == "transformer" and from_config(opened.scheduler) == RectifiedFlow(2.0)
    assert opened.latent_shape == (4, 4, 4) and opened.scaling == 2.0 and opened.vae.config["shift_factor"] == 0.25
    shapes = {name: one.shapes for name, one in opened.networks.items() if name != "vae"}
    assert shapes == {name: one.shapes for name, one in diffusion.networks.items()}
    np.testing.assert_array_equal(
        opened.params["transformer"]["pos_embed.pos_embed"], diffusion.constants["pos_embed.pos_embed"]
    )
    ids = opened.tokenizer.encode(["the digit 3"])
    assert ids.shape == (1, 20) and ids[0, :10].tolist() == ids[0, 10:].tolist()
    index = json.loads((model / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


def test_latents_of_a_flow_are_centred(tmp_path):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(3, 2, (50, 4, 4, 4)), np.full((50, 4, 4, 4), 0.5)
    factors = pretrain_networks.latent_factors(toy(tmp_path), mean, std)
    latents = (mean + std * rng.standard_normal(mean.shape) - factors["shift_factor"]) * factors["scaling_factor"]
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.02
    assert set(pretrain_networks.latent_factors(digits_base.get_config(), mean, std)) == {"scaling_factor"}


def test_a_config_is_of_one_kind_and_beside_those_of_its_kind(tmp_path):
    assert nearest_config.compare(check_config.flat(digits_flow_base.get_config())) == ("digits_flow_base", [])
    assert set(nearest_config.defaults(nearest_config.PRETRAINING)) == {"digits_base", "emoji_base"}
    both = ConfigDict({"unet": {}, "transformer": {}})
    for config, line in ((both, "has unet and transformer"), (ConfigDict({"transformer": {}}), "--config lacks flow")):
        with pytest.raises(UserError, match=line):
            pretrain_networks.kind(config)
    path = tmp_path / "mine.py"
    lines = ("from configs.digits_flow_base import get_config as whole", "def get_config():", " c = whole()")
    path.write_text("\n".join([*lines, " del c.flow.logit_std", " return c"]))
    ended = run("pretrain", f"--config={path}", "--out=x")
    assert ended.code == 2 and "--config lacks flow.logit_std" in ended.err and len(ended.err.splitlines()) == 1


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.stem != "reflow"}


@pytest.mark.slow  # three programs are compiled, twice
def test_a_flow_s_training_may_be_stopped_gone_on_with_and_looked_into(tmp_path, monkeypatch):
    digits.write_dataset(tmp_path / "data", 8, seed=0)
    pretrain(toy(tmp_path, "whole"), str(tmp_path / "whole"))

    def killed(done: int, values: dict) -> None:
        if done == 3 and "kl" not in values:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "check_finite", killed)
        pretrain(toy(tmp_path, "cut"), str(tmp_path / "resumed"))
    pretrain(toy(tmp_path, "cut"), str(tmp_path / "snapshot"), snapshot=True)
    pretrain(toy(tmp_path, "cut"), str(tmp_path / "resumed"))
    one, other, early = (weights(tmp_path / name) for name in ("whole", "resumed", "snapshot"))
    assert one == other and {name.split("/")[0] for name in one if one[name] != early[name]} == {
        "transformer", "text_encoder", "text_encoder_2"
    }  # fmt: skip
    page = (tmp_path / "runs" / "cut" / "report.html").read_text()
    assert "<b>finished</b>" in page and "--config=digits_flow_base" in page and "was not drawn" not in page
    drawn = [path.name for path in (tmp_path / "runs" / "cut" / "samples" / "diffusion").iterdir()]
    assert sorted(drawn) == ["step-00000002.png", "step-00000004.png"]
    pretrain(toy(tmp_path, "other", start=str(tmp_path / "whole")), str(tmp_path / "onward"))
    onward = weights(tmp_path / "onward")
    assert {name.split("/")[0] for name in one if one[name] != onward[name]} == {
        "transformer", "text_encoder", "text_encoder_2"
    }  # fmt: skip
    check_in_diffusers(tmp_path / "whole")


def check_in_diffusers(folder: Path) -> None:
    """Stock StableDiffusion3Pipeline opens the folder and draws as this package does."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    ours = pipeline.load_pipeline(folder)
    prompts = ["a handwritten seven", "the digit 3"]
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    how = dict(num_inference_steps=2, guidance_scale=1.0, output_type="latent", height=8, width=8)
    theirs = pipe(prompts, latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)), sigmas=[1.0, 0.5], **how).images.numpy()
    context = ours.condition(ours.text, ours.tokenizer.encode(prompts))
    drawn = sampler.sample_latents(
        ours.params["transformer"], noise, context, context, denoiser=ours.denoiser, schedule=from_config(ours.scheduler),
        flow=Parameterization("flow"), steps=2, guidance=1,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(drawn).transpose(0, 3, 1, 2), theirs, atol=1e-4)
