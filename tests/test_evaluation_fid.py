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

from proreflow_jax.evaluation import fid, frechet, moments
from proreflow_jax.models import inception
from proreflow_jax.models.network import Network
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
        seen = moments.merge(seen, moments.measured(part))
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
    a, b, c = (moments.measured(part) for part in cut(draw(1), (20, 80, 100)))
    left, right = moments.merge(moments.merge(a, b), c), moments.merge(c, moments.merge(b, a))
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
    nothing = moments.empty(WIDTH)
    for both in (moments.merge(nothing, a), moments.merge(a, nothing)):
        assert all(np.array_equal(one, other) for one, other in zip(both, a, strict=True))
    assert moments.merge(nothing, nothing).count == 0


@pytest.mark.parametrize("n", [500, 10])
def test_the_distance_is_scipys_and_torch_fidelitys(n):
    """Their two formulas, on the same float32 features; with 10 rows of 64 features the covariances are singular."""
    first, second = draw(0, n, 64).astype(np.float32), draw(1, n, 64, mean=0.3).astype(np.float32)
    found = fid.distance(moments.measured(first), moments.measured(second))
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    apart = np.sum((first.mean(0, np.float64) - second.mean(0, np.float64)) ** 2) + np.trace(c1) + np.trace(c2)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(np.complex128)).real.sum()  # torch_fidelity/metric_fid.py
    assert found == pytest.approx(apart - 2 * roots, rel=1e-6)
    if n > 64:  # scipy's root of a singular product is not exact
        assert found == pytest.approx(apart - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2).real), rel=1e-6)
    assert found == pytest.approx(frechet.frechet_distance(frechet.moments(first), frechet.moments(second)), rel=1e-7)


def test_one_image_has_no_distance():
    with pytest.raises(ValueError, match=r"1 examples have no covariance: raise --config\.evaluate\.examples"):
        fid.distance(moments.measured(draw(0)), moments.measured(draw(1, n=1)))


def test_moments_on_disk_come_back_bit_for_bit(tmp_path):
    path, seen = tmp_path / "m.safetensors", moments.measured(draw(0))
    moments.save(path, moments.empty(WIDTH))
    moments.save(path, seen)
    back = moments.load(path, WIDTH)
    assert back.count == 200 and all(np.array_equal(one, other) for one, other in zip(back, seen, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(ValueError, match="does not hold moments of 7 features: delete it"):
        moments.load(path, 7)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"m\.safetensors is not a readable safetensors file: delete it"):
        moments.load(path, WIDTH)


def small(width=WIDTH):
    """A network in small: shrink, mix channels, a nonlinearity, pool."""

    def apply(params, images):
        x = jnp.tanh(jnp.einsum("bhwc,hwcd->bd", images / 255.0, params["w"], precision="highest"))
        return x + params["b"]

    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((8, 8, 3, width)).astype(np.float32) / 8, "b": np.ones(width, np.float32)}
    return Network({}, None, apply, {}), params


def features_on(devices, batch=8, fsdp=1):
    network, params = small()
    return fid.make_features(network, params, make_mesh(fsdp=fsdp, devices=jax.devices()[:devices]), batch)


def test_features_keep_their_order_and_drop_what_filled_a_batch():
    network, params = small()
    images = pictures(0, 21)
    want = network.apply(params, images)
    calls = []

    def batches():
        for part in cut(images, (8, 3, 8, 2)):
            calls.append(len(part))
            yield part

    found = features_on(4, fsdp=2)(batches())
    assert calls == []  # nothing is read before it is asked for
    rows = list(found)
    assert [len(part) for part in rows] == [8, 3, 8, 2]
    np.testing.assert_allclose(np.concatenate(rows), want, rtol=1e-5, atol=1e-6)


def test_one_shape_is_compiled_for_full_and_filled_batches():
    network, params = small()
    traced = []
    counted = network._replace(apply=lambda p, x: traced.append(x.shape) or network.apply(p, x))
    list(fid.make_features(counted, params, make_mesh(), 8)(cut(pictures(0, 13), (8, 5))))
    assert traced == [(8, 8, 8, 3)]


