"""Stable Diffusion 3 and 3.5 from diffusers through the verbs and back, beside `StableDiffusion3Pipeline` with its scheduler.

The base models are diffusers' own (`tiny_sd3`): 3.5 medium with T5 and second attentions, 3 medium without T5. By default only
the thin way runs; the forms of both members, the data that a run may start from, and the tools around a run are slow.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import made_coco
import numpy as np
import pytest
import tiny
from made_images import LAYOUTS, originals
from PIL import Image
from safetensors.numpy import load_file
from verb import CONFIG, quickly, run, tiny_flags

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import tiny_sd3  # noqa: E402
from test_perf_plan import described  # noqa: E402
from test_pretrained_joint_file import with_identity  # noqa: E402

import proreflow_jax  # noqa: E402
from proreflow_jax.data import records  # noqa: E402
from proreflow_jax.evaluation import judges  # noqa: E402
from proreflow_jax.exports import formats, replay_in_diffusers  # noqa: E402
from proreflow_jax.flow import windows  # noqa: E402
from proreflow_jax.jobs import train  # noqa: E402
from proreflow_jax.jobs.gallery import Ask, open_gallery  # noqa: E402
from proreflow_jax.models.network import Context  # noqa: E402
from proreflow_jax.perf import jobs  # noqa: E402
from proreflow_jax.pretrained import lora_file, weights  # noqa: E402
from proreflow_jax.reflow import pairs  # noqa: E402
from proreflow_jax.run import experiment as experiments  # noqa: E402
from proreflow_jax.run import outlook, pictures, text_states  # noqa: E402
from proreflow_jax.run.load import open_run  # noqa: E402
from proreflow_jax.run.open import open_outline  # noqa: E402
from proreflow_jax.run.read_config import read_config  # noqa: E402
from proreflow_jax.run.stages import PAIR_KEY, run_key  # noqa: E402
from proreflow_jax.runtime import mesh  # noqa: E402
from proreflow_jax.storage import paths  # noqa: E402
from proreflow_jax.storage.atomic import read_json  # noqa: E402

FIELDS = {  # few large updates, so that a student is far enough from its base to tell them apart
    "stages": "(2,)",
    "export__stages": "()",
    "student__prediction": "velocity",
    "train__steps": 3,
    "train__batch": 8,
    "pairs__examples": 16,
    "optimizer__warmup_steps": 0,
    "optimizer__learning_rate": 1e-2,
    "optimizer__weight_decay": 0.5,  # a constant that decays would be seen
}
OF = {  # member: (whether it has T5, fields of its run)
    "3-medium": (False, {}),
    "3.5-medium": (True, {"stages": "(4, 2)", "pairs__guidance": 2.0, "pairs__prompt_dropout": 0.5}),
}
LAYERS = r"attn2?\.(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out)\.weight$"
TABLE = "pos_embed.pos_embed"
WEIGHTS = formats.denoiser_file("transformer")
each_member = pytest.mark.parametrize("member", OF)


class Run(NamedTuple):
    """A run of a member. Tests only read a finished one."""

    member: str
    model: Path
    folder: Path

    def words(self, **fields: object) -> list[str]:
        """Its command, with fields of another value."""
        values = {"model__path": self.model} | FIELDS | OF[self.member][1] | fields
        return tiny_flags(self.folder, values.pop("model__path"), **values)

    def open(self, name: str = "tiny", **overrides: object):
        """What its verbs see."""
        return open_run(paths.parse_path(str(self.folder / "runs" / name)), "", overrides)


@pytest.fixture(scope="module", autouse=True)
def quick(programs):
    with quickly(programs) as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)  # verbs as they are, but for XLA's optimizations
        patch.setattr(mesh, "make_mesh", partial(one_device, mesh.make_mesh))  # meshes have their own tests
        yield


def one_device(make: Callable, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None, slices: int = 1) -> Any:
    """A mesh of one device where none are named."""
    return make(data, fsdp, tensor, jax.devices()[:1] if devices is None else devices, slices)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a member's base model, made once; its first CLIP's projection is the identity, as in the published ones."""
    made = {}

    def once(member: str) -> Path:
        if member not in made:
            folder = tmp_path_factory.mktemp(member) / "model"
            made[member] = with_identity(tiny_sd3.write(folder, member, OF[member][0]))
        return made[member]

    return once


