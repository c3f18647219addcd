"""FID and CLIP score by COCO's protocols, on a made COCO: what is said, killed and resumed, other meshes, what is refused.

Networks of a few operations stand in for Stable Diffusion where a law is tested; the verb itself runs with a whole tiny model.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import made_coco
import numpy as np
import pytest
import tiny
from verb import ROOT, quickly, run, tiny_flags

from configs import digits
from proreflow_jax.data import coco
from proreflow_jax.evaluation import clip_score, fid, frechet, judges, moments, protocols
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.solvers import make_step
from proreflow_jax.jobs import score_coco, score_plan
from proreflow_jax.models import inception
from proreflow_jax.pretrained import weights
from proreflow_jax.reflow.pairs import make_predict
from proreflow_jax.run.experiment import BaseDenoiser, Experiment, Weights
from proreflow_jax.run.stages import EVALUATION_KEY, Stage, plan_stages
from proreflow_jax.runtime import mesh
from proreflow_jax.storage.atomic import read_json

FEATURE_NETWORK = judges.feature_network
COUNT, BATCH, SEEDS, GUIDANCE = 20, 8, (0, 1), 4.0
FIELDS = {
    "protocol": "coco2017-5k",
    "examples": COUNT,
    "seeds": SEEDS,
    "batch": BATCH,
    "teacher_steps": (4,),
    "student_steps": ((2, 2),),
}


@pytest.fixture(scope="module", autouse=True)
def quick(programs):
    with quickly(programs) as patch:
        patch.setattr(jax, "jit", tiny.quick_jit)  # verbs as they are, but for XLA's optimizations
        patch.setattr(judges, "feature_network", made_coco.small_network)
        patch.setattr(clip_score, "load_clip", cache(clip_score.load_clip))  # drawing it is most of its cost
        patch.setattr(score_coco, "SAVE_EVERY", 1)
        patch.setattr(score_coco, "load_weights", partial(load_weights, score_coco.load_weights))
        patch.setattr(score_coco, "check_taught", lambda *_: None)  # a toy has no plan; doors have their own tests
        yield


def load_weights(real: Callable, experiment: Experiment, stage: Stage | None) -> Weights:
    """A toy's student is its teacher with larger weights; other experiments load theirs."""
    if not isinstance(experiment.base, SimpleNamespace):
        return real(experiment, stage)
    params = {name: value * (1.1 if stage else 1.0) for name, value in experiment.denoiser.params().items()}
    return Weights(params, Parameterization("ddim_eps", 2) if stage else experiment.flow, "student" if stage else "teacher")


class Made(SimpleNamespace):
    """A folder with all that the flags name: `flags` of config.evaluate, `coco` (captions, images)."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("scores")
    captions, images = made_coco.write_coco(folder)
    (folder / "inception.safetensors").touch()
    clip = made_coco.write_clip(folder / "clip-tiny")
    flags = {"captions": captions, "images": images, "inception": folder / "inception.safetensors", "clip": clip}
    return Made(folder=folder, coco=(captions, images), flags={name: str(path) for name, path in flags.items()})


def config(made: Made, name: str = "toy", dtype: str = "float32", **fields: object):
    c = digits.get_config()
    c.model.sampling_dtype = dtype
    c.name, c.root, c.stages = name, str(made.folder / "runs"), (2,)
    c.evaluate.update({**FIELDS, **made.flags, **fields})
    return c.lock()


def toy(made: Made, name: str, devices: int = 2, fsdp: int = 1, **fields: object) -> Experiment:
    """An experiment whose networks are toys; the digits of a word's letters are its ids."""
    c, networks = config(made, name, **fields), tiny.toy_networks()
    frozen = tiny.toy_frozen(networks)
    encode = lambda texts: np.array([[(ord(l) - 32) % 40 for l in f"{text:<{tiny.LENGTH}}"[-tiny.LENGTH :]] for text in texts])
    base = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=encode),
        text=frozen.text,
        params={"vae": frozen.vae},
        networks={},
        scheduler=tiny.BETAS,
        latent_shape=tiny.LATENT,
    )
    run, machine = Path(c.root) / name, mesh.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
    flow, unet = Parameterization("epsilon"), BaseDenoiser(lambda: frozen.teacher)
    plan = plan_stages(c, run, flow, tiny.LATENT)
    for stage in plan:
        stage.folder.mkdir(parents=True, exist_ok=True)
        stage.done.touch()
    return Experiment(c, run, base, unet, networks, flow, plan, None, machine, dict)