@pytest.mark.parametrize("batch", [0, -4, 6])
def test_a_batch_that_does_not_split_is_refused(batch):
    with pytest.raises(ValueError, match=rf"--config\.evaluate\.batch={batch} .* 4 devices"):
        features_on(4, batch)


def test_a_batch_larger_than_promised_is_refused():
    with pytest.raises(ValueError, match="a batch of 9 images is larger than 8: raise --config.evaluate.batch"):
        list(features_on(1)([pictures(0, 9)]))


def run(folder, seed, count, devices=1, sizes=8, every=2, after=None):
    """Measures `count` pictures; with `after`, the stream breaks off there, as a kill would."""
    images = pictures(seed, count)

    def images_from(position):
        for start in range(position, count, sizes):
            if after is not None and start >= after:
                raise KeyboardInterrupt
            yield images[start : start + sizes]

    about = fid.facts(fid.PROTOCOLS["coco2017-5k"], "weights", f"set {seed}", count)
    return fid.measure(folder, about, WIDTH, images_from, features_on(devices), every)


def test_the_distance_is_the_same_on_1_2_and_4_devices(tmp_path):
    scores = [
        fid.distance(run(tmp_path / f"{n}", 0, 101, devices=n), run(tmp_path / f"{n}", 1, 93, devices=n)) for n in (1, 2, 4)
    ]
    assert scores[0] > 0.1 and scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_a_measurement_broken_off_and_run_again_is_bit_equal(tmp_path):
    want = run(tmp_path / "whole", 0, 75)
    for after in (24, 40, 72):  # each run goes on from what the one before had saved
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", 0, 75, after=after)
        (file,) = (tmp_path / "broken").glob("*.safetensors")
        assert 0 < moments.load(file, WIDTH).count <= after
    found = run(tmp_path / "broken", 0, 75)
    assert found.count == 75 and all(np.array_equal(one, other) for one, other in zip(found, want, strict=True))


def test_reference_moments_are_computed_once_for_each_thing_they_depend_on(tmp_path):
    first = run(tmp_path, 0, 16)
    again = run(tmp_path, 0, 16, after=0)  # would raise if it read an image
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    run(tmp_path, 1, 16)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.glob("*.json"))) == 2
    coco = fid.PROTOCOLS["coco2017-5k"]
    about = fid.facts(coco, "w", "i", 9)
    others = [fid.facts(coco, "v", "i", 9), fid.facts(coco, "w", "j", 9), fid.facts(coco, "w", "i", 8)]
    others += [
        fid.facts(coco._replace(**{field: "x"}), "w", "i", 9) for field in ("name", "crop", "scale", "resize", "features")
    ]
    assert all(other != about for other in others)
    assert fid.facts(coco._replace(guidance=2.0, steps=(1,), seeds=(9,)), "w", "i", 9) == about  # no matter of real images


def test_no_more_images_are_taken_than_the_count_and_no_fewer(tmp_path):
    images = pictures(0, 24)
    about = fid.facts(fid.PROTOCOLS["coco2017-5k"], "w", "i", 13)
    seen = fid.measure(tmp_path, about, WIDTH, lambda start: cut(images[start:], (8, 8, 8)), features_on(1))
    want = moments.measured(np.concatenate(list(features_on(1)(cut(images[:13], (8, 5))))))
    assert seen.count == 13
    np.testing.assert_allclose(seen.mean, want.mean, rtol=1e-9)
    about = fid.facts(fid.PROTOCOLS["coco2017-5k"], "w", "i", 30)
    with pytest.raises(ValueError, match=r"only 24 images of 30: .*--config\.evaluate\.protocol"):
        fid.measure(tmp_path, about, WIDTH, lambda start: cut(images[start:], (8, 8, 8)), features_on(1))


