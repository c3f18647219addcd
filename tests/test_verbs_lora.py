"""A stage that trains low-rank factors: what is kept, how the next stage goes on with them, and what leaves as a LoRA."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from verb import run, tiny_flags

from proreflow_jax.exports import replay_in_diffusers
from proreflow_jax.pretrained import lora_file, weights
from proreflow_jax.storage.atomic import read_json

LAYERS = r"attn\d\.to_(q|k|v)\.weight$|conv1\.weight$"
RANK = 2
pytestmark = pytest.mark.usefixtures("quick")


def flags(folder: Path, model: Path, **fields: object) -> list[str]:
    own = {"student__lora__rank": RANK, "student__lora__layers": LAYERS, "optimizer__learning_rate": 0.01}
    fields = own | {"checkpoint__every": 6} | fields
    return tiny_flags(folder, model, export__stages="()", **fields)


@pytest.fixture(scope="module")
def chain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/tiny, 4 then 2 windows; tests only read it."""
    folder = tmp_path_factory.mktemp("chain")
    ended = run("distill", *flags(folder, model))
    assert ended.code == 0, ended.err
    return folder


def written(folder: Path, model: Path, form: str, out: Path) -> Path:
    ended = run("export", *flags(folder, model), "--stage=2", f"--form={form}", f"--out={out}")
    assert ended.code == 0, ended.err
    return out


def test_the_lora_is_what_was_trained_and_gives_the_whole_student(chain, model, tmp_path):
    folder = written(chain, model, "diffusers", tmp_path / "folder")
    alone = written(chain, model, "lora", tmp_path / "lora")
    base, student = weights.read_tensors(model / "unet"), weights.read_tensors(folder / "unet")
    factors = lora_file.from_kohya(load_file(alone / replay_in_diffusers.FILES["lora"]), base)
    changed = {name for name in base if not np.array_equal(base[name], student[name])}
    assert changed == set(factors) and all(f.down.shape[0] == RANK for f in factors.values())
    for name, value in lora_file.apply_factors(base, factors).items():
        np.testing.assert_allclose(value, student[name], rtol=1e-5, atol=1e-6)
    card = read_json(alone / "reflow.json")
    assert card["format"]["rank"] == RANK == card["settings"]["student.lora.rank"] and card["lora"]["layers"] == len(factors)


def test_factors_that_would_count_otherwise_are_refused(chain, model, tmp_path):
    words = [*flags(chain, model, student__lora__alpha=8.0), "--stage=2", f"--out={tmp_path / 'x.png'}"]
    ended = run("sample", *words)
    assert ended.code == 2 and "stage-2/plan.json" in ended.err and "--config.student.lora.alpha=0.0" in ended.err, ended.err


def test_diffusers_with_the_lora_is_the_student(chain, model, tmp_path):
    ended = run("export", *flags(chain, model), "--stage=2", "--form=lora", f"--out={tmp_path / 'lora'}", "--check")
    assert ended.code == 0, ended.err
    result = read_json(tmp_path / "lora" / "replay.json")
    assert result["to_student"] <= replay_in_diffusers.LIMIT and result["largest_difference"] <= replay_in_diffusers.LIMIT


def test_the_replay_adds_factors_to_a_base_in_half_precision_without_rounding_their_sum(chain, model, tmp_path):
    """As diffusers does, which reads such a base in float32."""
    folder = written(chain, model, "lora", tmp_path / "lora")
    half = {name: value.astype(np.float16) for name, value in weights.read_tensors(model / "unet").items()}
    source, denoiser = SimpleNamespace(tensors=lambda _: half), tiny.load(model)[1].denoiser
    experiment = SimpleNamespace(
        base=SimpleNamespace(denoiser_name="unet", source=source), networks=SimpleNamespace(denoiser=denoiser)
    )
    whole = {name: value.astype(np.float32) for name, value in half.items()}
    factors = lora_file.from_kohya(load_file(folder / replay_in_diffusers.FILES["lora"]), half)
    expected = weights.from_torch(lora_file.apply_factors(whole, factors), denoiser.shapes, "")
    for name, value in replay_in_diffusers._with_lora(experiment, folder, "kohya").items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-7)


def test_the_next_stage_goes_on_with_the_factors(chain):
    first, second = (read_json(chain / "runs" / "tiny" / f"stage-{n}" / "DONE.json") for n in (4, 2))
    plans = [read_json(chain / "runs" / "tiny" / f"stage-{n}" / "plan.json") for n in (4, 2)]
    assert [plan["student.lora"]["rank"] for plan in plans] == [RANK, RANK]
    assert plans[1]["parent"] == second["parent"] == first["digest"] != second["digest"]


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"student__lora__layers": "nothing_like_this"}, "--config.student.lora.layers"),
        ({"student__lora__layers": "norm"}, "--config.student.lora.layers"),
        ({"student__lora__layers": "("}, "--config.student.lora.layers"),
        ({"student__lora__rank": -1}, "--config.student.lora.rank"),
        ({"student__lora__alpha": -1.0}, "--config.student.lora.alpha"),
    ],
)
def test_factors_that_cannot_be_are_refused_in_one_line(model, tmp_path, fields, needle):
    ended = run("distill", *flags(tmp_path, model, **fields))
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and needle in ended.err
    assert not (tmp_path / "runs").exists()
