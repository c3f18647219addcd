"""FID: moments that merge, stop and go on without a trace; features that no mesh changes; protocols that say what they are."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from proreflow_jax.data import coco
from proreflow_jax.evaluation import clip_score, fid, frechet, moments, protocols
from proreflow_jax.models import inception
from proreflow_jax.runtime.mesh import make_mesh

WIDTH = 24


def draw(seed, n=200, d=WIDTH, mean=0.0):
    """Correlated features."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + mean


def pictures(seed, n, size=8):
    """Images whose sets differ: the seed moves their colours."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(90 + 30 * seed, 50, (n, size, size, 3)), 0, 255).astype(np.uint8)


def cut(rows, sizes):
    return np.split(rows, np.cumsum(sizes)[:-1])


def gathered(parts):
    seen = moments.empty(WIDTH)
    for part in parts:
        seen = moments.merge_moments(seen, moments.moments_of(part))
    return seen


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(200,), (1, 100, 0, 64, 35), (1,) * 200])
def test_moments_in_parts_are_those_of_the_whole_also_far_from_zero(sizes, mean):
    rows = draw(0, mean=mean)
    seen = gathered(cut(rows, sizes))
    found_mean, covariance = moments.gaussian(seen)
    assert seen.count == 200 and found_mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(found_mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-8)


def test_shards_merge_in_any_order_and_grouping():
    a, b, c = (moments.moments_of(part) for part in cut(draw(1), (20, 80, 100)))
    left, right = moments.merge_moments(moments.merge_moments(a, b), c), moments.merge_moments(c, moments.merge_moments(b, a))
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
    nothing = moments.empty(WIDTH)
    for both in (moments.merge_moments(nothing, a), moments.merge_moments(a, nothing)):
        assert all(np.array_equal(one, other) for one, other in zip(both, a, strict=True))
    assert moments.merge_moments(nothing, nothing).count == 0


@pytest.mark.parametrize("n", [500, 10])
def test_the_distance_is_scipys_and_torch_fidelitys(n):
    """Their two formulas, on the same float32 features; with 10 rows of 64 features the covariances are singular."""
    first, second = draw(0, n, 64).astype(np.float32), draw(1, n, 64, mean=0.3).astype(np.float32)
    found = fid.distance(moments.moments_of(first), moments.moments_of(second))
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    apart = np.sum((first.mean(0, np.float64) - second.mean(0, np.float64)) ** 2) + np.trace(c1) + np.trace(c2)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(np.complex128)).real.sum()  # torch_fidelity/metric_fid.py
    assert found == pytest.approx(apart - 2 * roots, rel=1e-6)
    if n > 64:  # scipy's root of a singular product is not exact
        assert found == pytest.approx(apart - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2).real), rel=1e-6)
    assert found == pytest.approx(frechet.frechet_distance(frechet.moments(first), frechet.moments(second)), rel=1e-7)


def test_one_image_has_no_distance():
    with pytest.raises(ValueError, match=r"1 examples have no covariance: raise --config\.evaluate\.examples"):
        fid.distance(moments.moments_of(draw(0)), moments.moments_of(draw(1, n=1)))


def test_moments_on_disk_come_back_bit_for_bit(tmp_path):
    path, seen = tmp_path / "m.safetensors", {"a": moments.moments_of(draw(0)), "b": moments.moments_of(draw(1, d=1))}
    moments.save_moments(path, {"a": moments.empty(WIDTH), "b": moments.empty(1)})
    moments.save_moments(path, seen)
    back = moments.load_moments(path, {"a": WIDTH, "b": 1})
    assert back["a"].count == back["b"].count == 200 and type(back["a"].count) is int
    assert all(np.array_equal(one, other) for name in seen for one, other in zip(back[name], seen[name], strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    for widths, said in (({"a": 7, "b": 1}, "7 a, 1 b"), ({"a": WIDTH}, "24 a"), ({"a": WIDTH, "c": 1}, "24 a, 1 c")):
        with pytest.raises(ValueError, match=f"does not hold moments of {said}: move it aside"):
            moments.load_moments(path, widths)
    whole = path.read_bytes()
    for at in (-1, -100, -1000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at:][1:])
        with pytest.raises(ValueError, match="other numbers than were written: move it aside"):
            moments.load_moments(path, {"a": WIDTH, "b": 1})
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"m\.safetensors is not a readable safetensors file: move it aside"):
        moments.load_moments(path, {"a": WIDTH, "b": 1})


def small(width=WIDTH):
    """A network in small, (apply, params): shrink, mix channels, a nonlinearity, pool; and beside it an image's mean."""

    def apply(params, rows):
        x = jnp.tanh(jnp.einsum("bhwc,hwcd->bd", rows["images"] / 255.0, params["w"], precision="highest"))
        return {"f": x + params["b"], "mean": rows["images"].mean(axis=(1, 2, 3))[:, None]}

    rng = np.random.default_rng(0)
    return apply, {"w": rng.standard_normal((8, 8, 3, width)).astype(np.float32) / 8, "b": np.ones(width, np.float32)}


