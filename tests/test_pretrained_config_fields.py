"""The one reader of config files: what is refused, and that tables and networks name the same fields."""

import json
import re
from pathlib import Path

import pytest

from proreflow_jax.pretrained import config_fields

ROOT = Path(__file__).resolve().parent.parent / "proreflow_jax"


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config.model.path") as caught:
        config_fields.read_config(tmp_path, "vae")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{'in_channels': 4}")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object .* download it again") as caught:
        config_fields.read_config(tmp_path, "unet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "components"),
    [
        ("models/unet.py", ("unet",)),
        ("models/vae.py", ("vae",)),
        ("models/clip.py", ("text_encoder",)),
        ("models/mmdit.py", ("transformer",)),
        ("models/t5.py", ("text_encoder_3",)),
        ("flow/stock.py", ("scheduler",)),
        ("models/clip_image.py", ("image_encoder",)),
        ("models/network.py", ("unet", "text_encoder")),
        ("flow/schedule.py", ("scheduler",)),
        ("pretrained/tokenizer.py", ("tokenizer", "text_encoder")),
        ("pretrained/single_file.py", ("unet", "vae", "text_encoder")),
        ("pretrained/original_names.py", ("unet", "vae", "text_encoder", "transformer", "text_encoder_3")),
        ("pretrained/pipeline.py", ("unet", "transformer", "vae", "text_encoder", "model_index")),
    ],
)
def test_every_field_that_is_read_has_a_kind(file, components):
    """Fields that are compared with known values alone (`KNOWN`), or refused as soon as they are set, need none."""
    text = (ROOT / file).read_text(encoding="utf-8")
    read = set(re.findall(r"(?:config|encoder|index|unet)(?:\.get\(|\[)\"(\w+)\"", text))
    known = {field for component in components for field in config_fields.TABLE[component]}
    assert read - known <= {"addition_embed_type", "trained_betas", "unet", "vae", "_class_name"}


def test_null_is_the_default_only_where_diffusers_has_it_so(tmp_path):
    stored = {"block_out_channels": [8], "latent_channels": 4, "norm_num_groups": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"shift_factor": None}))
    assert config_fields.read_config(tmp_path, "vae")["norm_num_groups"] == 4
    (tmp_path / "config.json").write_text(json.dumps(stored | {"norm_num_groups": None}))
    with pytest.raises(ValueError, match=r"config\.json: norm_num_groups=null must be a whole number of at least 1"):
        config_fields.read_config(tmp_path, "vae")