def kept(made: Made, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (made.folder / "runs" / name / "scores").glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(made) -> list[dict]:
    """Both rows on 2 devices, never stopped."""
    return score_coco.score_coco(toy(made, "whole"))


def test_numbers_are_said_with_their_protocol_seeds_and_spread(made, whole):
    assert [(row["method"], row["steps"]) for row in whole] == [("teacher", 4), ("2-window student", 2)]
    row, folder = whole[1], made.folder / "runs" / "whole"
    fids = [*row["fid"].values()]
    mean, spread, odd = np.mean(fids), np.std(fids, ddof=1), "images 20 instead of 5,000, real images 24 instead of 5,000, "
    assert tuple(row["fid"]) == tuple(row["clip"]) == SEEDS and mean > 0.01 and spread > 0
    assert whole[0]["fid"] != row["fid"] and whole[0]["digest"] != row["digest"]
    text = row["statement"]
    assert text.startswith(f"FID {mean:.2f} +- {spread:.2f}, CLIP score {np.mean([*row['clip'].values()]):.2f} +- ")
    assert f" by clip-tiny; seeds 0, 1; coco2017-5k, 2 steps, 20 images, guidance 4, float32, {inception.NAME}; " in text
    assert text.endswith(f"the protocol's: {odd}seeds 0, 1 instead of 0, 1, 2, CLIP clip-tiny instead of ViT-g/14")
    assert "steps 4" not in text and "steps" not in whole[0]["statement"].split("protocol's")[1]

    found, table = read_json(folder / "scores.json"), (folder / "scores.md").read_text()
    assert found["rows"] == json.loads(json.dumps(whole)) and found["real"] == 24
    assert set(found["networks"]) == {"inception", "clip"} and found["protocol"]["name"] == "coco2017-5k"
    assert table.startswith("| method ") and all(row["statement"] in table for row in whole)


def test_they_are_the_numbers_of_images_drawn_and_judged_one_by_one(made, whole):
    """The student's row at seed 1 without batches, meshes or files."""
    experiment = toy(made, "single", devices=1)
    split, n, base = coco.open_official(*made.coco, 2017), experiment.networks, experiment.base
    texts, clip = coco.first_captions(split, COUNT), clip_score.load_clip(Path(made.flags["clip"]))
    student = {name: 1.1 * value for name, value in experiment.denoiser.params().items()}
    predict = lambda z, t, context: make_predict(n.denoiser, n.schedule, student)(z, t, context)
    against = n.condition(base.text, jax.numpy.asarray(base.tokenizer.encode([""])))
    nodes = windows.sampling_nodes(2, 2).astype(np.float32)

    @jax.jit
    def draw(i, ids):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), EVALUATION_KEY), i)
        guided = solvers.guided(predict, n.condition(base.text, ids), against, GUIDANCE)
        step = make_step(Parameterization("ddim_eps", 2), n.schedule, guided)
        return n.vae.apply(
            base.params["vae"], solvers.solve(step, jax.random.normal(key, (1, 4, 4, 4)), nodes) / n.scaling, "decode"
        )

    network, params = made_coco.small_network(Path(), "")
    shape = lambda image: fid.prepare_images(image, protocols.PROTOCOLS["coco2017-5k"])
    real = [shape(coco.decode_coco_image(split.read(i), "")) for i in range(24)]
    images = [
        np.round(np.clip(draw(i, base.tokenizer.encode([text]))[0] / 2 + 0.5, 0, 1) * 255) for i, text in enumerate(texts)
    ]
    drawn = np.stack([shape(np.asarray(image, np.uint8)) for image in images])
    features = [network.apply(params, jax.numpy.asarray(np.stack(part))) for part in (drawn, real)]
    assert whole[1]["fid"][1] == pytest.approx(frechet.frechet_distance(*map(frechet.moments, features)), rel=1e-4)
    words = clip_score.read_tokenizer(Path(made.flags["clip"])).encode(texts)
    found = np.asarray(
        jax.jit(clip_score.make_scores(clip.text, clip.image))(clip.params, clip_score.prepare_clip(drawn, 16), words)
    )
    assert whole[1]["clip"][1] == pytest.approx(found.mean(), rel=1e-4)
    assert len(np.unique(words, axis=0)) == COUNT and found.std() > 0.1  # prompts and pictures tell
    assert whole[1]["clip_standard_error"][1] == pytest.approx(found.std(ddof=1) / math.sqrt(COUNT), rel=1e-3)


