"""The FID's network equals torch-fidelity's and pytorch-fid's with shared random weights, from uint8 images on; its resizes.

Both packages import torchvision, whose wheels do not fit every build of torch. Of torch-fidelity only the file of the network
is loaded, which needs none; pytorch-fid's sees a torchvision that holds torch-fidelity's blocks, and keeps its own forwards.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file
from torch_reference import quick_jit, same, tensors

from proreflow_jax.evaluation import judges
from proreflow_jax.models import inception
from proreflow_jax.pretrained import weights

PICTURES = [(40, 33), (310, 412)]  # below and above 299


def picture(height, width, blocks=(8,)):
    """One picture for each size of block: blocks under noise, so that neighbours differ as they do in photographs."""
    rng = np.random.default_rng(height)
    noise = rng.integers(-40, 41, (len(blocks), height, width, 3))
    for image, size in zip(noise, blocks, strict=True):
        coarse = rng.integers(0, 256, (1 + height // size, 1 + width // size, 3))
        image += coarse.repeat(size, axis=0).repeat(size, axis=1)[:height, :width]
    return np.clip(noise, 0, 255).astype(np.uint8)


def to_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's file of the network, its package not run."""
    found = importlib.util.find_spec("torch_fidelity")
    if found is None:
        pytest.fail("pip install --no-deps torch-fidelity==0.4.0 (make test does)")
    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("torch_fidelity")
        package.__path__ = list(found.submodule_search_locations)
        patch.setitem(sys.modules, "torch_fidelity", package)
        yield importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
            del sys.modules[name]


def build(fidelity):
    """The network of the reference without its weights, which it would download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        return fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits"])


def randomise(module):
    """Weights and statistics at random, of a size that keeps differences between images alive through 94 layers."""
    draw = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith("running_var"):
            value.copy_(0.2 + 0.3 * torch.rand(value.shape, generator=draw))
        elif value.ndim == 1:
            value.copy_(0.1 * noise + (1.0 if name.endswith("bn.weight") else 0.0))
        elif value.ndim > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
    return module


@pytest.fixture(scope="module")
def reference(fidelity):
    return randomise(build(fidelity))


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    """The same weights, through a file as it is published (with torch's counters) and our reader."""
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    weights.save_tensors(path, {name: np.ascontiguousarray(value) for name, value in tensors(reference).items()})
    return judges.read_inception(path)


def ours(params, images, resize):
    network = inception.make_inception(resize)
    return quick_jit(network.apply)(params, images)


@pytest.mark.parametrize("size", PICTURES)
def test_the_features_are_torch_fidelitys(reference, params, size):
    images = picture(*size, blocks=(8, 32))
    want, _ = reference(to_torch(images))
    features = ours(params, images, "tf1")
    assert features.shape == (2, 2048) and features.dtype == np.float32
    same(features, want)
    assert want.std(0).norm() / want.norm() > 0.02  # random weights do tell pictures apart


@pytest.fixture(scope="module")
def pytorch_fid(fidelity, reference):
    """pytorch-fid's network with the weights of `reference`."""
    found = importlib.util.find_spec("pytorch_fid")
    if found is None:
        pytest.fail("pip install --no-deps pytorch-fid==0.3.0 (make test does)")
    blocks = {"InceptionE": fidelity.InceptionE_1} | {f"Inception{x}": getattr(fidelity, f"Inception{x}") for x in "AC"}
    vision = ModuleType("torchvision")
    vision.__version__ = "0.0"
    vision.models = SimpleNamespace(inception=SimpleNamespace(**blocks), inception_v3=lambda **_: build(fidelity))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", vision)
        spec = importlib.util.spec_from_file_location("their_inception", Path(found.origin).with_name("inception.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: reference.state_dict())
        yield module.InceptionV3([3]).eval()


@pytest.mark.parametrize("size", PICTURES)
def test_the_features_are_pytorch_fids(pytorch_fid, reference, params, size):
    images = picture(*size)
    assert type(pytorch_fid.blocks[3][2]).__name__ == "FIDInceptionE_2"
    (want,) = pytorch_fid(to_torch(images).float() / 255)
    features = ours(params, images, "torch")
    same(features, want[:, :, 0, 0])
    other = reference(to_torch(images))[0].numpy()
    assert np.linalg.norm(features - other) / np.linalg.norm(other) > 1e-3  # random weights do tell the two resizes apart


SIZES = [(1, 2), (8, 8), (32, 299), (299, 299), (300, 64), (512, 768)]


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_of_tensorflow_1(fidelity, size):
    images = picture(*size)
    want = fidelity.interpolate_bilinear_2d_like_tensorflow1x(to_torch(images).float(), (299, 299), align_corners=False)
    same(inception.prepare_inception(jnp.asarray(images), "tf1"), (want - 128) / 128, 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_of_torch(size):
    images = picture(*size)
    want = F.interpolate(to_torch(images).float() / 255, (299, 299), mode="bilinear", align_corners=False)
    same(inception.prepare_inception(jnp.asarray(images), "torch"), 2 * want - 1, 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_of_clean_fid_is_pils_bicubic_in_float(size):
    images = picture(*size)
    planes = [Image.fromarray(images[0, ..., c].astype(np.float32), "F") for c in range(3)]
    want = np.stack([np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)) for plane in planes], axis=-1)
    np.testing.assert_allclose(inception.prepare_inception(jnp.asarray(images), "clean")[0] * 128 + 128, want, atol=1e-3)


@pytest.mark.parametrize("resize", inception.RESIZES)
def test_every_resize_leaves_299_alone_and_a_flat_picture_flat(resize):
    matrix, _, _ = inception.RESIZES[resize]
    np.testing.assert_array_equal(matrix(299, 299), np.eye(299))
    for length in (1, 7, 64, 640):
        np.testing.assert_allclose(matrix(length, 299).sum(axis=1), 1.0, rtol=1e-6)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match=r"'area' is none of tf1, torch, clean: change --config\.evaluate\.protocol"):
        inception.make_inception("area")


def test_weights_that_do_not_fit_are_refused_in_one_line(params, tmp_path):
    path, torch_named = tmp_path / "w.safetensors", weights.to_torch(params)
    lost, short, odd = "Mixed_7c.branch_pool.bn.running_var", "Mixed_5b.branch1x1.bn.running_mean", "fc.bias"
    del torch_named[lost]
    torch_named[short] = torch_named[short][:5]
    torch_named[odd][0] = np.nan
    save_file({name: np.ascontiguousarray(value) for name, value in torch_named.items()}, path)
    for expected in ([lost, short, odd, inception.NAME], ["not a readable safetensors file"]):
        with pytest.raises(ValueError, match=r"or name another --config\.evaluate\.inception$") as error:
            judges.read_inception(path)
        text = str(error.value)
        assert all(part in text for part in [str(path), *expected])
        assert "\n" not in text and "config.json" not in text and "--config.model" not in text
        path.write_bytes(b"a pickle, perhaps")
