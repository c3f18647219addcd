"""SD 1.x, 2.x and XL from diffusers through the verbs and back: distilled, exported in every form, drawn side by side.

The base models are diffusers' own (`families`); what is compared is what its stock pipelines draw with the exports.
"""

import ast
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file
from verb import CONFIG, PROMPTS, quickly, run, tiny_flags

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402

from configs import digits  # noqa: E402
from proreflow_jax.exports import formats, replay_in_diffusers, write  # noqa: E402
from proreflow_jax.flow import solvers, windows  # noqa: E402
from proreflow_jax.flow.parameterization import Parameterization  # noqa: E402
from proreflow_jax.flow.solvers import make_step  # noqa: E402
from proreflow_jax.pretrained import single_file, sources  # noqa: E402
from proreflow_jax.reflow import sampler  # noqa: E402
from proreflow_jax.reflow.pairs import make_predict, text_context  # noqa: E402
from proreflow_jax.run.check_config import field_value  # noqa: E402
from proreflow_jax.run.experiment import Experiment, load_weights  # noqa: E402
from proreflow_jax.run.open import open_experiment  # noqa: E402
from proreflow_jax.runtime import mesh  # noqa: E402
from proreflow_jax.storage.atomic import read_json  # noqa: E402

SHORT = {  # one stage of a few large steps: the student is far enough from its base to tell them apart
    "stages": "(2,)",
    "export__stages": "()",
    "train__steps": 3,
    "train__ema": 0,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-2,
    "pairs__examples": 16,
}
FIELDS = {  # of each family's run, beyond SHORT
    "v1": {"stages": "(4, 2)", "pairs__guidance": 2.0, "pairs__prompt_dropout": 0.5},
    "v2": {"student__prediction": "ddim_v"},
    "xl": {"pairs__mode": "online"},
}
each_family = pytest.mark.parametrize("family", families.FAMILIES)


class Run(NamedTuple):
    """A finished run of one family. Tests only read it."""

    family: str
    model: Path
    folder: Path

    def words(self, **fields: object) -> list[str]:
        """Its command, with fields of another value."""
        values = {"model__path": self.model} | SHORT | FIELDS[self.family] | fields
        return tiny_flags(self.folder, values.pop("model__path"), **values)

    def open(self, **fields: object) -> Experiment:
        """What its verbs see."""
        return open_experiment(_config(self.words(**fields)))


def _config(words: list[str]) -> ConfigDict:
    """The config that a verb makes of these words."""
    made = digits.get_config()
    for word in words[1:]:
        name, value = word.removeprefix("--config.").split("=", 1)
        before = field_value(made, name)
        made.update_from_flattened_dict({name: value if isinstance(before, str) else type(before)(ast.literal_eval(value))})
    return made


@pytest.fixture(scope="module", autouse=True)
def quick(programs, tmp_path_factory):
    with quickly(programs) as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)  # verbs as they are, but for XLA's optimizations
        patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))  # meshes have their own tests
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Callable[[str], Run]:
    """The finished run of a family, made once."""
    made = {}

    def once(family: str) -> Run:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = Run(family, families.write(folder / "model", family, safety=family == "v1"), folder)
            ended = run("distill", *made[family].words())
            assert ended.code == 0, ended.err
        return made[family]

    return once