def test_measured_once_it_is_only_read(made, whole, monkeypatch):
    monkeypatch.setattr(fid, "prepare_images", None)  # would raise for any image, real or drawn
    assert score_coco.score_coco(toy(made, "whole")) == whole


def test_killed_and_resumed_it_says_the_same_bit_for_bit(made, whole, monkeypatch):
    """Broken off after each of three savings and once between two; three batches a seed, of 8, 8 and 4 images."""
    save = moments.save_moments

    def breaking(before: int, left: list[int]) -> Callable:
        def once(path, parts):
            left[0] -= 1
            if left[0] == 0 and before:
                raise KeyboardInterrupt
            save(path, parts)
            if left[0] == 0:
                raise KeyboardInterrupt

        return once

    for after, before in ((1, False), (2, True), (3, False), (2, False)):
        monkeypatch.setattr(moments, "save_moments", breaking(before, [after]))
        with pytest.raises(KeyboardInterrupt):
            score_coco.score_coco(toy(made, "killed"))
    monkeypatch.setattr(moments, "save_moments", save)
    assert score_coco.score_coco(toy(made, "killed")) == whole
    assert kept(made, "killed") == kept(made, "whole") and len(kept(made, "whole")) == 4


@pytest.mark.parametrize(("devices", "fsdp", "batch"), [(1, 1, 5), (4, 2, 8)])
def test_on_1_2_and_4_devices_and_in_other_batches_the_numbers_are_the_same(made, whole, devices, fsdp, batch):
    (found,) = score_coco.score_coco(toy(made, f"mesh-{devices}", devices, fsdp, teacher_steps=(), batch=batch))
    for name in ("fid", "clip", "clip_standard_error"):
        assert found[name] == pytest.approx(whole[1][name], rel=1e-6), name


def test_each_thing_they_depend_on_makes_other_numbers_and_files(made, whole):
    """Guidance, steps, a seed, the count, the prompts' protocol; real images are judged once for each way of preparing them."""
    one = dict(teacher_steps=(4,), student_steps=(), seeds=(0,))
    first = {name for name, _ in kept(made, "whole").items()}
    found = [whole[0]["fid"][0]]
    seeds = {"seeds": (2,)}, {"seeds": (2 + 2**32,)}, {"seeds": (2**64 - 1,)}
    for i, fields in enumerate(({"guidance": 1.0}, {"teacher_steps": (2,)}, *seeds, {"examples": 19})):
        (row,) = score_coco.score_coco(toy(made, f"other-{i}", **{**one, **fields}))
        found.append(next(iter(row["fid"].values())))
        assert not first & set(kept(made, f"other-{i}"))
    assert len(set(found)) == 7
    (half,) = score_coco.score_coco(toy(made, "half", dtype="bfloat16", **one))
    assert ", bfloat16, " in half["statement"] and half["fid"] != whole[0]["fid"] and not first & set(kept(made, "half"))
    reference = made.folder / "runs" / "reference"
    assert len([*reference.glob("*.safetensors")]) == 1
    score_coco.score_coco(toy(made, "no-clip", clip="", **one))
    assert len([*reference.glob("*.safetensors")]) == 1


def test_pictures_of_no_numbers_are_not_judged(made):
    """They would be black, and the FID a number."""
    loud = toy(made, "loud")
    params = {
        name: np.full_like(value, 3e38) if "conv_out" in name else value for name, value in loud.denoiser.params().items()
    }
    with pytest.raises(FloatingPointError, match=r"latents of \d of 8 pictures are not finite, of '.*take --config.model.samp"):
        score_coco.score_coco(loud._replace(denoiser=BaseDenoiser(lambda: params)))
    assert not (loud.run / "scores.json").exists() and kept(made, "loud") == {}


