"""The scheduler of an exported folder against our own sampler, and inside diffusers' stock pipelines."""

import ast
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tiny import quick_jit  # noqa: E402

from proreflow_jax.exports import windowed_scheduler  # noqa: E402
from proreflow_jax.exports.windowed_scheduler import WindowedFlowScheduler  # noqa: E402
from proreflow_jax.flow import schedule, solvers, windows  # noqa: E402
from proreflow_jax.flow.parameterization import Parameterization  # noqa: E402
from proreflow_jax.flow.solvers import make_step  # noqa: E402

torch.set_num_threads(1)  # more cost more than they bring in networks this small
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISE = schedule.make_schedule(**BETAS)
PREDICTIONS = [
    ("ddim_eps", "linear"),
    ("ddim_eps", "first_order"),
    ("diff_eps", "linear"),
    ("velocity", "linear"),
    ("ddim_v", "linear"),
    ("ddim_v", "first_order"),
]
DIGITS = Path(windowed_scheduler.__file__).parent.parent / "assets" / "digits"
LATENT = (1, 4, 8, 8)
MIX = np.random.default_rng(5).standard_normal((4, 4)).astype(np.float32)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def toy_jax(z: jax.Array, t: jax.Array) -> jax.Array:
    """A network of one layer that knows its timestep; NHWC."""
    return jnp.tanh(z @ MIX + jnp.cos(NOISE.timestep(t) / 200)[:, None, None, None])