@pytest.fixture(scope="module")
def exported(distilled, tmp_path_factory) -> Callable[..., tuple[Run, Path]]:
    """(run, folder) of an export that passed --check where there is one, made once."""
    made = {}

    def once(family: str, form: str = "diffusers", *more: str) -> tuple[Run, Path]:
        key = (family, form, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("exports") / "-".join(key)
            check = ["--check"] * (form != "delta")
            words = [*distilled(family).words(), "--stage=2", f"--form={form}", f"--out={made[key]}", *more, *check]
            ended = run("export", *words)
            assert ended.code == 0, ended.err
        return distilled(family), made[key]

    return once


def proof(folder: Path) -> dict[str, Any]:
    """replay.json of an export that is its student in diffusers."""
    found = read_json(folder / "replay.json")
    assert found["largest_difference"] <= replay_in_diffusers.LIMIT < found["largest_value"]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every file but a UNet's and a scheduler's, and what an export says of itself."""
    own = ("unet", "scheduler", "model_index.json", "reflow.json", "README.md", "replay.json")
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (folder / path).read_bytes() for path in found if path.parts[0] not in own}


def distance(one: Path, other: Path) -> float:
    """Largest difference of two networks' weights, text encoders with or without `text_model.` in their names."""
    one, other = ({n.removeprefix("text_model."): value for n, value in load_file(path).items()} for path in (one, other))
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def check_forms(exported: Callable, family: str, *wanted: tuple[str, ...]) -> None:
    """Exports are the student: each opens in stock diffusers, and says what it is."""
    for form, *more in wanted:
        ours, folder = exported(family, form, *more)
        found, card = proof(folder), read_json(folder / "reflow.json")
        done = [read_json(ours.folder / "runs" / "tiny" / f"stage-{n}" / "DONE.json") for n in card["stages"]]
        assert found["steps"] == (4 if "--scheduler=windowed" in more else 2)
        assert card["digest"] == done[-1]["digest"] and card["base"] == "model" and card["format"]["form"] == form
        names = ["base", *(f"stage-{n}" for n in card["stages"])]
        assert card["lineage"] == dict(zip(names, [done[0]["parent"], *(one["digest"] for one in done)], strict=True))
        assert card["guidance"] == done[-1]["guidance"]


@pytest.mark.slow
def test_sdxl_is_distilled_and_drawn_by_stock_diffusers_from_a_folder_and_from_one_file(exported):
    check_forms(exported, "xl", ("diffusers",), ("single-file",))
    ours, folder = exported("xl")
    assert contents(folder) == contents(ours.model)
    assert distance(ours.model / formats.denoiser_file("unet"), folder / formats.denoiser_file("unet")) > 0.01
    index = read_json(folder / "model_index.json")
    assert index == read_json(ours.model / "model_index.json") | {"scheduler": ["diffusers", "DDIMScheduler"]}


@pytest.mark.parametrize(
    ("family", "kind", "marks"), [("xl", "v_prediction", {"v_pred"}), ("xl", "epsilon", set()), ("v2", "v_prediction", set())]
)
def test_only_an_sdxl_that_predicts_v_carries_the_mark_that_uis_know_it_by(family, kind, marks, monkeypatch):
    monkeypatch.setattr(write, "to_original", lambda *_: {})
    networks = {"unet": SimpleNamespace(config={})}
    whole = SimpleNamespace(config=lambda component: {})
    source = SimpleNamespace(family=family, file=None, student={}, cut=(), whole=whole)
    base = SimpleNamespace(source=source, params={}, networks=networks, denoiser_name="unet", text={})
    assert set(write.single_file(SimpleNamespace(base=base, flow=Parameterization(kind)), {})) == marks


@pytest.mark.slow
@each_family
def test_every_form_is_the_student_in_stock_diffusers(exported, family):
    check_forms(exported, family, ("diffusers",), ("diffusers", "--scheduler=windowed"), ("single-file",))
    check_forms(exported, family, ("lora", "--rank=1000"), ("lora", "--rank=4"))
    whole, low = (read_json(exported(family, "lora", f"--rank={n}")[1] / "reflow.json")["lora"] for n in (1000, 4))
    energy = lambda report, rank: next(kept for n, kept, _ in report["energies"] if n == rank)
    assert 0.3 < energy(low, 4) < 0.999 < energy(whole, 1000) <= 1 + 1e-5


@pytest.mark.slow
@each_family
def test_a_delta_on_its_own_base_is_the_student(exported, tmp_path, family):
    ours, folder = exported(family)
    _, delta = exported(family, "delta")
    merged = tmp_path / "merged"
    words = [f"--config={CONFIG}", f"--config.model.path={ours.model}", f"--delta={delta}", f"--out={merged}"]
    ended = run("merge", *words)
    assert ended.code == 0, ended.err
    assert distance(folder / formats.denoiser_file("unet"), merged / formats.denoiser_file("unet")) <= 1e-6
    assert contents(merged) == contents(ours.model)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert read_json(merged / name) == read_json(folder / name)
    noise = np.random.default_rng(0).standard_normal((2, *families.LATENT)).astype(np.float32)
    mine, theirs = (
        replay_in_diffusers.their_latents(open_stock(path), list(PROMPTS[:2]), noise, 2) for path in (merged, folder)
    )
    np.testing.assert_allclose(mine, theirs, atol=replay_in_diffusers.LIMIT)


@pytest.mark.slow
def test_a_safety_checker_and_its_feature_extractor_are_kept_and_used(exported):
    ours, folder = exported("v1")
    assert contents(folder) == contents(ours.model)
    assert {"safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"} <= contents(folder).keys()
    pipe = open_stock(folder)
    assert pipe.safety_checker is not None and pipe.config.requires_safety_checker
    assert len(pipe(list(PROMPTS[:2]), num_inference_steps=2, guidance_scale=1.0).nsfw_content_detected) == 2


@pytest.mark.slow
def test_the_guidance_contract_travels_with_every_export(exported):
    """The teacher's guidance is part of the student from the first stage on, and half the prompts were empty."""
    for form in ("diffusers", "single-file", "delta"):
        ours, folder = exported("v1", form)
        contract = read_json(folder / "reflow.json")["guidance"]
        assert (contract["teacher"], contract["prompt_dropout"], contract["unconditional"]) == (2.0, 0.5, "shared")
        assert contract["recommended"] == [1.0, 2.5]
        assert "Guidance of the teacher: scale 2, now part of the student; empty prompts in training: 50%" in (
            folder / "README.md"
        ).read_text(encoding="utf-8")
        for stage in ("stage-4", "stage-2"):
            assert read_json(ours.folder / "runs" / "tiny" / stage / "DONE.json")["guidance"] == contract


def one_file(ours: Run, path: Path) -> Path:
    """The base model as UIs have it: one file of the original layout."""
    source = sources.open_folder(ours.model)
    parts = [single_file.to_original(c, source.tensors(c), source.config(c), ours.family) for c in source.components]
    save_file({name: tensor for part in parts for name, tensor in part.items()}, path)
    return path


@pytest.mark.slow
@each_family
def test_a_single_file_is_the_same_base_as_its_folder(exported, tmp_path, family):
    """Its digest is the run's, so nothing is done again; its export is whole, with networks from the file."""
    ours, folder = exported(family)
    file = one_file(ours, tmp_path / "base.safetensors")
    fields = {"model__path": file, "model__like": ours.model}
    done = ours.folder / "runs" / "tiny" / "stage-2" / "DONE.json"
    before = done.stat().st_mtime_ns
    ended = run("distill", *ours.words(**fields))
    assert ended.code == 0 and done.stat().st_mtime_ns == before, ended.err

    ended = run("export", *ours.words(**fields), "--stage=2", f"--out={tmp_path / 'out'}", "--check")
    assert ended.code == 0, ended.err
    proof(tmp_path / "out")
    assert read_json(tmp_path / "out" / "reflow.json")["base"] == "base.safetensors"
    for name in ("unet", *sources.open_folder(ours.model).components[1:]):
        (mine,), (theirs,) = ([*path.glob(f"{name}/*.safetensors")] for path in (tmp_path / "out", folder))
        assert distance(mine, theirs) == 0, name
    assert not (tmp_path / "out" / "safety_checker").exists()
    pictures = [draw(ours, tmp_path / f"{i}.png", "--stage=0", "--steps=3", **f) for i, f in enumerate(({}, fields))]
    np.testing.assert_array_equal(*pictures)

    ended = run("export", *ours.words(**fields), "--stage=2", "--form=lora", f"--out={tmp_path / 'lora'}", "--check")
    assert ended.code == 0, ended.err


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "6KB"}], ids=["whole", "sharded"])
def test_components_that_exist_in_half_precision_only_open_without_variant(distilled, tmp_path, family, shards):
    ours = distilled(family)
    half = Path(shutil.copytree(ours.model, tmp_path / "half"))
    pipe = open_stock(ours.model)
    for name in sources.open_folder(half).components[1:]:
        shutil.rmtree(half / name)
        getattr(pipe, name).half().save_pretrained(half / name, variant="fp16", **shards)
        written = [path.name for path in half.glob(f"{name}/*.safetensors*")]
        assert all("fp16" in path for path in written) and (len(written) > 2) == bool(shards)
    target = tmp_path / "out"
    ended = run("export", *ours.words(model__path=half), "--stage=2", f"--out={target}", "--check")
    assert ended.code == 0, ended.err
    proof(target)
    assert not [path for path in target.rglob("*") if "fp16" in path.name]


