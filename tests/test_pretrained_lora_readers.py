"""How much of a LoRA each of its readers drops."""

import re

import numpy as np
import pytest
from verb import ROOT

from configs import finetune, sd15, sd21, sdxl
from proreflow_jax.pretrained import lora_file, lora_readers

KOHYA, OLD = "kohya's sd-scripts 02298e3", "diffusers 0.36 with peft 0.18"
NAMES = {  # weights with factors -> in which families a reader drops them
    "conv_in.weight": {KOHYA: ("v1", "xl"), OLD: ("v1", "xl")},
    "conv_out.weight": {KOHYA: ("v1", "xl"), OLD: ("v1", "xl")},
    "time_embedding.linear_1.weight": {
        "kohya's sd-scripts 02298e3": ("v1", "xl"),
        "diffusers 0.36 with peft 0.18": ("v1", "xl"),
    },
    "time_embedding.linear_2.weight": {
        "kohya's sd-scripts 02298e3": ("v1", "xl"),
        "diffusers 0.36 with peft 0.18": ("v1", "xl"),
    },
    "add_embedding.linear_1.weight": {KOHYA: ("xl",)},
    "up_blocks.0.upsamplers.0.conv.weight": {"A1111 1.10": ("xl",)},
    "up_blocks.1.upsamplers.0.conv.weight": {},
    "down_blocks.0.resnets.0.time_emb_proj.weight": {},
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": {},
}


@pytest.mark.parametrize("family", ["v1", "xl"])
def test_every_reader_drops_what_it_does_not_know(family):
    for reader in lora_readers.READERS:
        expected = [name for name, readers in NAMES.items() if family in readers.get(reader, ())]
        assert lora_readers.unread(NAMES, reader, family) == expected, reader


def test_every_reader_is_named_with_its_version_in_code_and_docs():
    docs = (ROOT / "docs" / "take-it-to-your-tool.md").read_text()
    for reader in lora_readers.READERS:
        assert re.search(r" (\d+\.\d+|[0-9a-f]{7})$", reader) and reader in docs, reader


def test_lost_energy_is_that_of_what_is_added():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    factors = {
        "conv_in.weight": lora_file.Factors(draw(8, 3, 1, 1), draw(3, 4, 3, 3), 6.0),
        "up_blocks.0.upsamplers.0.conv.weight": lora_file.Factors(draw(8, 2, 1, 1), draw(2, 8, 3, 3), 2.0),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": lora_file.Factors(draw(8, 2), draw(2, 8), 1.0),
    }
    energies = [float(np.sum(np.square(lora_file.product(layer), dtype=np.float64))) for layer in factors.values()]
    lost = lora_readers.lost_energy(factors, "xl")
    assert lost.keys() == lora_readers.READERS.keys() and lost["ComfyUI 00728eb"] == lost["diffusers 0.42 with peft 0.21"] == 0
    np.testing.assert_allclose(lost[KOHYA], energies[0] / sum(energies), rtol=1e-6)
    np.testing.assert_allclose(lost["A1111 1.10"], energies[1] / sum(energies), rtol=1e-6)
    assert lora_readers.lost_energy(factors, "v1")["A1111 1.10"] == 0
    assert set(lora_readers.lost_energy({}, "v1").values()) == {0.0}


@pytest.mark.parametrize("config", [finetune, sd15, sd21, sdxl], ids=lambda module: module.__name__)
def test_the_layers_that_are_trained_by_default_are_taken_by_all_readers(config):
    trained = [name for name in NAMES if re.search(config.get_config().student.lora.layers, name)]
    assert trained == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    for reader in lora_readers.READERS:
        assert lora_readers.unread(trained, reader, "xl") == lora_readers.unread(trained, reader, "v1") == []