@pytest.fixture(scope="module")
def distilled(models) -> Callable[[str], Run]:
    """The finished run of a member, made once."""
    made = {}

    def once(member: str) -> Run:
        if member not in made:
            made[member] = Run(member, models(member), models(member).parent)
            ended = run("distill", *made[member].words())
            assert ended.code == 0, ended.err
            assert "one Euler step a window" in ended.err
        return made[member]

    return once


@pytest.fixture(scope="module")
def exported(distilled, tmp_path_factory) -> Callable[..., tuple[Run, Path]]:
    """(run, folder) of an export that passed --check where there is one, made once."""
    made = {}

    def once(member: str, form: str = "diffusers", *more: str) -> tuple[Run, Path]:
        key = (member, form, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("exports") / "-".join(key)
            check = ["--check"] * (form != "delta")
            words = [*distilled(member).words(), "--stage=2", f"--form={form}", f"--out={made[key]}", *more, *check]
            ended = run("export", *words)
            assert ended.code == 0, ended.err
        return distilled(member), made[key]

    return once


def one_line(verb: str, words: list[str], *needles: str) -> None:
    """The verb refuses: one line, with the needles in it, and nothing is begun."""
    ended = run(verb, *words)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1, ended.err
    assert all(needle in ended.err for needle in needles), ended.err


@pytest.mark.parametrize(
    ("fields", "needles"),
    [
        ({"student__prediction": "ddim_eps"}, ("rectified flow", "take --config.student.prediction=velocity")),
        ({"student__prediction": "diff_eps"}, ("rectified flow", "take --config.student.prediction=velocity")),
        ({"student__path": "first_order"}, ("first_order", "--config.student.path")),
        ({"model__prediction_type": "epsilon"}, ("--config.model.prediction_type=epsilon", "rectified flow", "leave it out")),
        ({"model__clip_skip": 1}, ("--config.model.clip_skip=1", "SD 3", "leave --config.model.clip_skip out")),
        ({"conditioning__crop": "(1, 2)"}, ("--config.conditioning.crop=(1, 2)", "told no sizes", "leave it out")),
        ({"pairs__solver": "rk4"}, ("--config.pairs.solver='rk4'", "dpmpp_2m")),
        ({"student__lora__rank": 2}, ("--config.student.lora.layers", "matches none")),
    ],
)
def test_what_a_rectified_flow_has_not_is_refused_in_one_line(models, tmp_path, fields, needles):
    ours = Run("3-medium", models("3-medium"), tmp_path)
    one_line("distill", ours.words(**fields), *needles)
    assert not (tmp_path / "runs").exists()


def test_a_table_of_positions_is_no_weight_and_the_student_is_drawn(distilled, tmp_path):
    """It has no moments, no average and no decay, and stays the base model's in whatever is handed on."""
    ours = distilled("3-medium")
    opened = ours.open()
    layout, network = opened.layout, opened.networks.denoiser
    assert network.constants == {TABLE} and layout.shapes.keys() == network.shapes.keys() - {TABLE}
    kept = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(layout.target) if hasattr(path[-1], "key")}
    assert kept == layout.shapes.keys()
    base = opened.denoiser.params()
    opened.denoiser.free()
    student = experiments.load_weights(opened, opened.stages[-1])
    assert student.params.keys() == base.keys() and not student.factors
    np.testing.assert_array_equal(student.params[TABLE], base[TABLE])
    moved = [name for name in layout.shapes if not np.array_equal(student.params[name], base[name])]
    assert layout.shapes.keys() - moved <= {"transformer_blocks.1.attn.add_q_proj.bias"}  # nobody reads the last block's text

    ended = run("sample", *ours.words(), "--prompt=a three", "--count=2", f"--out={tmp_path / 'x.png'}")
    assert ended.code == 0, ended.err
    with Image.open(tmp_path / "x.png") as picture:
        (first, _), said = pictures.records(picture), picture.info[pictures.PARAMETERS]
    assert (first["sampler"]["prediction"], first["steps"]) == ("velocity", 2)
    assert "Sampler: Euler, Schedule type: Simple" in said  # ComfyUI's are the student's own steps
    one_line("export", [*ours.words(), "--stage=2", "--scheduler=windowed", f"--out={tmp_path / 'w'}"], "leave it out")
    assert not (tmp_path / "w").exists()


