"""clip_skip: text states of an earlier layer, as diffusers reads them, from folder and file alike."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import quick_jit
from verb import run, tiny_config, tiny_flags

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import families  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

from proreflow_jax.pretrained import pipeline, single_file, sources  # noqa: E402
from proreflow_jax.run.base_identity import base_identity  # noqa: E402
from proreflow_jax.run.find_model import find_base_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")

FLAG = "--config.model.clip_skip"
PROMPTS = ("a three", "five", "")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: families.write(folder / family, family) for family in families.FAMILIES}


def opened(tmp_path: Path, model: Path, **fields: object) -> pipeline.Pipeline:
    return pipeline.load_pipeline(find_base_model(tiny_config(tmp_path, model, **fields)), with_denoiser=False)


def as_file(folder: Path, path: Path, layers: int) -> Path:
    """The model as one file; of SD 2.x with a last layer that the folder's config.json does not count, as published."""
    source = sources.open_folder(folder)
    parts = {n: (dict(source.tensors(n)), source.config(n)) for n in source.components}
    tensors, config = parts["text_encoder"]
    last = f"layers.{config['num_hidden_layers'] - 1}."
    more = {n.replace(last, f"layers.{layers - 1}."): v for n, v in tensors.items() if last in n}
    parts["text_encoder"] = (tensors | more, config | {"num_hidden_layers": layers})
    named = [single_file.to_original(n, tensors, config, source.family) for n, (tensors, config) in parts.items()]
    save_file({name: value for part in named for name, value in part.items()}, path)
    return path


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_text_states_are_those_of_diffusers(models, tmp_path, family, form):
    """diffusers skips for the prompt alone, A1111 and ComfyUI for the negative prompt too; so do we, as in training."""
    model, fields = models[family], {"model__clip_skip": 1}
    if form == "file":
        fields["model__like"] = str(model)
        model = as_file(model, tmp_path / "model.safetensors", 2 if family == "v1" else 3)
    ours = opened(tmp_path, model, **fields)
    pipe = StableDiffusionPipeline.from_pretrained(models[family])
    if not hasattr(pipe.text_encoder, "text_model"):  # transformers 5 has no such level, diffusers 0.42 asks for it
        pipe.text_encoder.text_model = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(list(PROMPTS), "cpu", 1, False, clip_skip=1)
        whole, _ = pipe.encode_prompt(list(PROMPTS), "cpu", 1, False)
    states = quick_jit(ours.condition)(ours.text, ours.tokenizer.encode(PROMPTS)).states
    np.testing.assert_allclose(states, theirs.numpy(), atol=1e-5)
    assert np.abs(whole.numpy() - theirs.numpy()).max() > 0.1


def test_it_is_a_config_that_counts_fewer_layers(models, tmp_path):
    """One mechanism: the flag, and a model whose config.json is one short, are the same text encoder."""
    short = Path(shutil.copytree(models["v1"], tmp_path / "short"))
    config = json.loads((short / "text_encoder" / "config.json").read_text())
    (short / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    flag, own = opened(tmp_path, models["v1"], model__clip_skip=1), opened(tmp_path, models["v1"])
    assert base_identity(flag) == base_identity(opened(tmp_path, short))
    assert {n for n, value in base_identity(own).items() if value != base_identity(flag)[n]} == {"base.text_encoder"}


@pytest.mark.parametrize(
    ("family", "skip", "needles"),
    [
        ("xl", 1, ("SDXL reads the states before the last layer already", "clip skip 2", "leave")),
        ("v1", 2, ("must be below 2, the layers of", "text_encoder")),
        ("v1", -1, ("must be in [0, ",)),
    ],
)
def test_a_number_that_cannot_be_is_refused(models, tmp_path, family, skip, needles):
    words = tiny_flags(tmp_path, models[family], model__clip_skip=skip)
    ended = run("sample", *words, "--stage=0", f"--out={tmp_path}/x.png")
    (line,) = ended.err.splitlines()
    assert ended.code == 2 and f"{FLAG}={skip}" in line and [needle for needle in needles if needle not in line] == [], line