def test_without_clip_it_says_so(made, whole):
    (row,) = score_coco.score_coco(toy(made, "no-clip", clip="", seeds=(0,), teacher_steps=(4,), student_steps=()))
    assert row["fid"][0] == whole[0]["fid"][0] and row["clip"] == {}
    assert row["statement"].startswith(f"FID {row['fid'][0]:.2f}; seed 0 only, spread unknown; coco2017-5k")
    assert row["statement"].endswith("CLIP none instead of ViT-g/14")


def test_a_students_missing_stage_is_named_before_anything_is_drawn(made):
    experiment = toy(made, "missing")
    (experiment.run / "stage-2" / "DONE.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"stage-2/DONE\.json is missing: run distill"):
        score_coco.score_coco(experiment)
    assert not (experiment.run / "scores").exists()


def test_what_cannot_be_measured_is_refused_in_one_line(made, tmp_path):
    other, _ = made_coco.write_coco(tmp_path, 2014)
    short, few = made_coco.write_coco(tmp_path / "short", 2017, 9)
    next(few.glob("*.png")).unlink()
    (tmp_path / "bad.json").write_text("[1]")
    cases = [
        ({"protocol": "coco"}, ValueError, "protocol=coco is none of coco2014-30k, coco2017-5k, digits"),
        ({"protocol": "digits"}, ValueError, "protocol=digits has a table of its own"),
        ({"examples": 1}, ValueError, "examples=1 must be at least 2"),
        ({"examples": 25}, ValueError, "24 prompts of 25: lower --config.evaluate.examples"),
        ({"examples": 0}, ValueError, "names 24 images, coco2017-5k rests on 5,000: give the official file"),
        ({"seeds": (0, 0)}, ValueError, "evaluate.seeds=(0, 0) must be different whole numbers"),
        ({"seeds": (-1,)}, ValueError, "evaluate.seeds=(-1,) must be different whole numbers from 0 to 1844"),
        ({"seeds": (0, 0.5)}, ValueError, "evaluate.seeds=(0, 0.5) must be different whole numbers from 0 to 1844"),
        ({"seeds": (2**64,)}, ValueError, f"evaluate.seeds=({2**64},) must be different whole numbers from 0 to 1844"),
        ({"guidance": -1.0}, ValueError, "evaluate.guidance=-1.0 must not be negative"),
        ({"inception": ""}, ValueError, "--config.evaluate.inception is empty"),
        (
            {"inception": str(tmp_path / "no.safetensors")},
            FileNotFoundError,
            "no.safetensors is not a file: --config.evaluate.inc",
        ),
        ({"inception": "w.pth"}, ValueError, "inception=w.pth is a pickle, which may run code"),
        ({"clip": str(tmp_path / "no")}, FileNotFoundError, "no is not a folder: --config.evaluate.clip"),
        ({"images": ""}, ValueError, "--config.evaluate.images is empty"),
        ({"images": str(tmp_path / "no")}, FileNotFoundError, "no is not a folder: --config.evaluate.images"),
        ({"captions": ""}, ValueError, "--config.evaluate.captions is empty"),
        ({"captions": str(tmp_path / "no.json")}, FileNotFoundError, "no.json is not a file: --config.evaluate.captions"),
        ({"captions": str(other)}, ValueError, "is of the year 2014, the protocol is of 2017: --config.evaluate.captions"),
        ({"captions": str(tmp_path / "bad.json")}, ValueError, "bad.json is no captions file of COCO"),
        ({"captions": str(short), "images": str(few)}, FileNotFoundError, "lacks 1 of 9 images"),
    ]
    score_plan.check_scores(config(made))
    for fields, kind, line in cases:
        with pytest.raises(kind) as caught:
            score_plan.check_scores(config(made, **fields))
        assert line in str(caught.value) and "\n" not in str(caught.value), fields
    with pytest.raises(ValueError, match=r"evaluate\.batch=7 must be a positive multiple of 2 devices"):
        score_coco.score_coco(toy(made, "odd", batch=7))


@pytest.mark.slow
def test_the_printed_command_makes_of_a_pth_what_our_reader_reads(tmp_path):
    """As published: an OrderedDict of torch's tensors with batch norm's counters."""
    torch = pytest.importorskip("torch")
    shapes = inception.make_inception().shapes
    tensors = {name: torch.from_numpy(value) for name, value in weights.to_torch(inception_weights()).items()}
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(tensors, tmp_path / "pt_inception.pth")
    with pytest.raises(ValueError) as caught:
        score_plan._check_file("pt_inception.pth")
    command = str(caught.value).split("python -c ", 1)[1].rsplit(", and name", 1)[0]
    subprocess.run([sys.executable, "-c", command.strip('"')], cwd=tmp_path, check=True)
    found = judges.read_inception(tmp_path / "inception.safetensors")
    assert found.keys() == shapes.keys()
    name = "Mixed_7c.branch1x1.conv.weight"
    np.testing.assert_array_equal(found[name].transpose(3, 2, 0, 1), tensors[name].numpy())


def test_the_command_is_in_the_docs_too():
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    assert score_plan.CONVERT.format(path="pt_inception-2015-12-05-6726825d.pth") in page


def inception_weights() -> dict[str, np.ndarray]:
    """At random, of a size that keeps differences between images alive through 94 layers."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("running_var"):
            return 0.2 + 0.1 * np.abs(noise)
        return noise / np.prod(shape[:-1]) ** 0.5 if len(shape) > 1 else 0.1 * noise + name.endswith("bn.weight")

    return {name: draw(name, kind.shape).astype(np.float32) for name, kind in inception.make_inception().shapes.items()}


VERB = {
    "stages": "(2,)",
    "export__stages": "()",
    "train__steps": 2,
    "train__ema": 0,
    "pairs__examples": 16,
    "evaluate__protocol": "coco2017-5k",
    "evaluate__examples": COUNT,
    "evaluate__seeds": SEEDS,
    "evaluate__batch": BATCH,
}


def words(made: Made, **fields: object) -> list[str]:
    """The verb's flags, with a whole tiny model."""
    model = made.folder / "model"
    if not model.exists():
        tiny.write_model(model)
    flags = {f"evaluate__{name}": value for name, value in made.flags.items()}
    return tiny_flags(made.folder, model, **{**VERB, **flags, **fields})


def test_the_verb_takes_the_protocol_from_its_flags(made, monkeypatch):
    """A whole tiny Stable Diffusion; the line that is printed is the statement."""
    monkeypatch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:1]))
    rows = {"evaluate__teacher_steps": "(2,)", "evaluate__student_steps": "()", "evaluate__seeds": "(3,)"}
    ended = run("evaluate", *words(made, name="verb", **rows))
    assert ended.code == 0, ended.err
    (row,) = read_json(made.folder / "runs" / "verb" / "scores.json")["rows"]
    assert ended.out.splitlines()[0] == f"teacher: {row['statement']}" and row["fid"]["3"] > 0.01
    refused = run("evaluate", *words(made, name="verb", evaluate__inception="x.pth"))
    assert refused.code == 2 and refused.err.startswith("evaluate: --config.evaluate.inception=x.pth is a pickle")
    assert refused.err.count("\n") == 1