def features_on(devices, batch=8, fsdp=1):
    return fid.make_features(*small(), make_mesh(fsdp=fsdp, devices=jax.devices()[:devices]), batch)


def named(batches):
    return [{"images": part} for part in batches]


def test_features_keep_their_order_and_drop_what_filled_a_batch():
    apply, params = small()
    images = pictures(0, 21)
    want = apply(params, {"images": images})
    calls = []

    def batches():
        for part in cut(images, (8, 3, 8, 2)):
            calls.append(len(part))
            yield {"images": part}

    found = features_on(4, fsdp=2)(batches())
    assert calls == []  # nothing is read before it is asked for
    rows = list(found)
    assert [len(part["f"]) for part in rows] == [8, 3, 8, 2]
    for name in ("f", "mean"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in rows]), want[name], rtol=1e-5, atol=1e-6)


def test_one_shape_is_compiled_for_full_and_filled_batches():
    apply, params = small()
    traced = []
    counted = lambda p, rows: traced.append({name: array.shape for name, array in rows.items()}) or apply(p, rows)
    list(fid.make_features(counted, params, make_mesh(), 8)(named(cut(pictures(0, 13), (8, 5)))))
    assert traced == [{"images": (8, 8, 8, 3)}]


@pytest.mark.parametrize("batch", [0, -4, 6])
def test_a_batch_that_does_not_split_is_refused(batch):
    with pytest.raises(ValueError, match=rf"--config\.evaluate\.batch={batch} .* 4 devices"):
        features_on(4, batch)


def test_a_batch_larger_than_promised_is_refused():
    with pytest.raises(ValueError, match="a batch of 9 images is larger than 8: raise --config.evaluate.batch"):
        list(features_on(1)(named([pictures(0, 9)])))


WIDTHS = {"f": WIDTH, "mean": 1}
COCO = protocols.PROTOCOLS["coco2017-5k"]


def run(folder, seed, count, devices=1, sizes=8, every=2, after=None):
    """Measures `count` pictures; with `after`, the stream breaks off there, as a kill would."""
    images = pictures(seed, count)

    def rows_from(position):
        for start in range(position, count, sizes):
            if after is not None and start >= after:
                raise KeyboardInterrupt
            yield {"images": images[start : start + sizes]}

    about = fid.facts(COCO, {"f": "weights"}, f"set {seed}", count)
    return fid.measure_features(folder, about, WIDTHS, rows_from, features_on(devices), every)


def equal(one, other):
    return all(np.array_equal(*pair) for name in WIDTHS for pair in zip(one[name], other[name], strict=True))


def test_the_distance_is_the_same_on_1_2_and_4_devices(tmp_path):
    seen = [[run(tmp_path / f"{n}", seed, count, devices=n)["f"] for seed, count in ((0, 101), (1, 93))] for n in (1, 2, 4)]
    scores = [fid.distance(*pair) for pair in seen]
    assert scores[0] > 0.1 and scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_a_measurement_broken_off_and_run_again_is_bit_equal(tmp_path):
    want = run(tmp_path / "whole", 0, 75)
    for after in (24, 40, 72):  # each run goes on from what the one before had saved
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", 0, 75, after=after)
        (file,) = (tmp_path / "broken").glob("*.safetensors")
        kept = moments.load_moments(file, WIDTHS)
        assert 0 < kept["f"].count == kept["mean"].count <= after
    found = run(tmp_path / "broken", 0, 75)
    assert found["f"].count == 75 and equal(found, want)
    np.testing.assert_allclose(found["mean"].mean, pictures(0, 75).mean(), rtol=1e-6)