def toy_torch(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The same network, NCHW."""
    return torch.tanh(torch.einsum("bchw,cd->bdhw", z, torch.from_numpy(MIX)) + torch.cos(timestep.float() / 200))


def run(scheduler: diffusers.SchedulerMixin, z: np.ndarray, steps: int) -> np.ndarray:
    """What a pipeline does: every timestep in turn."""
    scheduler.set_timesteps(steps)
    z = torch.from_numpy(z)
    for t in scheduler.timesteps:
        z = scheduler.step(toy_torch(scheduler.scale_model_input(z, t), t), t, z, return_dict=False)[0]
    return z.numpy()


def nhwc(z: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(z), 1, -1)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("prediction", "path"), PREDICTIONS)
def test_a_walk_is_our_samplers(prediction, path, n):
    """Ours is one program for three walks: it goes on where a shorter one has ended, which is what is compared."""
    z, step = draw(2, 4, 2, 2), make_step(Parameterization(prediction, n, path), NOISE, toy_jax)
    walk = quick_jit(lambda z, nodes: solvers.solve(step, z, nodes, keep=True)[1])
    for steps in (n, 2 * n, 3 * n):
        nodes = np.pad(windows.sampling_nodes(steps, n).astype(np.float32), (0, 3 * n - steps))
        expected = walk(nhwc(z), nodes)[steps]
        found = run(WindowedFlowScheduler(**BETAS, windows=n, prediction=prediction, path=path), z, steps)
        np.testing.assert_allclose(nhwc(found), expected, atol=1e-4, rtol=1e-5)


def test_ddim_v_is_ddim_eps_of_the_epsilon_it_means():
    z, out = (torch.from_numpy(draw(1, 4, 2, 2, seed=i)) for i in range(2))
    for path in ("linear", "first_order"):
        v, eps = (WindowedFlowScheduler(**BETAS, prediction=p, path=path) for p in ("ddim_v", "ddim_eps"))
        v.set_timesteps(9)
        eps.set_timesteps(9)
        for t in v.timesteps:
            bar = v.alphas_cumprod[t]
            meant = bar.sqrt() * out + (1 - bar).sqrt() * z
            torch.testing.assert_close(v.step(out, t, z).prev_sample, eps.step(meant, t, z).prev_sample, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_a_step_a_window_is_stock_ddim(n):
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
    z = draw(2, 4, 2, 2)
    expected = run(diffusers.DDIMScheduler(**BETAS, **options), z, n)
    np.testing.assert_allclose(run(WindowedFlowScheduler(**BETAS, windows=n), z, n), expected, atol=2e-5 * abs(expected).max())
    v = run(diffusers.DDIMScheduler(**BETAS, **options, prediction_type="v_prediction"), z, n)
    np.testing.assert_allclose(run(WindowedFlowScheduler(**BETAS, windows=n, prediction="ddim_v"), z, n), v, atol=1e-4)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_the_table_and_the_nodes_are_ours(name):
    found = WindowedFlowScheduler(beta_schedule=name)
    expected = schedule.make_schedule(name, 0.00085, 0.012)
    np.testing.assert_array_equal(found.alphas_cumprod, expected.alphas_cumprod.astype(np.float32))
    for n, steps in ((1, 1), (4, 4), (4, 7), (8, 50), (5, 999), (1000, 1000)):
        np.testing.assert_array_equal(windowed_scheduler.walk(steps, n) / 1000, windows.sampling_nodes(steps, n))
        scheduler = WindowedFlowScheduler(windows=n)
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(scheduler.timesteps, NOISE.timestep(windows.sampling_nodes(steps, n)[:-1]))
        assert scheduler.timesteps.dtype == torch.int64


def test_coefficients_stay_finite_on_every_walk():
    for prediction, path in PREDICTIONS:
        for n in (1, 8, 1000):
            points = windowed_scheduler.walk(1000, n)
            assert np.isfinite(windowed_scheduler.moves(prediction, path, NOISE.alphas_cumprod, points, n)).all()


@pytest.mark.parametrize("steps", [3, 0, 1001])
def test_a_wrong_step_count_is_refused_as_the_sampler_does(steps):
    with pytest.raises(ValueError) as ours:
        windows.sampling_nodes(steps, 4)
    with pytest.raises(ValueError) as theirs:
        WindowedFlowScheduler(windows=4).set_timesteps(steps)
    said, mend = str(theirs.value).split("; ")
    assert "\n" not in said and said == str(ours.value).split("; ")[0] and mend == "change num_inference_steps"


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows": 3},
        {"num_train_timesteps": 500},
        {"prediction": "epsilon"},
        {"path": "curved"},
        {"prediction": "velocity", "path": "first_order"},
        {"beta_schedule": "sigmoid"},
    ],
)
def test_a_wrong_config_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))) as error:
        WindowedFlowScheduler(**wrong)
    assert "\n" not in str(error.value)


def test_a_step_needs_a_node_of_the_walk():
    scheduler, z = WindowedFlowScheduler(windows=4), torch.zeros(1, 4, 2, 2)
    for steps in (None, 4):
        if steps:
            scheduler.set_timesteps(steps)
        with pytest.raises(ValueError, match="timestep 998"):
            scheduler.step(z, 998, z)
    with pytest.raises(ValueError, match="timesteps 1000"):
        scheduler.add_noise(z, z, torch.tensor([1000]))


def test_a_step_depends_on_its_timestep_alone_and_is_counted():
    scheduler, z = WindowedFlowScheduler(**BETAS, windows=2), torch.from_numpy(draw(1, 4, 2, 2))
    scheduler.set_timesteps(6)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    once = [scheduler.step(z, t, z, eta=0.0, generator=None).prev_sample for t in scheduler.timesteps]
    assert scheduler.step_index == 6
    scheduler.set_begin_index(3)
    again = scheduler.step(z, int(scheduler.timesteps[3]), z).prev_sample
    assert (scheduler.begin_index, scheduler.step_index) == (3, 4) and torch.equal(again, once[3])
    scheduler.set_timesteps(6)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_float32_or_wider_and_comes_back_in_the_samples_type(dtype):
    scheduler = WindowedFlowScheduler(**BETAS, windows=4, prediction="ddim_v")
    scheduler.set_timesteps(8)
    z, out = (torch.from_numpy(draw(2, 4, 2, 2, seed=i)).to(dtype) for i in range(2))
    t = torch.tensor([999, 0])
    for method, narrow in (("step", (out, 999, z)), ("add_noise", (z, out, t)), ("get_velocity", (z, out, t))):
        wide = [x.double() if isinstance(x, torch.Tensor) and x is not t else x for x in narrow]
        found, exact = (getattr(scheduler, method)(*arguments) for arguments in (narrow, wide))
        found, exact = (getattr(x, "prev_sample", x) for x in (found, exact))
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), atol=0, rtol=2 * torch.finfo(dtype).eps)


def test_noise_levels_are_stock_ddims():
    x, noise = (torch.from_numpy(draw(3, 4, 2, 2, seed=i)) for i in range(2))
    ours, stock = WindowedFlowScheduler(**BETAS), diffusers.DDIMScheduler(**BETAS)
    for t in (torch.tensor([0, 499, 999]), torch.tensor([249]), torch.tensor(749)):
        torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), atol=1e-5, rtol=1e-5)


def test_the_config_survives_every_round_trip(tmp_path):
    chosen = dict(beta_start=0.001, beta_end=0.02, beta_schedule="linear", windows=8, prediction="ddim_v", path="first_order")
    scheduler = WindowedFlowScheduler(**chosen)
    scheduler.save_pretrained(tmp_path)
    for again in (WindowedFlowScheduler.from_config(scheduler.config), WindowedFlowScheduler.from_pretrained(tmp_path)):
        assert {name: again.config[name] for name in chosen} == chosen
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert scheduler.compatibles == []
    assert (tmp_path / "windowed_scheduler.py").read_bytes() == Path(windowed_scheduler.__file__).read_bytes()
    from_stock = WindowedFlowScheduler.from_config(diffusers.DDIMScheduler(**BETAS).config, windows=2, prediction="velocity")
    assert from_stock.config.beta_end == 0.012 and from_stock.config.windows == 2
    to_stock = diffusers.DDIMScheduler.from_config(WindowedFlowScheduler().config)  # our defaults are not DDIM's
    assert (to_stock.config.beta_schedule, to_stock.config.beta_end) == ("scaled_linear", 0.012)


@pytest.mark.parametrize(("kind", "reading"), [("epsilon", "ddim_eps"), ("v_prediction", "ddim_v")])
def test_a_stock_schedulers_config_says_how_the_student_is_read(kind, reading):
    """A v_prediction student read as epsilon would draw noise."""
    stock = diffusers.DDIMScheduler(**BETAS, prediction_type=kind)
    ours = WindowedFlowScheduler.from_config(stock.config, windows=4)
    assert (ours.config.prediction, ours.config.prediction_type) == (reading, kind)
    assert WindowedFlowScheduler.from_config(ours.config).config.prediction == reading
    assert diffusers.DDIMScheduler.from_config(ours.config).config.prediction_type == kind
    for prediction in ("velocity", "diff_eps", reading):
        assert WindowedFlowScheduler.from_config(stock.config, prediction=prediction).config.prediction == prediction
    other = {"ddim_eps": "ddim_v", "ddim_v": "ddim_eps"}[reading]
    with pytest.raises(ValueError, match=f"'{other}' contradicts prediction_type '{kind}'"):
        WindowedFlowScheduler.from_config(stock.config, prediction=other)


def test_a_prediction_type_that_no_student_has_is_refused():
    with pytest.raises(ValueError, match="prediction_type 'sample', must be one of epsilon, v_prediction"):
        WindowedFlowScheduler.from_config(diffusers.DDIMScheduler(**BETAS, prediction_type="sample").config)


def test_the_file_stands_alone():
    tree = ast.parse(Path(windowed_scheduler.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "numpy", "diffusers"}


@pytest.fixture(scope="module")
def pipe() -> diffusers.StableDiffusionPipeline:
    """The embedded model behind our scheduler, 4 windows."""
    made = diffusers.StableDiffusionPipeline.from_pretrained(DIGITS)
    made.scheduler = WindowedFlowScheduler.from_config(made.scheduler.config, windows=4)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe: Callable, steps: int = 8, **inputs: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "np"} | inputs
    return np.asarray(pipe("a handwritten seven", **options)[0])


def test_stock_pipelines_run(pipe):
    quiet = lambda made: made.set_progress_bar_config(disable=True) or made
    image = torch.from_numpy(np.random.default_rng(1).random((1, 3, 32, 32), dtype=np.float32))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    drawn = call(pipe)
    painted = call(quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)), image=image, strength=0.6)
    filled = call(quiet(diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe)), image=image, mask_image=mask)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
    controlled = call(quiet(diffusers.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)), image=image)
    for made in (drawn, painted, filled, controlled):
        assert made.shape == (1, 32, 32, 3) and np.isfinite(made).all() and made.std() > 0.01
    np.testing.assert_allclose(controlled, drawn, atol=1e-5)  # a fresh ControlNet adds zeros


def test_image_to_image_of_no_step_is_refused_in_words(pipe):
    painter = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.from_numpy(draw(*LATENT, seed=3))
    with pytest.raises(ValueError, match="strength x num_inference_steps must be at least 1"):
        call(painter, 4, image=image, strength=0.2, guidance_scale=1.0, output_type="latent")
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="strength x num_inference_steps must be at least 1"):
        WindowedFlowScheduler(**BETAS).add_noise(image, image, empty)


@cache
def moved(student: Parameterization) -> Callable:
    """The sampler's step, with what the network said at it."""
    return quick_jit(lambda z, out, t, u: make_step(student, NOISE, lambda z, t: out)(z, t, u, None)[0])


@pytest.mark.parametrize("strength", [0.75, 0.4, 1.0])
@pytest.mark.parametrize(("prediction", "path"), [("ddim_eps", "linear"), ("ddim_v", "first_order"), ("diff_eps", "linear")])
def test_image_to_image_is_noise_and_then_our_steps(pipe, strength, prediction, path):
    steps, n = 8, 4
    image = torch.from_numpy(draw(*LATENT, seed=3))
    painter = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    painter.scheduler = WindowedFlowScheduler(**BETAS, windows=n, prediction=prediction, path=path)
    painter.set_progress_bar_config(disable=True)
    found = call(painter, steps, image=image, strength=strength, guidance_scale=1.0, output_type="latent")

    # by hand: the same noise at the first node, then the sampler's step from node to node
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0)).numpy()
    nodes = windows.sampling_nodes(steps, n)[steps - int(steps * strength) :].astype(np.float32)
    context = pipe.encode_prompt("a handwritten seven", "cpu", 1, False)[0]
    a, s = float(NOISE.alpha(nodes[0])), float(NOISE.sigma(nodes[0]))
    z = nhwc(a * image.numpy() + s * noise)
    for t, u in zip(nodes[:-1], nodes[1:], strict=True):
        with torch.no_grad():
            nchw = torch.from_numpy(np.moveaxis(z, -1, 1).copy())
            out = pipe.unet(nchw, round(1000 * float(t)) - 1, context).sample.numpy()
        z = np.asarray(moved(Parameterization(prediction, n, path))(z, nhwc(out), np.array([t]), np.array([u])))
    np.testing.assert_allclose(nhwc(found), z, atol=1e-4, rtol=1e-4)


