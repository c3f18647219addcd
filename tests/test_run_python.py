"""The package from Python: `load` and the models that it opens, `distill`, `read_config`; `sample` is built on the same."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from verb import ROOT, run, tiny_flags

import proreflow_jax
from proreflow_jax import MissingFile, UserError
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import posterior, text_context
from proreflow_jax.run import find_model, pictures
from proreflow_jax.run.image_model import ImageModel
from proreflow_jax.run.read_config import read_config
from proreflow_jax.run.stages import seed_key
from proreflow_jax.storage.atomic import read_json, write_json

pytestmark = pytest.mark.usefixtures("quick")
PROMPTS, AGAINST = ["a three", "the number two"], "five"


@pytest.fixture(scope="module")
def student(chain: Path) -> ImageModel:
    return proreflow_jax.load(chain / "runs" / "tiny" / "stage-4")


def test_the_package_brings_jax_when_it_is_used_and_no_sooner():
    code = (
        "import sys, proreflow_jax as p; heavy = {'jax', 'numpy', 'flax', 'PIL', 'ml_collections'}; "
        "assert not heavy & set(sys.modules); assert {'load', 'distill', 'read_config', 'save_pictures'} <= set(dir(p)); "
        "assert not heavy & set(sys.modules); assert not hasattr(p, 'nothing'); p.save_pictures; "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_function_keeps_its_name_where_the_verbs_module_is_imported():
    import proreflow_jax.distill

    assert proreflow_jax.distill is sys.modules["proreflow_jax.distill"].distill
    assert proreflow_jax.load.__module__ == "proreflow_jax.run.load"


def by_hand(model: ImageModel, guidance: float, steps: int, count: int, seed: int) -> np.ndarray:
    """Pictures of PROMPTS by the sampler's functions, as `sample` drew them before there was `ImageModel`."""
    n, encode = model.networks, model.base.tokenizer.encode
    read = jax.jit(partial(text_context, n.condition))
    context = read(model.base.text, np.repeat(encode(PROMPTS), count, axis=0))
    against = read(model.base.text, encode([AGAINST]))
    noise = jnp.tile(jax.random.normal(seed_key(seed), (count, *model.base.latent_shape)), (len(PROMPTS), 1, 1, 1))
    words = {"denoiser": n.denoiser, "schedule": n.schedule, "flow": model.flow, "steps": steps, "guidance": guidance}
    latents = jax.jit(partial(sampler.sample_latents, **words))(model.params, noise, context, against)
    decode = jax.jit(lambda weights, z: sampler.decode(n.vae, weights, z, n.scaling))
    return np.asarray(decode(model.base.params["vae"], latents))


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 4), (3.0, 6)])
def test_a_model_draws_what_the_sampler_draws(student, guidance, steps):
    words = {"negative": AGAINST, "steps": steps, "guidance": guidance, "count": 3, "seed": 2**63 + 5}
    images = student(PROMPTS, **words)
    expected = by_hand(student, guidance, steps, 3, 2**63 + 5)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)
    np.testing.assert_array_equal(student(PROMPTS, output="array", **words), expected)
    stories = [record for image in images for record in pictures.records(image)]
    assert [(one["prompt"], one["picture"]) for one in stories] == [(text, j) for text in PROMPTS for j in range(3)]
    one = stories[4]
    assert (one["negative"], one["steps"], one["guidance"], one["seed"]) == (AGAINST, steps, guidance, 2**63 + 5)
    assert (one["model"], one["digest"], one["sampler"]["windows"]) == ("tiny-stage-4", student.digest, 4)
    assert ("tool" in one["sampler"]) == (steps == 4)


def test_picture_j_of_a_prompt_is_the_same_in_any_call(student):
    many = student(PROMPTS, count=3, seed=7, output="latent")
    few = student(PROMPTS[1], count=2, seed=7, output="latent")
    np.testing.assert_allclose(many[3:5], few, atol=1e-4)


def test_negative_prompts_go_with_their_prompts(student):
    words = {"guidance": 3.0, "count": 2, "output": "latent"}
    both = student(PROMPTS, negative=[AGAINST, "a three"], **words)
    for i, other in enumerate((AGAINST, "a three")):
        np.testing.assert_allclose(both[2 * i : 2 * i + 2], student(PROMPTS[i], negative=other, **words), atol=1e-4)
    assert np.abs(both[:2] - student(PROMPTS[0], **words)).max() > 1e-3


