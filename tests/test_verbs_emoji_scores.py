"""The emoji's table and gate on a tiny model and a made dataset: rows, an independent drawing, killed and resumed, refusals.

The feature network is four averages of a picture; the real one has tests of its own.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file
from verb import ROOT, Ended, quickly, run

from proreflow_jax.data import emoji, emoji_pairs
from proreflow_jax.evaluation import kernel
from proreflow_jax.evaluation.picture_features import PictureFeatures
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.jobs import emoji_pictures, emoji_reference, emoji_showcase, score_emoji
from proreflow_jax.pretrained import pipeline
from proreflow_jax.reflow import sampler
from proreflow_jax.run.experiment import Experiment, Weights
from proreflow_jax.run.stages import EVALUATION_KEY, Stage
from proreflow_jax.storage.atomic import read_json

STYLES = ("noto", "twemoji", "fxemoji", "noto-v1", "emojione")
COUNT, BATCH, GUIDANCE = 12, 8, 3.0


def small_features(images: np.ndarray) -> np.ndarray:
    """Four averages of each picture, float32."""
    quarters = images.reshape(len(images), 2, 4, 2, 4, 3).astype(np.float32).mean(axis=(2, 4))
    return quarters.reshape(len(images), 12) / 127.5 - 1


def small_network(size: int, mesh: object, batch: int) -> PictureFeatures:
    """Stands in for EfficientNet: every picture's row depends on that picture alone."""
    run = lambda batches: ({"efficientnet-lite0": small_features(rows["images"])} for rows in batches)
    return PictureFeatures(run, batch, f"small-{size}")


def load_weights(real: Callable, experiment: Experiment, stage: Stage | None) -> Weights:
    """The 4-window student is the teacher with larger weights."""
    if stage is None:
        return real(experiment, None)
    params = {name: 1.1 * value for name, value in experiment.denoiser.params().items()}
    return Weights(params, Parameterization("ddim_eps", 4), "student")