@pytest.mark.slow
def test_a_distilled_run_is_scored_with_inception_itself(made, tmp_path):
    """distill, then evaluate: Inception at full size with random weights through its file; on 1 device and on 4."""
    path, found = tmp_path / "inception.safetensors", []
    weights.save_tensors(path, weights.to_torch(inception_weights()))
    rows = {"evaluate__teacher_steps": "(4,)", "evaluate__student_steps": "((2, 2),)"}
    flags = words(made, name="real", root=tmp_path / "runs", evaluate__inception=path, **rows)
    for devices in (1, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judges, "feature_network", FEATURE_NETWORK)
            patch.setattr(mesh, "make_mesh", partial(mesh.make_mesh, devices=jax.devices()[:devices]))
            for verb in ("distill", "evaluate"):
                ended = run(verb, *flags)
                assert ended.code == 0, ended.err
        found.append(read_json(tmp_path / "runs" / "real" / "scores.json")["rows"])
        for folder in ("real/scores", "reference"):
            shutil.rmtree(tmp_path / "runs" / folder)
    assert [row["method"] for row in found[0]] == ["teacher", "2-window student"]
    for row, other in zip(*found, strict=True):
        assert row["fid"]["0"] > 0
        for name in ("fid", "clip"):
            assert row[name] == pytest.approx(other[name], rel=1e-6)