def test_a_second_call_compiles_nothing(student):
    counted = []
    count = lambda event, *_, **__: counted.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        student("a three", guidance=2.0, steps=5, seed=1)
        assert counted
        counted.clear()
        student("two", guidance=7.5, steps=5, seed=2**40, negative="a four")
        assert not counted
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_a_callback_sees_every_step(student):
    steps = []
    words = {"guidance": 2.0, "steps": 6, "output": "latent", "count": 2}
    latents = student("a three", callback=steps.append, **words)
    assert [(one.number, one.count) for one in steps] == [(i, 6) for i in range(1, 7)]
    np.testing.assert_allclose([one.t for one in steps], sampler.sampling_times(6, student.flow)[1:])
    np.testing.assert_array_equal(steps[-1].latents, latents)
    np.testing.assert_allclose(student("a three", **words), latents, atol=1e-4)
    assert student._step._cache_size() == 1  # one program does for all steps

    def stop(step: object) -> None:
        raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        student("a three", callback=stop, **words)


def test_image_to_image_starts_from_the_image_with_noise(student):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
    n, steps = student.networks, []
    latents = student("a three", image=image, strength=0.5, count=2, output="latent", callback=steps.append)
    assert [one.t for one in steps] == [0.25, 0.0]  # two of four steps
    mean = posterior(n, student.base.params["vae"], jnp.asarray(image)[None, :, 2:10])[0] * n.scaling
    noise = jax.random.normal(seed_key(0), (2, *student.base.latent_shape))
    state = n.schedule.alpha(0.5) * mean + n.schedule.sigma(0.5) * noise
    context = text_context(n.condition, student.base.text, jnp.repeat(student.base.tokenizer.encode(["a three"]), 2, axis=0))
    words = {"denoiser": n.denoiser, "schedule": n.schedule, "flow": student.flow, "steps": 4, "guidance": 1, "skip": 2}
    expected = jax.jit(partial(sampler.sample_latents, **words))(student.params, state, context, context)
    np.testing.assert_allclose(latents, expected, atol=1e-4)
    (picture, _) = student("a three", image=[image], strength=0.5, count=2)
    assert pictures.records(picture)[0]["strength"] == 0.5 and "Denoising strength: 0.5" in picture.info["parameters"]


WRONG = [
    ({"count": 0}, "count=0 must be in"),
    ({"seed": -1}, "seed=-1 must be in"),
    ({"seed": 2**64}, "seed=18446744073709551616 must be in"),
    ({"steps": 3}, "at least the number of windows, 4"),
    ({"guidance": "much"}, "guidance='much' must be a number"),
    ({"output": "png"}, "output='png' must be one of pil, array, latent"),
    ({"solver": "dpm"}, "solver='dpm' must be one of"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": ["a", 3]}, "prompt holds 3"),
    ({"prompt": "half \udc80"}, "no UTF-8"),
    ({"prompt": "x" * 5000}, "longer than 4096"),
    ({"negative": ["a", "b"]}, "negative: 2 for 1 prompts"),
    ({"image": "x.png"}, "is no PIL image"),
    ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 0.2}, "strength=0.2 of 4 steps leaves no step"),
    ({"image": np.zeros((8, 8, 3), np.uint8), "strength": 1.5}, "strength=1.5 must be in"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[line[:20] for _, line in WRONG])
def test_an_argument_that_cannot_be_is_one_line(student, words, line):
    with pytest.raises(UserError) as error:
        student(**{"prompt": "a three"} | words)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_every_form_of_a_student_draws_the_same(student, chain):
    folder = chain / "runs" / "tiny"
    expected = student("a three", count=2, output="array")
    for source, words in ((folder, {"stage": 4}), (folder / "export" / "stage-4", {})):
        other = proreflow_jax.load(source, **words)
        assert (other.flow, other.digest) == (student.flow, student.digest)
        np.testing.assert_array_equal(other("a three", count=2, output="array"), expected)
    assert proreflow_jax.load(str(folder)).flow.windows == 2  # the last stage that is done


def test_every_form_of_a_base_model_draws_the_same(chain, model):
    alone, of_run = proreflow_jax.load(str(model)), proreflow_jax.load(chain / "runs" / "tiny", stage=0)
    assert alone.flow.windows == of_run.flow.windows == 0 and alone.digest == of_run.digest
    first, second = (one("a three", steps=3, output="array") for one in (alone, of_run))
    np.testing.assert_array_equal(first, second)


MISSING = [
    ("no/such", {}, MissingFile, "no/such does not exist: source must name"),
    ("runs/tiny", {"stage": 3}, UserError, "stage=3 is not a stage"),
    ("runs/tiny/stage-8", {}, UserError, "stage=8 is not a stage"),
    ("runs/tiny/export/stage-4", {"stage": 4}, UserError, "is no run"),
    ("runs/tiny", {"overrides": {"model.way": 1}}, UserError, "model.way"),
    ("runs/tiny", {"overrides": {"model.path": "./no/such"}}, MissingFile, "no/such does not exist"),
]