def test_text_of_a_cache_is_that_of_the_encoders_where_no_prompt_was_dropped():
    """The law of one batch: records with a cache's states are spoken as by their ids, and no encoder is asked."""
    toys = tiny.toy_networks()
    frozen, ids = tiny.toy_frozen(toys), jnp.asarray(tiny.rows(8)["ids"])
    ids = ids.at[::3].set(frozen.empty)  # dropped
    words = jnp.asarray(tiny.rows(8)["ids"])
    states = pairs.text_context(toys.condition, frozen.text, words).states
    spared = frozen._replace(text={}, unprompted=pairs.text_context(toys.condition, frozen.text, frozen.empty[None]))
    rows = pairs.spoken(spared, {"ids": ids, "text": states}, toys)
    found = pairs.row_context(toys.condition, spared, rows)
    np.testing.assert_array_equal(found.states, pairs.text_context(toys.condition, frozen.text, ids).states)
    assert isinstance(found, Context) and "text" not in pairs.spoken(frozen, {"ids": ids}, toys)


def proof(folder: Path) -> dict:
    """replay.json of an export that is its student in diffusers, in as many steps as windows and in twice as many."""
    found = read_json(folder / "replay.json")
    assert found["largest_difference"] <= replay_in_diffusers.LIMIT < found["largest_value"]
    assert (found["steps"], found["told"]["steps"]) == (2, 4)
    return found


def distance(one: Path, other: Path) -> float:
    """Largest difference of two transformers' weights."""
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def draw(words: list[str], out: Path, *more: str) -> np.ndarray:
    """What `sample` paints, without a word about seeds: one row."""
    ended = run("sample", *words, "--prompt=a three", "--count=2", f"--out={out}", *more)
    assert ended.code == 0, ended.err
    return np.asarray(Image.open(out)).astype(int)


@pytest.mark.slow
@each_member
def test_every_form_is_the_student_in_stock_diffusers(exported, tmp_path, member):
    """And each draws here what the run draws: a folder, a single file beside its base, a merge of the delta."""
    ours, folder = exported(member)
    _, file = exported(member, "single-file")
    _, delta = exported(member, "delta")
    whole, low = (exported(member, "lora", f"--rank={rank}")[1] for rank in (1000, 2))
    for one in (folder, file, whole, low):
        proof(one)
    cards = [read_json(one / "reflow.json") for one in (whole, low)]
    assert cards[0]["lora"]["error"] < 1e-3 < cards[1]["lora"]["error"] and cards[0]["format"]["names"] == "diffusers"
    done = read_json(ours.folder / "runs" / "tiny" / "stage-2" / "DONE.json")
    assert {read_json(one / "reflow.json")["digest"] for one in (folder, file, delta, whole, low)} == {done["digest"]}
    assert distance(ours.model, folder) > 0.01

    merged = tmp_path / "merged"
    ended = run("merge", f"--config={CONFIG}", f"--config.model.path={ours.model}", f"--delta={delta}", f"--out={merged}")
    assert ended.code == 0, ended.err
    assert distance(folder, merged) <= 1e-6
    scheduler = Path("scheduler") / "scheduler_config.json"
    assert read_json(merged / scheduler) == read_json(folder / scheduler)

    mine = draw(ours.words(), tmp_path / "run.png", "--stage=2", "--guidance=3")
    single = {"model__path": file / formats.FILES["single-file"], "model__like": ours.model}
    for i, fields in enumerate(({"model__path": folder}, single, {"model__path": merged})):
        fields |= {"pairs__guidance": 1.0}  # of training alone
        theirs = draw(ours.words(**fields), tmp_path / f"{i}.png", "--stage=0", "--guidance=3")
        assert mine.std() > 10 and np.abs(mine - theirs).max() <= 1


@pytest.mark.slow
def test_a_delta_of_another_shift_is_refused(exported, tmp_path):
    ours, delta = exported("3-medium", "delta")
    other = Path(shutil.copytree(ours.model, tmp_path / "other"))
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"shift": 3.0', '"shift": 2.0'))
    words = [f"--config={CONFIG}", f"--config.model.path={other}", f"--delta={delta}", f"--out={tmp_path / 'merged'}"]
    one_line("merge", words, "noise schedule (shift)", "do not add up")