def test_moments_are_computed_once_for_each_thing_they_depend_on(tmp_path):
    first = run(tmp_path, 0, 16)
    assert equal(run(tmp_path, 0, 16, after=0), first)  # would raise if it read an image
    run(tmp_path, 1, 16)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.json"))) == 2
    about = fid.facts(COCO, {"f": "w"}, "i", 9)
    others = [fid.facts(COCO, *rest) for rest in (({"f": "v"}, "i", 9), ({"g": "w"}, "i", 9), ({"f": "w"}, "j", 9))]
    others += [fid.facts(COCO, {"f": "w"}, "i", 8)]
    fields = ("name", "crop", "scale", "resize", "features")
    others += [fid.facts(COCO._replace(**{field: "x"}), {"f": "w"}, "i", 9) for field in fields]
    assert fid.file_stem(about) not in {fid.file_stem(other) for other in others}
    assert len({fid.file_stem(other) for other in others}) == len(others)
    assert fid.facts(COCO._replace(guidance=2.0, steps=(1,), seeds=(9,)), {"f": "w"}, "i", 9) == about  # of no matter to them


def test_no_more_images_are_taken_than_the_count_and_no_fewer(tmp_path):
    images = pictures(0, 24)
    about = fid.facts(COCO, {"f": "w"}, "i", 13)
    rows_from = lambda start: named(cut(images[start:], (8, 8, 8)))
    seen = fid.measure_features(tmp_path, about, WIDTHS, rows_from, features_on(1))["f"]
    assert seen.count == 13
    np.testing.assert_allclose(seen.mean, small()[0](small()[1], {"images": images[:13]})["f"].mean(axis=0), rtol=1e-5)
    about = fid.facts(COCO, {"f": "w"}, "i", 30)
    with pytest.raises(ValueError, match=r"only 24 images of 30: .*--config\.evaluate\.protocol"):
        fid.measure_features(tmp_path, about, WIDTHS, rows_from, features_on(1))


def test_the_first_image_whose_features_are_not_finite_is_named(tmp_path):
    def broken(batches):
        for start, rows in zip((0, 8), features_on(1)(batches), strict=True):
            yield {"f": rows["f"], "mean": np.where(np.arange(start, start + 8)[:, None] < 11, 1.0, np.nan)}

    with pytest.raises(ValueError, match=r"mean of image 11 \(from 0\) is not finite"):
        rows_from = lambda start: named(cut(pictures(0, 16), (8, 8)))
        fid.measure_features(tmp_path, fid.facts(COCO, {}, "i", 16), WIDTHS, rows_from, broken)


def test_a_set_of_images_is_told_from_others_by_bytes_cuts_and_order():
    parts = [[b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"abc"], []]
    assert len({fid.images_hash(part) for part in parts}) == 5


def test_the_protocols_name_what_exists():
    assert {"coco2014-30k", "coco2017-5k", "digits", *protocols.EMOJI} <= set(protocols.PROTOCOLS)
    for name, row in protocols.PROTOCOLS.items():
        assert protocols.find_protocol(name) is row and row.name == name
        assert row.count > 1 and row.seeds and row.steps and row.crop in ("centre", "none")
        assert (row.features == inception.NAME) == (row.resize in inception.RESIZES) == (row.choice in coco.CHOICES)
        assert row.clip in {"none", *(named.model for named in clip_score.NAMED.values())}
        assert (row.size > 0) == hasattr(Image.Resampling, row.scale.upper())
    with pytest.raises(ValueError, match=r"--config\.evaluate\.protocol=coco is none of coco2014-30k, coco2017-5k, digits"):
        protocols.find_protocol("coco")