@pytest.mark.parametrize(("source", "words", "kind", "line"), MISSING, ids=[line for *_, line in MISSING])
def test_a_model_that_is_not_there_is_one_line(chain, source, words, kind, line):
    with pytest.raises(kind) as error:
        proreflow_jax.load(chain / source, **words)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_single_file_is_read_with_the_clip_skip_that_it_was_taught():
    class Source:
        student, file = {"clip_skip": {"diffusers": 1}}, Path("x.safetensors")

    model = read_config("digits").model.copy_and_resolve_references()
    with model.unlocked():
        model.clip_skip = None
    assert find_model._student_skip(model, Source()) == 1


def test_the_verb_draws_what_python_draws(chain, model, tmp_path, student):
    out = tmp_path / "new" / "x.png"
    own = ["--stage=4", "--prompt=a three", "--count=2", f"--seed={2**64 - 1}", "--labels", f"--out={out}"]
    ended = run("sample", *tiny_flags(chain, model), *own)
    assert ended.code == 0, ended.err
    images = student("a three", count=2, seed=2**64 - 1)
    with Image.open(out) as sheet:
        np.testing.assert_array_equal(np.asarray(sheet)[-8:, -16:], np.hstack([np.asarray(image) for image in images]))
        assert sheet.text["parameters"] == images[0].info["parameters"]
        assert pictures.records(sheet) == [record for image in images for record in pictures.records(image)]
    singles = [word.replace(str(out), str(tmp_path / "many")) for word in own if word != "--labels"]
    assert run("sample", *tiny_flags(chain, model), *singles).code == 0
    for i, image in enumerate(images):
        with Image.open(tmp_path / "many" / f"0000{i}.png") as other:
            np.testing.assert_array_equal(np.asarray(other), np.asarray(image))
    refused = run("sample", *tiny_flags(chain, model), *own, f"--out={tmp_path / 'many'}")
    assert refused.code == 2 and "--labels is for a grid" in refused.err, refused.err


def test_distill_gives_stages_that_load_takes(chain, tmp_path, student):
    shutil.copytree(chain / "runs", tmp_path / "runs")
    stages = proreflow_jax.distill(chain / "runs" / "tiny" / "config.json", {"root": str(tmp_path / "runs")})
    assert [stage.windows for stage in stages] == [4, 2]
    again = proreflow_jax.load(stages[0])
    assert again.digest == student.digest and stages[0].folder == tmp_path / "runs" / "tiny" / "stage-4"


def test_a_config_is_read_by_name_path_word_or_record(tmp_path):
    by_name, by_path = read_config("digits", {"train.batch": 32, "stages": (4, 2)}), read_config(ROOT / "configs" / "digits.py")
    assert (by_name.train.batch, by_name.stages, by_path.train.batch) == (32, (4, 2), 64) and by_name.is_locked
    own = tmp_path / "mine.py"
    lines = (
        "from configs.digits import get_config as digits",
        "def get_config(name):",
        "    c = digits()",
        "    c.name = name",
    )
    own.write_text("\n".join([*lines, "    return c", ""]))
    assert read_config(f"{own}:me").name == "me"
    assert read_config(by_path, {"name": "other"}).name == "other" and by_path.name == "digits"


NO_CONFIG = [
    ("digit", {}, UserError, "digits"),
    ("no/such.py", {}, MissingFile, "no/such.py"),
    ("digits", {"train.bach": 3}, UserError, "train.bach"),
    ("digits", {"train.batch": "many"}, UserError, "train.batch"),
    ("digits", {"train.batch": -3}, UserError, "--config.train.batch=-3 must be in"),
]


@pytest.mark.parametrize(("config", "overrides", "kind", "needle"), NO_CONFIG)
def test_a_config_that_cannot_be_is_one_line(config, overrides, kind, needle):
    with pytest.raises(kind) as error:
        read_config(config, overrides)
    assert needle in str(error.value) and "\n" not in str(error.value)


def test_a_run_of_before_a_field_was_there_opens(chain, tmp_path):
    copy = Path(shutil.copytree(chain / "runs", tmp_path / "runs")) / "tiny"
    record = read_json(copy / "config.json")
    del record["samples"], record["wandb"], record["watchdog"], record["model"]["clip_skip"]
    write_json(copy / "config.json", record)
    assert proreflow_jax.load(copy, stage=4).flow.windows == 4