@pytest.mark.slow
@each_member
@pytest.mark.parametrize("negative", ["", "the number two"])
def test_sample_paints_what_the_stock_pipeline_paints(exported, tmp_path, member, negative):
    """Guidance, the empty and a negative prompt of all encoders, the first step from pure noise, the decoder and its shift."""
    ours, folder = exported(member)
    found = draw(ours.words(), tmp_path / "ours.png", "--stage=2", "--guidance=3", f"--negative={negative}", "--seed=4")
    noise = np.asarray(jax.random.normal(jax.random.key(4), (2, *tiny_sd3.LATENT)))
    pipe = tiny_sd3.stock(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    told = {"negative_prompt": [negative] * 2} if negative else {}
    images = pipe(["a three"] * 2, num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="np", **told).images
    expected = np.concatenate(np.round(255 * images), axis=1)
    assert found.std() > 10 and np.abs(found - expected).max() <= 1


@pytest.mark.slow
def test_image_to_image_is_the_stock_pipelines(exported):
    """Half of 4 steps from a picture that is noised to a window's bound: the noise differs, so the noise is ours."""
    ours, folder = exported("3-medium")
    model = proreflow_jax.load(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    nodes = windows.sampling_nodes(4, 2)[2:]
    noise = np.asarray(jax.random.normal(jax.random.key(0), (1, *tiny_sd3.LATENT)))
    found = model("a three", image=picture, strength=0.5, steps=4, output="latent")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    fields = {"shift": tiny_sd3.SHIFT, "shift_terminal": None}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **fields)
    pixels = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1)[None] / 127.5 - 1).float()
    clean = (pipe.vae.encode(pixels).latent_dist.mean - tiny_sd3.SHIFT_FACTOR) * tiny_sd3.SCALING
    sigma = float(model.networks.schedule.sigma(nodes[0]))
    start = (1 - sigma) * clean.detach() + sigma * torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    words = {"sigmas": nodes[:-1].tolist(), "num_inference_steps": 2, "guidance_scale": 1.0}
    theirs = pipe(["a three"], latents=start, output_type="latent", **words).images.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, theirs, atol=1e-3)


@pytest.mark.slow
@each_member
def test_bfloat16_draws_what_float32_draws_nearly(exported, member):
    _, folder = exported(member)
    exact, coarse = (proreflow_jax.load(folder, dtype=dtype)("a three", output="latent") for dtype in ("float32", "bfloat16"))
    assert 1e-4 < np.abs(exact - coarse).max() < 0.1 * np.abs(exact).max()


