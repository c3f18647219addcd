"""The caching job: from its latents come the pairs that come from the images, and nobody else's latents are taken."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from made_images import LAYOUTS, encode, originals
from safetensors.numpy import load_file, save_file
from test_perf_plan import described
from test_verbs_pod import run_pod
from verb import run, tiny_config, tiny_flags

from proreflow_jax.data import records
from proreflow_jax.perf import jobs
from proreflow_jax.run import dataset, open
from proreflow_jax.runtime import mesh
from proreflow_jax.storage.atomic import read_json

pytestmark = pytest.mark.usefixtures("quick")
SHORT = {"stages": "(2,)", "export__stages": "()", "train__steps": 2, "optimizer__warmup_steps": 0, "pairs__examples": 16}
DRAWN = {"pairs__start": "data", "pairs__prompt_dropout": 0.5, "pairs__guidance": 2.0}
VAE = "diffusion_pytorch_model.safetensors"
KEPT = {"cache__shard_size": 4, "cache__batch": 8, "cache__text": True}


class Place:
    """A folder with a model and a dataset of seven images, of which one is bad."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        (folder / "images").mkdir(parents=True)
        rows = originals({3: encode(3)[:90]})
        self.images = {f"data__{name}": value for name, value in LAYOUTS["jsonl"](folder / "images", rows).items()}
        self.images |= {"data__max_bad": 0.2}

    def flags(self, name: str, **fields: object) -> list[str]:
        return tiny_flags(self.folder, fields.pop("model", self.model), **{**SHORT, **DRAWN, **KEPT, "name": name, **fields})

    def cache(self, out: Path, **fields: object) -> None:
        ended = run("cache", *self.flags("cache", **{**self.images, **fields}), f"--out={out}")
        assert ended.code == 0, ended.err

    def pairs(self, name: str, **fields: object) -> dict[str, np.ndarray]:
        """All pairs of the stage, stacked."""
        ended = run("make_pairs", *self.flags(name, **fields), "--stage=2")
        assert ended.code == 0, ended.err
        made = records.PairRecords(self.folder / "runs" / name / "stage-2" / "pairs")
        return {key: np.stack([made[i][key] for i in range(16)]) for key in made[0]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Place:
    """With a finished cache in folder/cache. Tests only read it."""
    found = Place(tmp_path_factory.mktemp("caching"), model)
    found.cache(found.folder / "cache")
    return found


def in_cache(folder: Path) -> dict[str, object]:
    return {"data__kind": "cached", "data__path": str(folder)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.slow  # test_reflow_pairs has the same law of one batch
def test_pairs_from_the_cache_are_those_from_the_images(place):
    """Order, noise, dropped prompts and all; and the model's encoders are not asked again."""
    wanted = place.pairs("images", **place.images)
    found = place.pairs("cached", **in_cache(place.folder / "cache"))
    assert found.keys() == wanted.keys() == {"states", "first", "ids"}
    assert len(set(map(tuple, wanted["ids"]))) > 3
    np.testing.assert_array_equal(found["ids"], wanted["ids"])
    np.testing.assert_array_equal(found["first"], wanted["first"])
    np.testing.assert_allclose(found["states"], wanted["states"], rtol=1e-6, atol=2e-6 * np.abs(wanted["states"]).max())


def test_a_stopped_job_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    begun, calls = records.open_shard, []

    def stopped(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return begun(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(records, "open_shard", stopped)
        ended = run("cache", *place.flags("cache", **place.images), f"--out={tmp_path / 'cache'}")
    assert ended.code == 130 and not (tmp_path / "cache" / records.MANIFEST).exists()
    refused = run("make_pairs", *place.flags("early", **in_cache(tmp_path / "cache")), "--stage=2")
    assert refused.code == 2 and "unfinished" in refused.err.splitlines()[-1]
    place.cache(tmp_path / "cache")
    whole = contents(place.folder / "cache")
    assert contents(tmp_path / "cache") == whole and len(whole) == 2 + 2 * 2
    place.cache(tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole


def test_a_cache_of_another_model_or_data_is_refused(place, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=5)
    asked = run("make_pairs", *place.flags("other", model=other, **in_cache(place.folder / "cache")), "--stage=2")
    assert asked.code == 2 and "the autoencoder differs" in asked.err.splitlines()[-1]
    begun = run("cache", *place.flags("x", **place.images, model=other), f"--out={place.folder / 'cache'}")
    assert begun.code == 2 and "take another folder by --out" in begun.err and len(begun.err.splitlines()) == 1
    assert not (place.folder / "runs" / "other").exists()


def test_a_cache_is_made_by_the_vae_that_is_named(place, tmp_path):
    """Of latents and record alike; with the model's own VAE its latents are refused."""
    own = load_file(place.model / "vae" / VAE)
    save_file({name: value + np.float32(0.01) for name, value in own.items()}, tmp_path / "tuned.safetensors")
    tuned = {"model__vae": tmp_path / "tuned.safetensors"}
    place.cache(tmp_path / "cache", **tuned)
    folders = (tmp_path / "cache", place.folder / "cache")
    means = [records.PairRecords(folder)[0]["mean"].astype(np.float32) for folder in folders]
    assert np.abs(means[0] - means[1]).max() > 1e-2
    assert len({read_json(folder / "plan.json")["model"]["vae"] for folder in folders}) == 2
    refused = run("make_pairs", *place.flags("own", **in_cache(tmp_path / "cache")), "--stage=2")
    assert refused.code == 2 and "the autoencoder differs" in refused.err and "vae" in refused.err.splitlines()[-1]
    place.pairs("tuned", **tuned, **in_cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("fields", "out", "said"),
    [
        ({}, "", "--out is empty"),
        ({}, "images", "holds other files"),
        ({"data__kind": "prompts", "cache__text": False}, "new", "--config.data.kind=prompts has no images"),
        ({"data__kind": "cached"}, "new", "--config.data.kind=cached has no images"),
        ({"cache__batch": 12, "mesh__data": 8}, "new", "--config.cache.batch=12"),
        ({"cache__storage": "int8"}, "new", "--config.cache.storage"),
        ({"data__resolution": 16, "pairs__start": "noise"}, "new", "--config.data.resolution=16 must be 8"),
    ],
)
def test_what_cannot_be_cached_is_one_line(place, fields, out, said):
    named = place.folder / out if out else ""
    ended = run("cache", *place.flags("x", **{**place.images, **fields}), f"--out={named}")
    assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (place.folder / "new").exists()


@pytest.mark.slow
def test_half_precision_is_near_and_without_texts_any_encoders_do(place, tmp_path):
    wanted = place.pairs("wanted", **place.images)
    place.cache(tmp_path / "half", cache__storage="float16", cache__text=False)
    found = place.pairs("half", **in_cache(tmp_path / "half"))
    assert 0 < np.abs(found["states"] - wanted["states"]).max() < 5e-3 * np.abs(wanted["states"]).max()
    kept = records.PairRecords(tmp_path / "half")[0]
    assert kept.keys() == {"index", "caption", "mean", "std"} and kept["mean"].dtype == np.float16

    spoken = tmp_path / "spoken"
    shutil.copytree(place.model, spoken)
    other = tiny.write_model(tmp_path / "other", seed=5)
    shutil.rmtree(spoken / "text_encoder")
    shutil.copytree(other / "text_encoder", spoken / "text_encoder")
    place.pairs("spoken", model=spoken, **in_cache(tmp_path / "half"))
    refused = run("make_pairs", *place.flags("no", model=spoken, **in_cache(place.folder / "cache")), "--stage=2")
    assert refused.code == 2 and "a text encoder differs" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["v1", "xl"])
def test_online_training_learns_the_same(tmp_path, family):
    families = pytest.importorskip("families")
    place = Place(tmp_path / "place", families.write(tmp_path / "model", family))
    side = {"data__resolution": 8, "pairs__mode": "online", "train__batch": 8}
    place.cache(tmp_path / "cache", **side)
    losses = []
    for name, data in (("images", place.images), ("cached", in_cache(tmp_path / "cache"))):
        ended = run("distill", *place.flags(name, **side, **data))
        assert ended.code == 0, ended.err
        lines = (place.folder / "runs" / name / "stage-2" / "metrics.jsonl").read_text().splitlines()
        losses.append([float(line.split('"loss": ')[1].split(",")[0]) for line in lines])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_write_the_cache_of_one(place, tmp_path):
    flags = place.flags("pod", **place.images)
    ended = run_pod("cache", [*flags, f"--out={tmp_path / 'cache'}"], 2, 4, tmp_path)
    assert ended.returncode == 0, ended.stderr
    plans = [read_json(folder / "plan.json") for folder in (tmp_path / "cache", place.folder / "cache")]
    assert plans[0] == plans[1]
    ours, theirs = (records.PairRecords(folder) for folder in (tmp_path / "cache", place.folder / "cache"))
    for i in range(7):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours[i], theirs[i])


@pytest.mark.parametrize("start", ["data", "noise"])
def test_plan_counts_what_the_cache_hands_over(place, start):
    fields = {
        "stages": (2,),
        "export__stages": (),
        **DRAWN,
        "pairs__start": start,
        "cache__text": True,
        **in_cache(place.folder / "cache"),
    }
    config = tiny_config(place.folder, place.model, **fields)
    real, shapes = open.open_experiment(config), open.open_outline(config, jax.devices())
    rows = dataset.read_rows(real.config, real.base.tokenizer, dataset.open_source(real.config, real.base), np.arange(16))
    assert rows.keys() == {"index", "ids", "text"} | ({"mean", "std"} if start == "data" else set())
    assert described(jobs.prompt_shapes(shapes, 16)) == described(mesh.put_batch(real.mesh, rows, 16))