@pytest.mark.parametrize(("shape", "top", "left"), [((300, 480), 0, 90), ((481, 300), 90, 0), ((300, 300), 0, 0)])
def test_pictures_are_cropped_in_the_middle_and_scaled(shape, top, left):
    """481 - 300 = 181: torchvision's center_crop rounds 90.5 to even."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = fid.prepare_images(image, protocols.PROTOCOLS["coco2014-30k"])
    square = Image.fromarray(image).crop((left, top, left + 300, top + 300))
    np.testing.assert_array_equal(found, np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS)))
    assert fid.prepare_images(image, protocols.PROTOCOLS["digits"]) is image


def test_a_number_is_said_with_its_protocol_its_seeds_and_its_spread():
    kept = protocols.Conditions(4, (0, 1, 2), 5000, 5000, 4.0, "ViT-g/14")
    text = protocols.statement(COCO, {0: 22.0, 1: 23.0, 2: 24.0}, {0: 31.0, 1: 31.0, 2: 31.3}, kept)
    scores = "FID 23.00 +- 1.00, CLIP score 31.10 +- 0.17 by ViT-g/14; seeds 0, 1, 2"
    assert text == f"{scores}; coco2017-5k, 4 steps, 5,000 images, guidance 4, float32, {inception.NAME}"


def test_what_departs_from_a_protocol_is_said():
    odd = protocols.Conditions(3, (7,), 100, 5000, 3.5, "")
    text = protocols.statement(COCO, {7: 22.0}, {}, odd)
    assert text.startswith("FID 22.00; seed 7 only, spread unknown; coco2017-5k, 3 steps, 100 images, guidance 3.5, ")
    rules = ["images 100 instead of 5,000", "guidance 3.5 instead of 4", "seeds 7 instead of 0, 1, 2"]
    rules += ["CLIP none instead of ViT-g/14", "steps 3 instead of 2 or 4"]
    assert text.endswith(f"; not the protocol's: {', '.join(rules)}")
    assert protocols.departures(COCO, odd._replace(real=24))[1] == "real images 24 instead of 5,000"
    with pytest.raises(ValueError, match=r"--config\.evaluate\.seeds"):
        protocols.statement(COCO, {}, {}, odd)


def random_weight(rng, name, shape):
    """Of a size that keeps differences between images alive through 94 layers."""
    noise = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 0.2 + 0.1 * np.abs(noise)
    return noise / np.prod(shape[:-1]) ** 0.5 if len(shape) > 1 else 0.1 * noise + name.endswith("bn.weight")


@pytest.mark.slow
def test_inceptions_distance_is_the_same_on_1_2_and_4_devices():
    """The network at full size with random weights: 24 images against 20, in batches of 8."""
    network, rng = inception.make_inception(), np.random.default_rng(0)
    params = {name: random_weight(rng, name, kind.shape) for name, kind in network.shapes.items()}
    sets, scores = (pictures(0, 24, 32), pictures(1, 20, 32)), []
    for devices in (1, 2, 4):
        apply = lambda p, rows: {"f": network.apply(p, rows["images"])}
        features = fid.make_features(apply, params, make_mesh(devices=jax.devices()[:devices]), 8)
        parts = [features(named(np.split(images, range(8, len(images), 8)))) for images in sets]
        rows = [np.concatenate([part["f"] for part in each]) for each in parts]
        scores.append(fid.distance(*(moments.moments_of(part) for part in rows)))
    assert scores[0] > 1e-3 * np.sum(rows[0].mean(axis=0) ** 2)  # the sets differ
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


JOB = """
import sys; sys.path.insert(0, sys.argv[2])
from proreflow_jax.runtime import mesh
mesh.initialize_distributed()
import jax, numpy as np, test_evaluation_fid as t
from pathlib import Path
from proreflow_jax.evaluation import fid
images, k, n = t.pictures(0, 48), jax.process_index(), jax.process_count()
def rows_from(start):
    return t.named(images[i : i + 8][k * 8 // n : (k + 1) * 8 // n] for i in range(start, 48, 8))
features = fid.make_features(*t.small(), mesh.make_mesh(), 8)
seen = fid.measure(Path(sys.argv[1]), fid.facts(t.COCO, {}, "i", 45), t.WIDTHS, rows_from, features)["f"]
np.save(Path(sys.argv[1]) / f"{k}.npy", np.concatenate([seen.mean, seen.scatter.ravel()]))
"""


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    words = [sys.executable, "-c", JOB, str(tmp_path), os.path.dirname(__file__)]
    jobs = [subprocess.Popen(words, env=os.environ | job | {"JAX_PROCESS_ID": str(k)}) for k in range(2)]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    first, second = (np.load(tmp_path / f"{k}.npy") for k in range(2))
    np.testing.assert_array_equal(first, second)
    parts = features_on(1)(named(cut(pictures(0, 48), (8,) * 6)))
    want = moments.moments_of(np.concatenate([part["f"] for part in parts])[:45])
    np.testing.assert_allclose(first, np.concatenate([want.mean, want.scatter.ravel()]), rtol=1e-5, atol=1e-5)