@pytest.fixture
def folders(pipe, tmp_path, monkeypatch) -> list[Path]:
    """Two pipeline folders that carry the scheduler: one laid by hand, one that the pipeline saved."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    by_hand, saved = tmp_path / "by_hand", tmp_path / "saved"
    shutil.copytree(DIGITS, by_hand)
    index = json.loads((by_hand / "model_index.json").read_text())
    index["scheduler"] = ["windowed_scheduler", "WindowedFlowScheduler"]
    (by_hand / "model_index.json").write_text(json.dumps(index))
    shutil.copy(windowed_scheduler.__file__, by_hand / "scheduler")
    config = {"_class_name": "WindowedFlowScheduler", "windows": 4, **BETAS}
    (by_hand / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    pipe.save_pretrained(saved)
    return [by_hand, saved]


def test_a_folder_that_carries_the_file_opens(pipe, folders, tmp_path):
    expected = call(pipe, 6)
    for folder in folders:
        opened = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert type(opened) is diffusers.StableDiffusionPipeline
        assert type(opened.scheduler).__name__ == "WindowedFlowScheduler"
        assert not isinstance(opened.scheduler, WindowedFlowScheduler)  # the folder's own class, not ours
        opened.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(call(opened, 6), expected, atol=1e-6)
        with pytest.raises(ValueError, match="trust_remote_code"):
            diffusers.DiffusionPipeline.from_pretrained(folder)
    opened.save_pretrained(tmp_path / "again")  # a folder that came from a folder
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.scheduler.config.windows == 4