def open_stock(folder: Path, kind: Any = diffusers.DiffusionPipeline) -> Any:
    """A pipeline of stock diffusers that draws without a word."""
    pipe = kind.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(ours: Run, out: Path, *words: str, **fields: object) -> np.ndarray:
    """What `sample` paints."""
    ended = run("sample", *ours.words(**fields), "--prompt=a three", "--count=2", f"--out={out}", *words)
    assert ended.code == 0, ended.err
    return np.asarray(Image.open(out)).astype(int)


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("negative", ["", "the number two"])
def test_sample_paints_what_the_stock_pipeline_paints(exported, tmp_path, family, negative):
    """Guidance, the negative prompt (SDXL: zeros where there is none), the decoder and its scaling."""
    ours, folder = exported(family)
    found = draw(ours, tmp_path / "ours.png", "--stage=2", "--guidance=3", f"--negative={negative}", "--seed=4")
    noise = np.asarray(jax.random.normal(jax.random.key(4), (2, *families.LATENT)))
    pipe = open_stock(folder)
    pipe.safety_checker = None
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    told = {"negative_prompt": [negative] * 2} if negative else {}
    images = pipe(["a three"] * 2, num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="np", **told).images
    expected = np.concatenate(np.round(255 * images), axis=1)
    assert found.std() > 10 and np.abs(found - expected).max() <= 1


