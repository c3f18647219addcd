"""EfficientNet-lite0 equals a torch forward with shared weights, random ones and those of the package; its conversion."""

import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_reference import quick_jit, same, tensors  # noqa: E402

from proreflow_jax import UserError  # noqa: E402
from proreflow_jax.evaluation import picture_features  # noqa: E402
from proreflow_jax.models import efficientnet  # noqa: E402
from proreflow_jax.pretrained import weights  # noqa: E402
from proreflow_jax.runtime import digest, mesh  # noqa: E402

Norm = partial(nn.BatchNorm2d, eps=1e-3)


class Same(nn.Conv2d):
    """Padded as TensorFlow's "same": what an odd sum lacks goes to the right and below."""

    def forward(self, x):
        lack = [
            max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        rows, columns = lack
        return super().forward(nn.functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


class Block(nn.Module):
    def __init__(self, size, stride, times, inputs, outputs):
        super().__init__()
        width = inputs * times
        if times > 1:
            self._expand_conv, self._bn0 = Same(inputs, width, 1, bias=False), Norm(width)
        self._depthwise_conv, self._bn1 = Same(width, width, size, stride, groups=width, bias=False), Norm(width)
        self._project_conv, self._bn2 = Same(width, outputs, 1, bias=False), Norm(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x):
        h = nn.functional.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = self._bn2(self._project_conv(nn.functional.relu6(self._bn1(self._depthwise_conv(h)))))
        return h + x if self.skips else h


class Lite0(nn.Module):
    """As published: "r1_k3_s11_e1_i32_o16" and so on, then 1,280 features and 1,000 classes."""

    ROWS = (
        "1 3 1 1 32 16",
        "2 3 2 6 16 24",
        "2 5 2 6 24 40",
        "3 3 2 6 40 80",
        "3 5 1 6 80 112",
        "4 5 2 6 112 192",
        "1 3 1 6 192 320",
    )

    def __init__(self):
        super().__init__()
        blocks = []
        for row in self.ROWS:
            repeats, size, stride, times, inputs, outputs = map(int, row.split())
            blocks += [Block(size, stride, times, inputs, outputs)]
            blocks += [Block(size, 1, times, outputs, outputs) for _ in range(repeats - 1)]
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), Norm(32)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Same(320, 1280, 1, bias=False), Norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


@pytest.fixture(scope="module")
def random_reference():
    """Weights and statistics at random; 0.7 keeps differences between pictures alive, and rounding errors from growing."""
    module, draw = Lite0().eval(), torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=draw) if value.ndim else None
        if name.endswith("running_var"):
            value.copy_(0.2 + 0.3 * torch.rand(value.shape, generator=draw))
        elif value.ndim == 1:
            value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
        elif value.ndim > 1:
            value.copy_(0.7 * noise / value[0].numel() ** 0.5)
    return module


def features_only(module):
    return {name: v for name, v in tensors(module).items() if v.ndim and not name.startswith("_fc.")}


def pictures(size, count=3):
    rng = np.random.default_rng(size)
    coarse = rng.integers(0, 256, (count, 6, 6, 3)).repeat(-(-size // 6), axis=1).repeat(-(-size // 6), axis=2)[:, :size, :size]
    return np.clip(coarse + rng.integers(-30, 31, coarse.shape), 0, 255).astype(np.uint8)


def to_torch(images, size):
    return torch.from_numpy(np.array(efficientnet.prepare(jnp.asarray(images), size))).permute(0, 3, 1, 2)


def test_random_weights_give_the_features_of_torch(random_reference):
    """75 pixels make maps of 38, 19, 10, 5 and 3: both an even and an odd sum of padding."""
    network, images = efficientnet.make_efficientnet(75), pictures(75)
    params = weights.from_torch(features_only(random_reference), network.shapes, "torch")
    with torch.no_grad():
        reference = random_reference(to_torch(images, 75))
    same(quick_jit(network.apply)(params, images), reference)
    assert reference.std(0).norm() / reference.norm() > 0.02  # random weights do tell pictures apart


def test_the_weights_of_the_package_give_the_features_of_torch(monkeypatch):
    """Of pictures of 64 pixels, seen at 128, in batches on two devices."""
    monkeypatch.setattr(jax, "jit", quick_jit)
    monkeypatch.setattr(digest, "_sums", quick_jit(digest._sums.__wrapped__))  # a program for each of 46 shapes
    module = Lite0().eval()
    stored = {
        name: torch.from_numpy(np.array(v, np.float32)) for name, v in weights.Tensors([picture_features.WEIGHTS]).items()
    }
    lacking, unexpected = module.load_state_dict(stored, strict=False)
    assert not unexpected and all(name.startswith("_fc.") or name.endswith("num_batches_tracked") for name in lacking)
    images = pictures(64, 5)
    with torch.no_grad():
        reference = module(to_torch(images, 128))
    features = picture_features.make_picture_features(128, mesh.make_mesh(data=2, fsdp=1, devices=jax.devices()[:2]), 4)
    same(features.of(images), reference)
    assert features.of(images[:0]).shape == (0, 1280)


def test_pictures_are_enlarged_and_moved_as_published():
    assert efficientnet.prepare(jnp.full((1, 64, 64, 3), 255, jnp.uint8), 128).shape == (1, 128, 128, 3)
    for value, unit in ((127, 0.0), (255, 1.0), (0, -127 / 128)):
        np.testing.assert_allclose(efficientnet.prepare(jnp.full((1, 8, 8, 3), value, jnp.uint8), 16), unit, atol=1e-6)


def test_the_command_of_the_card_converts_the_published_file(random_reference, tmp_path):
    card = (picture_features.WEIGHTS.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r'^python -c "(.*)"$', card, re.MULTILINE)[1]
    path = tmp_path / re.search(r"load\('([^']*)'", code)[1]
    path.parent.mkdir(parents=True)
    torch.save(random_reference.state_dict(), path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    params = picture_features.read_efficientnet(tmp_path / "model.safetensors")
    whole = weights.from_torch(features_only(random_reference), efficientnet.make_efficientnet(1).shapes, "torch")
    for name, value in whole.items():
        np.testing.assert_allclose(params[name], value, rtol=0 if value.ndim == 1 else 1e-3, atol=1e-6, err_msg=name)


def test_another_file_is_refused_in_a_line(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save_tensors(path, {"_conv_stem.weight": np.zeros((32, 3, 3, 3), np.float32)})
    with pytest.raises(ValueError, match="missing") as error:
        picture_features.read_efficientnet(path)
    assert "\n" not in str(error.value)


def test_damaged_weights_of_the_package_are_refused(tmp_path):
    folder = shutil.copytree(picture_features.WEIGHTS.parent, tmp_path / "network")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors holds other bytes than were written"):
        picture_features.read_efficientnet(folder / "model.safetensors")
