"""Stable Diffusion's networks at their true architecture and size equal torch's; each side runs in a process of its own.

Weights are random (the real ones need a network), so names, shapes, layouts, depths, heads and norms are proven, and that
errors do not grow over the true depth. Prints what it measures. Half an hour on two shared cores, 12 GB at most.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_size import CASES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # of float32 against torch
HALF_TOLERANCE = 2e-2  # of bfloat16 against float32, both ours
LIMIT = 16.0  # GB that any process may take
SECONDS = 1800
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # else glibc keeps what was freed and the peak is half as high again
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def side(kind: str, name: str, folder: Path) -> dict:
    """One process of full_size.py: what it printed. It sees one device, whatever conftest.py set."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | ENVIRONMENT
    command = [sys.executable, str(ROOT / "tests" / "full_size.py"), kind, name, str(folder)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def show(capsys: pytest.CaptureFixture, name: str, **rows: dict) -> None:
    """One line for each row of numbers, past pytest's capture."""
    say = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    with capsys.disabled():
        for row, numbers in rows.items():
            sys.stdout.write(f"\n{name}: {row}: " + ", ".join(f"{key} {say(value)}" for key, value in numbers.items()))


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_at_true_size(name, tmp_path, capsys):
    torch = side("torch", name, tmp_path)
    ours = side("ours", name, tmp_path)
    float32, bfloat16 = ours.pop("float32"), ours.pop("bfloat16")
    show(capsys, name, float32=float32, bfloat16=bfloat16, torch=torch, ours=ours)
    assert ours["parameters"] == CASES[name].parameters
    assert max(float32.values()) <= TOLERANCE
    assert max(bfloat16.values()) <= HALF_TOLERANCE
    assert max(torch["peak_gb"], ours["peak_gb"]) <= LIMIT


def test_reading_sd_15_takes_little_more_memory_than_the_model(tmp_path, capsys):
    """A float32 file of 3.4 GB; the process that wrote it is gone when reading begins."""
    written = side("write", "SD 1.5 UNet", tmp_path)
    loaded = side("load", "SD 1.5 UNet", tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    show(capsys, "reading the SD 1.5 UNet", numbers=written | loaded)
    assert written["file_gb"] == pytest.approx(loaded["model_gb"], rel=1e-3)
    assert loaded["exact"]
    assert loaded["ratio"] <= 1.3