@pytest.mark.slow
@each_member
def test_a_lora_that_was_trained_is_the_student_exactly(models, tmp_path, member):
    ours = Run(member, models(member), tmp_path)
    fields = {"student__lora__rank": 2, "student__lora__layers": LAYERS}
    ended = run("distill", *ours.words(**fields))
    assert ended.code == 0 and "no factors in joint attention" not in ended.err, ended.err
    if member == "3.5-medium":  # the default finds its second attentions alone
        ended = run("make_pairs", *ours.words(name="default", student__lora__rank=2, pairs__solver="heun"), "--stage=4")
        assert ended.code == 0 and "--config.student.lora.layers: no factors in joint attention" in ended.err
    for form in ("diffusers", "lora"):
        ended = run("export", *ours.words(**fields), "--stage=2", f"--form={form}", f"--out={tmp_path / form}", "--check")
        assert ended.code == 0, ended.err
        proof(tmp_path / form)
    assert read_json(tmp_path / "lora" / "replay.json")["to_student"] <= replay_in_diffusers.LIMIT
    base, student = (weights.read_tensors(folder / "transformer") for folder in (ours.model, tmp_path / "diffusers"))
    stored = weights.Tensors([tmp_path / "lora" / formats.FILES["lora"]])
    factors = lora_file.from_peft(stored, base, "transformer")
    unread = f"transformer_blocks.{2 if member == '3.5-medium' else 1}.attn.add_q_proj.weight"  # of the last block's text
    assert {n for n in base if not np.array_equal(base[n], student[n])} == factors.keys() - {unread}
    assert any("add_k_proj" in name for name in factors) and (member == "3-medium") != any("attn2" in n for n in factors)
    for name, value in lora_file.apply_factors(base, factors).items():
        np.testing.assert_allclose(value, student[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_equal(distilled, tmp_path, monkeypatch):
    whole = distilled("3-medium")
    ours = Run("3-medium", whole.model, tmp_path)
    fields, stage = {"checkpoint__every": 1}, tmp_path / "runs" / "tiny" / "stage-2"

    def stop(self: outlook.Outlook) -> None:
        if list(stage.glob("checkpoints/1*")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outlook.Outlook, "keep", stop)
        assert run("distill", *ours.words(**fields)).code == 130
    assert not (stage / "DONE.json").exists()
    ended = run("distill", *ours.words(**fields))
    assert ended.code == 0 and "of 3 steps done" in ended.err and "training, 0 of 3" not in ended.err, ended.err
    assert (
        read_json(stage / "DONE.json")["digest"]
        == read_json(whole.folder / "runs" / "tiny" / "stage-2" / "DONE.json")["digest"]
    )


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "stage-2" / "metrics.jsonl").read_text().splitlines()
    return [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stored", "online"])
def test_cached_text_keeps_every_text_encoder_off_the_devices(models, tmp_path, monkeypatch, mode):
    """Prompts alone are cached; pairs, losses and pictures are those of the encoders."""
    ours = Run("3.5-medium", models("3.5-medium"), tmp_path)
    fields = {"stages": "(2,)", "cache__text": True, "cache__storage": "float32", "cache__batch": 8, "pairs__mode": mode}
    fields |= {"samples__prompts": "('a three', 'five')", "samples__count": 1, "samples__teacher_steps": 2}
    fields |= {"pairs__storage": "float32"}
    ended = run("cache", *ours.words(**fields), f"--out={tmp_path / 'cache'}")
    assert ended.code == 0, ended.err
    record = records.PairRecords(tmp_path / "cache")[0]
    assert record.keys() == {"index", "caption", "text", "pooled"} and record["text"].shape == (8 + 256, tiny_sd3.STATES)

    assert run("distill", *ours.words(name="encoded", **fields)).code == 0
    seen = []
    read, arrays = pairs.text_context, experiments.frozen_arrays
    with monkeypatch.context() as patch:
        patch.setattr(text_states, "text_context", lambda *told: seen.append("host") or read(*told))
        for module in (pairs, train):
            patch.setattr(module, "text_context", lambda *told: pytest.fail("a text encoder was asked"))
        patch.setattr(train, "frozen_arrays", lambda *told, **named: seen.append(arrays(*told, **named)) or seen[-1])
        data = {"data__kind": "cached", "data__path": tmp_path / "cache"}
        ended = run("distill", *ours.words(name="cached", **fields, **data))
    assert ended.code == 0, ended.err
    frozen = [one for one in seen if isinstance(one, pairs.Frozen)]
    assert "host" in seen and frozen and all(one.text == {} and one.unprompted is not None for one in frozen)
    np.testing.assert_allclose(losses(tmp_path, "cached"), losses(tmp_path, "encoded"), rtol=1e-4)
    config = open_run(paths.parse_path(str(tmp_path / "runs" / "cached")), "", {}).config
    outline = open_outline(config, jax.devices()[:1])  # what `plan` counts
    shapes = jobs.frozen_shapes(outline, outline.stages[0], mode == "online", False)
    assert described(shapes._replace(key=None)) == described(frozen[-1]._replace(key=None))
    batch = jobs.prompt_shapes(outline, 8) if mode == "online" else jobs.record_shapes(outline, outline.stages[0])
    assert {"text", "pooled", "ids"} <= batch.keys() and batch["text"].shape == (8, 8 + 256, tiny_sd3.STATES)
    drawn = [
        np.asarray(Image.open(tmp_path / "runs" / name / "stage-2" / "samples" / "step-00000003.png")).astype(int)
        for name in ("encoded", "cached")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2
    words = ours.words(name="data", **fields | {"pairs__start": "data"}, **data)
    ended = run("distill", *words)
    last = ended.err.splitlines()[-1]
    assert ended.code == 2 and "cache of text without latents" in last and "--config.pairs.start=noise" in last


@pytest.mark.slow
def test_pairs_start_from_noised_images_and_from_their_cache(models, tmp_path):
    """z = (1 - sigma) x0 + sigma noise at the window's start; of the first window that is the noise."""
    ours = Run("3-medium", models("3-medium"), tmp_path)
    (tmp_path / "images").mkdir()
    images = {f"data__{name}": value for name, value in LAYOUTS["jsonl"](tmp_path / "images", originals()).items()}
    fields = {"pairs__start": "data", "cache__storage": "float32", "cache__batch": 8, "pairs__storage": "float32"}
    assert (ended := run("cache", *ours.words(**fields, **images), f"--out={tmp_path / 'cache'}")).code == 0, ended.err
    made = {}
    for name, data in (("images", images), ("cached", {"data__kind": "cached", "data__path": tmp_path / "cache"})):
        ended = run("make_pairs", *ours.words(name=name, **fields, **data), "--stage=2")
        assert ended.code == 0, ended.err
        stored = records.PairRecords(tmp_path / "runs" / name / "stage-2" / "pairs")
        made[name] = {key: np.stack([stored[i][key] for i in range(16)]) for key in stored[0]}
    np.testing.assert_allclose(made["cached"]["states"], made["images"]["states"], rtol=1e-4, atol=1e-5)
    first = made["images"]["first"]
    assert set(first) == {0, 1}
    key = run_key(read_config("digits"), PAIR_KEY, 2)
    noise = lambda i: jax.random.normal(jax.random.split(jax.random.fold_in(key, i), 4)[1], tiny_sd3.LATENT)
    for i in np.flatnonzero(first == 0):
        np.testing.assert_array_equal(made["images"]["states"][i, 0], noise(int(i)))


@pytest.mark.slow
def test_a_run_is_scored_studied_shown_and_opened_from_python(distilled, tmp_path, monkeypatch):
    ours, coco = distilled("3-medium"), tmp_path / "coco"
    captions, images = made_coco.write_coco(coco)
    (coco / "inception.safetensors").touch()
    monkeypatch.setattr(judges, "feature_network", made_coco.small_network)
    fields = {"protocol": "coco2017-5k", "captions": captions, "images": images, "inception": coco / "inception.safetensors"}
    fields |= {"examples": 8, "batch": 8, "seeds": "(0,)", "teacher_steps": "(2,)", "student_steps": "((2, 2), (2, 4))"}
    fields |= {"study.examples": 4, "study.seeds": 2, "study.steps": 8, "study.perturbed_steps": 4, "study.sizes": "(0.1, 0.5)"}
    ended = run("evaluate", *ours.words(**{f"evaluate__{name}": value for name, value in fields.items()}), "--study")
    assert ended.code == 0, ended.err
    rows = read_json(ours.folder / "runs" / "tiny" / "scores.json")["rows"]
    assert [row["steps"] for row in rows] == [2, 2, 4] and all(row["fid"]["0"] > 0 for row in rows)
    study = read_json(ours.folder / "runs" / "tiny" / "study.json")
    assert study["settings"]["step"] == "Euler" and "Euler steps" in (ours.folder / "runs" / "tiny" / "report.html").read_text()

    gallery = open_gallery(str(ours.folder / "runs" / "tiny"))
    ask = Ask("a three", "student of 2 windows", "base model", steps="2", teacher_steps=4.0, guidance=1, teacher_guidance="2.5")
    answer = gallery.draw(ask._replace(negative="five", seed="3"))
    model = proreflow_jax.load(ours.folder / "runs" / "tiny" / "stage-2")
    (picture,) = model("a three", seed=3)
    assert answer.refusal == "" and np.array_equal(np.asarray(answer.student.image), np.asarray(picture))
    proreflow_jax.save_pictures([picture], tmp_path / "three.png")
    assert pictures.records(Image.open(tmp_path / "three.png"))[0]["digest"] == model.digest

    refused = run("evaluate", *ours.words(evaluate__protocol="emoji"))
    assert refused.code == 2 and len(refused.err.splitlines()) == 1 and "emoji" in refused.err