@pytest.fixture(scope="module", autouse=True)
def quick(programs):
    with quickly(programs) as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)
        patch.setattr(score_emoji, "make_picture_features", small_network)
        patch.setattr(score_emoji, "load_weights", partial(load_weights, score_emoji.load_weights))
        patch.setattr(score_emoji, "check_taught", lambda *_: None)  # the student has no plan; doors have their own tests
        patch.setattr(emoji_pictures, "SAVE_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 60 concepts in 5 styles, 8 pixels a side: a concept's colours, darkened by its style."""
    folder = tmp_path_factory.mktemp("emoji")
    rng = np.random.default_rng(0)
    rows = [{"hex": f"{i:x}", "label": f"thing {i}", "tags": ["thing"], "group": "objects"} for i in range(60)]
    quarters = rng.integers(40, 256, (60, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    shade = np.linspace(1, 0.5, len(STYLES))[:, None, None, None, None]
    images = (quarters[None] * shade + rng.integers(-5, 5, (len(STYLES), 60, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    arrays, table = emoji.paths(folder, 8)
    style, concept = np.repeat(np.arange(len(STYLES)), 60), np.tile(np.arange(60), len(STYLES))
    np.savez(arrays, images=images.reshape(-1, 8, 8, 3), style=style, concept=concept)
    table.write_text(json.dumps({"styles": STYLES, "concepts": rows}))
    (folder / "prompts.txt").write_text("a thing\nanother\n")
    return folder


def evaluate(folder: Path, model: Path, name: str, **fields: object) -> Ended:
    """The verb on the dataset of `folder`, its run folder beside it."""
    values = {
        "name": name,
        "root": folder / "runs",
        "model.path": model,
        "data.path": folder / "prompts.txt",
        "data.resolution": 8,
        "evaluate.images": folder,
        "evaluate.examples": COUNT,
        "evaluate.seeds": "(0, 1)",
        "evaluate.batch": BATCH,
        "evaluate.teacher_steps": "(2, 8, 4)",
        "evaluate.student_steps": "((4, 4), (2, 2))",
        "evaluate.columns": 4,
        "evaluate.gate.guidance": "(1.0, 4.0)",
        "evaluate.gate.guidance_steps": "(2,)",
        "evaluate.gate.guidance_examples": 10,
        "evaluate.gate.student_guidance": 1.0,
        "evaluate.gate.held_out": True,
        "evaluate.gate.shipped_steps": "()",
        "evaluate.guidance": 0.0,  # the protocol's, 3
        "evaluate.gate.showcase": '("thing 1", "thing 2, noto style")',
        "evaluate.gate.showcase_steps": "(8, 2)",
        "pairs.batch": 64,
        "train.batch": 32,
    } | {key.replace("__", "."): value for key, value in fields.items()}
    return run("evaluate", f"--config={ROOT / 'configs' / 'emoji.py'}", *(f"--config.{k}={v}" for k, v in values.items()))


def finish_student(folder: Path, name: str) -> None:
    """Says that the run's 4-window student is finished."""
    stage = folder / "runs" / name / "stage-4"
    stage.mkdir(parents=True)
    (stage / "DONE.json").write_text("{}")


@pytest.fixture(scope="module")
def whole(folder: Path, model: Path) -> dict:
    """table.json of a run with a 4-window student, never stopped."""
    finish_student(folder, "whole")
    ended = evaluate(folder, model, "whole")
    assert ended.code == 0, ended.err
    assert "2-window student yet: its row is left out" in ended.err
    assert (folder / "runs" / "whole" / "table.md").read_text().startswith("| method")
    return read_json(folder / "runs" / "whole" / "table.json") | {"out": ended.out}


def of(table: dict, method: str, steps: int = 0, guidance: float = 0.0) -> dict:
    rows = [row for row in table["rows"] if row["method"] == method and steps in (0, row.get("steps"))]
    (row,) = [row for row in rows if guidance in (0.0, row.get("guidance"))]
    return row


def arrays(folder: Path, name: str, **about: object) -> list[dict[str, np.ndarray]]:
    """What was kept of the rows that these facts describe."""
    files = sorted((folder / "runs" / name / "scores").glob("emoji-*.json"))
    files = [f for f in files if about.items() <= read_json(f).items() and f.with_suffix(".safetensors").is_file()]
    return [load_file(f.with_suffix(".safetensors")) for f in files]


def test_rows_are_teacher_students_and_what_no_model_draws(whole):
    rows = [(row["method"], row.get("steps"), row.get("guidance"), row.get("calls")) for row in whole["rows"]]
    without = [(name, None, None, None) for name in ("real pictures", "shuffled prompts", "autoencoder")]
    teacher = [("teacher", steps, 3.0, 2 * steps) for steps in (8, 4, 2)]
    sweep = [("teacher, guidance", 2, 1.0, 2), ("teacher, guidance", 2, 4.0, 4)]
    assert rows == [*without, *teacher, ("4-window student", 4, 1.0, 4), *sweep]
    for row in whole["rows"][3:7]:
        assert set(row["sides"]) == {"seen", "held-out"}
        for numbers in row["sides"].values():
            assert set(numbers) == {"kernel", "decoded", "teacher_kernel", "latents", "top1", "top5", "group", "score"}
            assert all(set(values) == {"0", "1"} for values in numbers.values())
    assert set(of(whole, "teacher, guidance", 2, 1.0)["sides"]["seen"]["kernel"]) == {"0"}
    assert "teacher_kernel" not in of(whole, "teacher, guidance", 2, 1.0)["sides"]["seen"]


def test_numbers_are_said_with_their_protocol_and_the_gate_in_words(whole):
    text = of(whole, "teacher", 2)["statement"]
    assert (
        text.startswith("kernel distance ") and " on seen pairs, " in text and " on held-out pairs; seeds 0, 1; emoji, " in text
    )
    assert text.endswith("images 12 instead of 500, real images 12 instead of 500, seeds 0, 1 instead of 0, 1, 2")
    assert set(whole["gate"]) == {"seen", "held-out"} and set(whole["gate"]["seen"]) == {"a", "b", "c"}
    assert len(whole["sentences"]) == 8 and all(sentence in whole["out"] for sentence in whole["sentences"])
    for sentence in whole["sentences"][:6]:
        assert sentence.split(" pairs: ")[1].startswith(("(a) ", "(b) ", "(c) "))
    for sentence in whole["sentences"][6:]:
        assert "4-window student against the teacher, 4 steps: nearer to real pictures by " in sentence
    assert whole["gate"]["seen"]["b"] is not None  # the run has the student


def test_the_teacher_is_held_against_its_own_most_steps(whole):
    for side in ("seen", "held-out"):
        most, few = of(whole, "teacher", 8)["sides"][side], of(whole, "teacher", 2)["sides"][side]
        assert not any(most["latents"].values()) and not any(most["teacher_kernel"].values())
        assert all(few["latents"].values())


def test_real_pictures_are_the_ceiling_of_fidelity_and_shuffled_prompts_its_floor(whole):
    for side in ("seen", "held-out"):
        real, shuffled = of(whole, "real pictures")["sides"][side], of(whole, "shuffled prompts")["sides"][side]
        assert real["top1"] > 0.7 and real["top5"] >= real["top1"]
        assert shuffled["top1"] < 0.2 and shuffled["top5"] < 0.4 and shuffled["score"] < 0.5 * real["score"]
        assert "kernel" not in shuffled and real["kernel"]["error"] > 0


def test_a_picture_is_that_of_its_seed_and_number_and_the_distance_is_to_its_own_pairs(folder, model, whole):
    """The teacher's 4 steps for held-out pairs at seed 1, without batches, meshes or the verb's own loop."""
    base, networks = tiny.load(model)
    dataset, params = emoji.load_emoji(folder, 8), base.params
    rows = emoji_pairs.choose_pairs(dataset.pictures, COUNT)["held-out"].rows
    key = jax.random.fold_in(jax.random.key(1), EVALUATION_KEY)
    noise = jax.numpy.stack([jax.random.normal(jax.random.fold_in(key, 1_000_000 + i), tiny.LATENT) for i in range(COUNT)])
    texts = [emoji.prompt(dataset.pictures[row]) for row in rows]

    @jax.jit
    def draw(noise: jax.Array, ids: jax.Array, empty: jax.Array) -> tuple[jax.Array, jax.Array]:
        context, negative = (networks.condition(base.text, each) for each in (ids, empty))
        options = dict(denoiser=networks.denoiser, schedule=networks.schedule, flow=Parameterization("epsilon"), steps=4)
        latents = sampler.sample_latents(params["unet"], noise, context, negative, guidance=GUIDANCE, **options)
        return latents, sampler.decode(networks.vae, params["vae"], latents, networks.scaling)

    latents, images = map(np.asarray, draw(noise, base.tokenizer.encode(texts), base.tokenizer.encode([""])))
    kept = arrays(folder, "whole", steps=4, seed=1, guidance=GUIDANCE)
    own = min(kept, key=lambda part: np.abs(part["latents"] - latents).max())
    assert len(kept) == 2  # the other is of the seen pairs
    np.testing.assert_allclose(own["latents"], latents, atol=1e-4)
    assert np.abs(images.astype(int) - own["pictures"]).max() <= 1
    value = kernel.kernel_distance(small_features(images), small_features(dataset.images[rows]), paired=True)
    assert of(whole, "teacher", 4)["sides"]["held-out"]["kernel"]["1"] == pytest.approx(value, rel=0.02, abs=1)


def test_the_reconstructions_are_the_floor_that_the_autoencoder_sets(folder, model, whole):
    base, dataset = pipeline.load_pipeline(model), emoji.load_emoji(folder, 8)
    rows = emoji_pairs.choose_pairs(dataset.pictures, COUNT)["seen"].rows
    images = jax.numpy.asarray(dataset.images[rows] / np.float32(127.5) - 1)
    mean, _ = base.vae.apply(base.params["vae"], images, method="encode")
    again = sampler.decode(base.vae, base.params["vae"], mean, 1.0)
    value = kernel.kernel_distance(small_features(np.asarray(again)), small_features(dataset.images[rows]), paired=True)
    assert of(whole, "autoencoder")["sides"]["seen"]["kernel"]["value"] == pytest.approx(value, rel=0.02, abs=1)
    kept = [part for part in arrays(folder, "whole", steps=2, seed=0, guidance=GUIDANCE) if len(part["features"]) == COUNT]
    values = [kernel.kernel_distance(part["features"], small_features(np.asarray(again)), paired=True) for part in kept]
    behind = of(whole, "teacher", 2)["sides"]["seen"]["decoded"]["0"]
    assert len(kept) == 2 and min(abs(value - behind) for value in values) < max(1, 0.02 * behind)


def test_the_gate_reads_the_distance_behind_the_autoencoder(whole):
    curve = {steps: of(whole, "teacher", steps)["sides"]["seen"]["decoded"] for steps in (2, 4, 8)}
    means = " / ".join(f"{np.mean(list(curve[steps].values())):.3g}" for steps in (2, 4, 8))
    assert f"{means} at 2 / 4 / 8 steps" in whole["sentences"][0]


def test_the_grid_has_a_row_a_method_and_prompts_as_heads(folder, whole):
    picture = np.asarray(Image.open(folder / "runs" / "whole" / "samples.png"))
    rows = len(whole["rows"]) - 1  # all but the shuffled prompts
    assert picture.shape[1] == 190 + 4 * 100 and 0 < picture.shape[0] - rows * 100 <= 8 * 22
    assert "<h1>whole" in (folder / "runs" / "whole" / "report.html").read_text()


def test_the_showcase_has_few_rows_and_the_differences_from_the_first(folder, whole, tmp_path, monkeypatch):
    """Row by row by stand-ins of one grey each: teacher 8 steps, teacher 2, the student, and the last two's differences."""
    assert "showcase.png" in whole["out"]
    picture = np.asarray(Image.open(folder / "runs" / "whole" / "showcase.png"))
    assert picture.shape[1] == 190 + 2 * 116 and 0 < picture.shape[0] - 5 * 116 <= 3 * 22
    gate = ConfigDict({"showcase": ("a", "b"), "showcase_steps": (8, 2)})
    experiment = SimpleNamespace(config=ConfigDict({"evaluate": {"gate": gate}}), run=tmp_path)
    monkeypatch.setattr(emoji_showcase, "read_prompts", lambda _, name, texts, noise: texts)
    flow, student = Parameterization("epsilon"), Parameterization("ddim_eps", 4)
    rows = [
        emoji_pictures.PictureRow("teacher", 0, flow, 64, GUIDANCE),
        emoji_pictures.PictureRow("4-window student", 4, student, 8, 1.0),
        emoji_pictures.PictureRow("4-window student", 4, student, 4, 1.0),
    ]
    greys, drawn = {(0, 8): 200, (0, 2): 90, (4, 4): 230}, []

    def draw(row: emoji_pictures.PictureRow, texts: tuple[str, ...]) -> np.ndarray:
        drawn.append((row.windows, row.steps, row.calls, texts))
        return np.full((len(texts), 8, 8, 3), greys[row.windows, row.steps], np.uint8)

    path = emoji_showcase.write_showcase(experiment, rows, draw)
    assert drawn == [(0, 8, 16, ("a", "b")), (0, 2, 4, ("a", "b")), (4, 4, 4, ("a", "b"))]
    column = np.asarray(Image.open(path))[22:, 190 + 56, 0]
    assert [int(column[116 * i + 56]) for i in range(5)] == [200, 90, 230, 255 - 110, 255 - 30]
    gate.showcase = ()
    assert emoji_showcase.write_showcase(experiment, rows, draw) is None


def numbers(table: dict) -> list[tuple]:
    return [(row["method"], row.get("steps"), row["sides"]) for row in table["rows"]]


def test_killed_and_resumed_it_says_the_same(folder, model, whole, monkeypatch):
    """Broken off after the first of two batches of the third set; nothing is drawn again that was kept."""
    finish_student(folder, "cut")
    save, left = emoji_pictures.weight_files.save_tensors, [5]

    def breaking(path, tensors):
        save(path, tensors)
        if "latents" in tensors:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(emoji_pictures.weight_files, "save_tensors", breaking)
        evaluate(folder, model, "cut")
    kept = {part["features"].shape[0] for part in arrays(folder, "cut")}
    assert kept == {COUNT}  # the draft of the third set never took its place
    ended = evaluate(folder, model, "cut")
    assert ended.code == 0, ended.err
    assert numbers(read_json(folder / "runs" / "cut" / "table.json")) == numbers(whole)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(emoji_reference, "reconstructions", lambda experiment, images: images)
    monkeypatch.setattr(emoji_pictures.sampler, "decode", never)
    assert evaluate(folder, model, "cut").code == 0


def test_a_set_of_which_some_batches_are_kept_is_gone_on_with(folder, model, whole):
    finish_student(folder, "half")
    shutil.copytree(folder / "runs" / "whole" / "scores", folder / "runs" / "half" / "scores")
    path = max((folder / "runs" / "half" / "scores").glob("emoji-*.safetensors"), key=lambda p: p.stat().st_size)
    part = load_file(path)
    short = {name: value if name == "seconds" else value[:BATCH].copy() for name, value in part.items()}
    emoji_pictures.weight_files.save_tensors(path, short)
    assert evaluate(folder, model, "half").code == 0
    again = load_file(path)
    for name in ("features", "latents", "pictures"):
        np.testing.assert_array_equal(again[name], part[name])


def test_both_words_of_a_seed_count(folder, model):
    rows = {"evaluate__teacher_steps": "(2,)", "evaluate__student_steps": "()", "evaluate__gate__guidance": "()"}
    ended = evaluate(folder, model, "seeds", evaluate__seeds=f"(5, {5 + 2**32}, {2**64 - 1})", **rows)
    assert ended.code == 0, ended.err
    scores = of(read_json(folder / "runs" / "seeds" / "table.json"), "teacher", 2)["sides"]["seen"]["kernel"]
    assert len(set(scores.values())) == 3


def test_what_cannot_be_measured_is_refused_in_a_line(folder, model, tmp_path):
    cases = {
        "evaluate.examples=4 must be at least 10": {"evaluate__examples": 4},
        "evaluate.columns=17 must be in": {"evaluate__columns": 17},
        "showcase has 17 prompts, at most 16": {"evaluate__gate__showcase": str(("a",) * 17)},
        "showcase_steps=(8,) must be two numbers": {"evaluate__gate__showcase_steps": "(8,)"},
        "showcase_steps=(8, 0) must be": {"evaluate__gate__showcase_steps": "(8, 0)"},
        "evaluate.batch=9": {"evaluate__batch": 9},
        "set --config.evaluate.images": {"evaluate__images": tmp_path},
        "teacher_steps is empty": {"evaluate__teacher_steps": "()"},
        "guidance_examples=5": {"evaluate__gate__guidance_examples": 5},
        "evaluate.seeds=(0, 0)": {"evaluate__seeds": "(0, 0)"},
        "gate.shipped_steps=(4,) must be ()": {"evaluate__gate__shipped_steps": "(4,)", "model__student": ""},
    }
    for text, fields in cases.items():
        ended = evaluate(folder, model, "refused", **fields)
        assert ended.code == 2 and text in ended.err.strip().splitlines()[-1], (text, ended.err)
    assert not (folder / "runs" / "refused").exists()
    ended = run("evaluate", f"--config={ROOT / 'configs' / 'digits.py'}", "--config.evaluate.protocol=emoji")
    assert ended.code == 2 and "--config=emoji has" in ended.err


def test_the_student_that_comes_along_has_its_rows_and_seen_prompts_may_stand_alone(folder, model, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(model, student)
    scheduler = student / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(read_json(scheduler) | {"prediction": "ddim_eps", "windows": 2, "path": "linear"}))
    rows = {"gate__held_out": False, "gate__shipped_steps": "(4, 2)", "gate__guidance_examples": COUNT, "columns": 16}
    words = {f"evaluate__{name}": value for name, value in rows.items()}
    ended = evaluate(folder, model, "shipped", model__student=student, **words)
    assert ended.code == 0, ended.err
    table = read_json(folder / "runs" / "shipped" / "table.json")
    shipped = {row["steps"]: row for row in table["rows"] if row["method"] == "shipped student"}
    assert list(shipped) == [4, 2] and shipped[4]["calls"] == 4
    untrained = of(table, "teacher, guidance", 2, 1.0)["sides"]["seen"]  # its weights are the base model's: it draws the same
    assert shipped[2]["sides"]["seen"]["kernel"]["0"] == pytest.approx(untrained["kernel"]["0"], abs=1e-3)
    assert all(set(row["sides"]) <= {"seen"} for row in table["rows"]) and "held-out" not in ended.out
    assert "seen pairs: shipped student against the teacher, 4 steps: nearer" in "\n".join(table["sentences"])
    assert Image.open(folder / "runs" / "shipped" / "samples.png").width > COUNT * 96  # as many columns as there are pictures


def test_a_student_of_another_base_model_is_left_out_in_words(folder, model):
    few = {"student_steps": "()", "gate__guidance": "()", "gate__shipped_steps": "(4,)", "teacher_steps": "(2,)"}
    words = {f"evaluate__{name}": value for name, value in few.items()}
    ended = evaluate(folder, model, "strange", model__student=ROOT / "proreflow_jax" / "assets" / "emoji_student", **words)
    assert ended.code == 0 and "is of another base model: its rows are left out" in ended.err, ended.err
    assert {row["method"] for row in read_json(folder / "runs" / "strange" / "table.json")["rows"][3:]} == {"teacher"}


def test_pictures_that_are_no_numbers_are_named_by_their_prompts(folder, model, monkeypatch):
    def spoilt(experiment: Experiment, stage: Stage | None) -> Weights:
        return Weights(
            {name: np.nan * value for name, value in experiment.denoiser.params().items()}, experiment.flow, "spoilt"
        )

    monkeypatch.setattr(score_emoji, "load_weights", spoilt)
    ended = evaluate(folder, model, "spoilt", evaluate__gate__guidance="()")
    last = ended.err.splitlines()[-1]
    assert ended.code == 1 and "thing" in last and "--config.model.sampling_dtype=float32" in last, ended.err
    assert not list((folder / "runs" / "spoilt" / "scores").glob("*.safetensors"))