def test_a_digest_sees_every_name_type_and_bit_and_no_order():
    params = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    changed = [
        params | {"a": np.nextafter(params["a"], 9).astype(np.float32)},
        params | {"b": np.ones((4, 1), np.float32)},
        params | {"b": np.ones((2, 2), np.float16)},
        {"a": params["a"], "c": params["b"]},
    ]
    assert fid.digest(dict(reversed(params.items()))) == fid.digest(params)
    assert fid.digest(jax.tree.map(jnp.asarray, params)) == fid.digest(params)
    assert len({fid.digest(p) for p in [params, *changed]}) == 5
    parts = [[b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"abc"], []]
    assert len({fid.images_hash(part) for part in parts}) == 5


def test_the_protocols_name_what_exists():
    assert {"coco2014-30k", "coco2017-5k", "digits"} <= set(fid.PROTOCOLS)
    for name, row in fid.PROTOCOLS.items():
        assert fid.find_protocol(name) is row and row.name == name
        assert row.count > 1 and row.seeds and row.steps and row.crop in ("centre", "none")
        assert (row.features == inception.NAME) == (row.resize in inception.RESIZES)
        assert (row.size > 0) == hasattr(Image.Resampling, row.scale.upper())
    with pytest.raises(ValueError, match=r"--config\.evaluate\.protocol=coco is none of coco2014-30k, coco2017-5k, digits"):
        fid.find_protocol("coco")


@pytest.mark.parametrize(("shape", "top", "left"), [((300, 480), 0, 90), ((481, 300), 90, 0), ((300, 300), 0, 0)])
def test_pictures_are_cropped_in_the_middle_and_scaled(shape, top, left):
    """481 - 300 = 181: torchvision's center_crop rounds 90.5 to even."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    found = fid.prepare(image, fid.PROTOCOLS["coco2014-30k"])
    square = Image.fromarray(image).crop((left, top, left + 300, top + 300))
    np.testing.assert_array_equal(found, np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS)))
    assert fid.prepare(image, fid.PROTOCOLS["digits"]) is image


def test_a_number_is_said_with_its_protocol_its_seeds_and_its_spread():
    coco = fid.PROTOCOLS["coco2017-5k"]
    text = fid.statement(coco, {0: 22.0, 1: 23.0, 2: 24.0}, 4, 5000, 4.0)
    assert text == f"FID 23.00 +- 1.00 (seeds 0, 1, 2); coco2017-5k, 4 steps, 5,000 images, guidance 4, {inception.NAME}"
    odd = fid.statement(coco, {7: 22.0}, 4, 100, 3.5)
    assert "FID 22.00 (seed 7 only, spread unknown)" in odd and "+-" not in odd
    assert odd.endswith("not the protocol's: images 100 instead of 5000; not the protocol's: guidance 3.5 instead of 4")
    with pytest.raises(ValueError, match=r"--config\.evaluate\.seeds"):
        fid.statement(coco, {}, 4, 5000, 4.0)


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
        features = fid.make_features(network, params, make_mesh(devices=jax.devices()[:devices]), 8)
        rows = [np.concatenate(list(features(np.split(images, range(8, len(images), 8))))) for images in sets]
        scores.append(fid.distance(*(moments.measured(part) for part in rows)))
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
def images_from(start):
    return [images[i : i + 8][k * 8 // n : (k + 1) * 8 // n] for i in range(start, 48, 8)]
features = fid.make_features(*t.small(), mesh.make_mesh(), 8)
seen = fid.measure(Path(sys.argv[1]), fid.facts(fid.PROTOCOLS["digits"], "w", "i", 45), t.WIDTH, images_from, features)
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
    want = moments.measured(np.concatenate(list(features_on(1)(cut(pictures(0, 48), (8,) * 6))))[:45])
    np.testing.assert_allclose(first, np.concatenate([want.mean, want.scatter.ravel()]), rtol=1e-5, atol=1e-5)
