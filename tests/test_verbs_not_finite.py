"""Numbers that are none are seen before anything is written, and the line names the prompts."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import ROOT, run, tiny_flags

from proreflow_jax.jobs import digits_judge
from proreflow_jax.pretrained import weights

pytestmark = pytest.mark.usefixtures("quick")

UNET = "unet/diffusion_pytorch_model.safetensors"


def loud_model(folder: Path, bias: float) -> Path:
    """A whole model whose output is about `bias` everywhere: all its weights are finite."""
    tensors = load_file(tiny.write_model(folder) / UNET)
    tensors["conv_out.bias"][:] = bias
    save_file(tensors, folder / UNET)
    return folder


def written(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def test_sample_paints_no_black_picture(tmp_path):
    flags = tiny_flags(tmp_path, loud_model(tmp_path / "loud", 3e38))
    before = written(tmp_path)
    own = ["--stage=0", "--steps=2", "--count=2", "--guidance=3", "--prompt=a loud three", f"--out={tmp_path}/x.png"]
    ended = run("sample", *flags, *own)
    assert ended.code == 1, ended
    assert ended.err.splitlines()[-1].startswith(
        "sample: latents of 2 of 2 pictures are not finite, of 'a loud three': take --config.model."
    )
    assert "Traceback" not in ended.err
    assert written(tmp_path) == before


@pytest.mark.parametrize(("bias", "field"), [(3e38, "model.teacher_dtype"), (1e10, "pairs.storage")])
def test_make_pairs_writes_no_record_that_is_no_number(tmp_path, bias, field):
    """The second is a number in the teacher's float32 and none in the records' float16."""
    flags = tiny_flags(tmp_path, loud_model(tmp_path / "loud", bias), model__teacher_dtype="float32", pairs__storage="float16")
    (tmp_path / "prompts.txt").write_text("the only prompt\n", encoding="utf-8")
    ended = run("make_pairs", *flags, "--stage=4")
    assert ended.code == 1, ended
    line = ended.err.splitlines()[-1]
    assert "are not finite, of 'the only prompt'" in line and f"--config.{field}=float32" in line and "example 0" in line
    assert not list((tmp_path / "runs").rglob("*.array_record*")), written(tmp_path)


def test_the_digits_table_has_no_row_that_is_no_number():
    latents = np.zeros((3, 4, 4, 4), np.float32)
    latents[1, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="latents of 1 of 3 pictures are not finite, of '.*four.*': take") as caught:
        digits_judge.scores(None, latents, np.zeros((3, 8, 8, 3), np.uint8), latents, np.array([3, 4, 5]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_no_file_of_weights_holds_what_is_no_number(tmp_path, dtype):
    """70000 is a number, but none of float16."""
    with np.errstate(over="ignore"):
        loud = np.array([1, 70_000], np.float32).astype(dtype)
    path = tmp_path / "model.safetensors"
    if dtype != np.float16:
        weights.save_tensors(path, {"a": loud})
        loud[0] = np.nan
    path.unlink(missing_ok=True)
    with pytest.raises(FloatingPointError, match=r"model\.safetensors is not written: 1 not finite: a") as caught:
        weights.save_tensors(path, {"a": loud, "b": np.ones(3, dtype)})
    assert ("take --dtype=float32 or bfloat16" in str(caught.value)) == (dtype == np.float16)
    assert not path.exists()


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from proreflow_jax import RunFailed
from proreflow_jax.pretrained import weights
from proreflow_jax.storage import atomic

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
folder = Path(sys.argv[1])
for name, write in (
    ("weights", lambda draft: weights.save_tensors(draft / "model.safetensors", {"a": np.zeros(100_000, np.float32)})),
    ("card", lambda draft: (draft / "README.md").write_text("x" * 100_000)),
):
    try:
        with atomic.atomic_folder(folder / name) as draft:
            write(draft)
    except (RunFailed, OSError) as error:
        print(str(error).replace("\\n", "|"))
try:
    atomic.write_json(folder / "small.json", {"a": "x" * 100_000})
except (RunFailed, OSError) as error:
    print(str(error))
"""


def test_a_full_disk_is_one_line_with_a_path(tmp_path):
    """Of every writer of an export: weights, text, JSON. Nothing is left."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    first, second, third = done.stdout.splitlines()
    assert "model.safetensors could not be written" in first and "large" in first
    assert f"{tmp_path}" in second and "card" in second and "File too large" in second
    assert f"{tmp_path / 'small.json'}" in third and "File too large" in third
    assert list(tmp_path.iterdir()) == []