class Drawing(NamedTuple):
    """Inputs of one drawing, for both sides."""

    noise: np.ndarray  # (2, h, w, c)
    steps: int
    guidance: float = 1.0
    negative: str = ""


def our_latents(experiment: Experiment, given: Drawing, nodes: np.ndarray | None = None) -> np.ndarray:
    """Latents of the 2-window student by our sampler; with `nodes`, by its steps from the first, where `noise` is the state."""
    n, student = experiment.networks, load_weights(experiment, experiment.stages[-1])
    read, encode = jax.jit(partial(text_context, n.condition)), experiment.base.tokenizer.encode
    context, negative = (read(experiment.base.text, encode(texts)) for texts in (PROMPTS[:2], [given.negative] * 2))
    start = jnp.asarray(given.noise)
    if nodes is None:
        walk = partial(sampler.sample_latents, denoiser=n.denoiser, schedule=n.schedule, flow=student.flow)
        walk = partial(walk, steps=given.steps, guidance=given.guidance)
        return np.asarray(jax.jit(walk)(student.params, start, context, negative))

    def from_there(params: Any) -> jax.Array:
        predict = solvers.guided(make_predict(n.denoiser, n.schedule, params), context, negative, given.guidance)
        return solvers.solve(make_step(student.flow, n.schedule, predict), start, nodes.astype(np.float32))

    return np.asarray(jax.jit(from_there)(student.params))


def their_latents(pipe: Any, given: Drawing, **more: Any) -> np.ndarray:
    """The same by a stock pipeline; without a negative prompt it is told none."""
    options = {"num_inference_steps": given.steps, "guidance_scale": given.guidance, "output_type": "latent"} | more
    options |= {"negative_prompt": [given.negative] * 2} if given.negative else {}
    return pipe(list(PROMPTS[:2]), **options).images.numpy().transpose(0, 2, 3, 1)


def torch_latents(noise: np.ndarray) -> Any:
    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


def unit(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, *families.LATENT)).astype(np.float32)


def close(ours: np.ndarray, theirs: np.ndarray, limit: float = 1e-4) -> None:
    """`limit` of the values' size, or absolutely where they are below one."""
    assert np.abs(ours - theirs).max() <= limit * max(1, np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "the number two"])
def test_sdxls_sizes_are_those_of_the_stock_pipeline(exported, negative):
    ours, folder = exported("xl")
    sizes = {"original_size": (16, 12), "crop": (3, 2), "target_size": (24, 20)}
    given = Drawing(unit(), 2, 3.0, negative)
    told, untold = (ours.open(**fields) for fields in ({f"conditioning__{k}": v for k, v in sizes.items()}, {}))
    sizes["crops_coords_top_left"] = sizes.pop("crop")
    pipe = open_stock(folder)
    theirs = their_latents(pipe, given, latents=torch_latents(given.noise), **sizes)
    close(our_latents(told, given), theirs)
    assert np.abs(our_latents(untold, given) - theirs).max() > 0.01


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("negative", ["", "the number two"])
def test_our_scheduler_at_more_steps_than_windows_is_our_sampler(exported, family, negative):
    """Text to image at twice and three times the steps, and at a number that does not divide."""
    ours, folder = exported(family, "diffusers", "--scheduler=windowed")
    pipe, experiment = open_stock(folder), ours.open()
    for steps in (4, 6, 7):
        given = Drawing(unit(steps), steps, 3.0, negative)
        close(our_latents(experiment, given), their_latents(pipe, given, latents=torch_latents(given.noise)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["v1", "xl"])
@pytest.mark.parametrize("steps", [4, 6])
def test_image_to_image_from_a_window_bound_is_noise_and_then_our_steps(exported, family, steps):
    ours, folder = exported(family, "diffusers", "--scheduler=windowed")
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if family == "xl" else diffusers.StableDiffusionImg2ImgPipeline
    pipe, experiment = open_stock(folder, kind), ours.open()
    image = unit(1)
    generator = lambda: torch.Generator().manual_seed(0)
    given = Drawing(image, steps, 3.0, "five")
    theirs = their_latents(pipe, given, image=torch_latents(image), strength=0.5, generator=generator())

    nodes = windows.sampling_nodes(steps, 2)[steps // 2 :]
    noise = torch.randn(2, 4, 4, 4, generator=generator()).numpy().transpose(0, 2, 3, 1)
    schedule = experiment.networks.schedule
    start = float(schedule.alpha(nodes[0])) * image + float(schedule.sigma(nodes[0])) * noise
    assert nodes[0] == 0.5
    close(our_latents(experiment, given._replace(noise=start.astype(np.float32)), nodes), theirs)
