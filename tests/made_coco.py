"""A COCO of 24 small pictures, a CLIP of one layer, and a small network in FID's place: what protocols ask for."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tiny import CAPTIONS, random_params

from proreflow_jax.evaluation import clip_score
from proreflow_jax.models import clip_image
from proreflow_jax.models.network import Network, make_text_encoder
from proreflow_jax.pretrained import tokenizer, weights

COUNT, SIDE, WIDTH, LENGTH = 24, 8, 12, 40
SIZES = [(20, 33), (31, 17), (24, 24)]  # of the real pictures, (h, w)


def picture(i: int) -> np.ndarray:
    """Real picture i: noise over a ramp, some of them grey."""
    rng, (h, w) = np.random.default_rng(i), SIZES[i % len(SIZES)]
    image = rng.integers(0, 120, (h, w, 3)) + np.linspace(0, 130, w)[None, :, None]
    return image.mean(axis=2).astype(np.uint8) if i % 7 == 0 else image.astype(np.uint8)


def annotations(year: int = 2017, count: int = COUNT) -> dict:
    """A captions file as COCO writes it: ids in no order, several captions an image, ends not stripped."""
    images = [{"id": 100 + 7 * i % 101, "file_name": f"{i:012d}.png", "height": 1, "width": 1} for i in range(count)]
    rows = [
        {"id": 1000 - 10 * i + j, "image_id": row["id"], "caption": f" {CAPTIONS[(i + j) % 5]} {i} {j}\n"}
        for i, row in enumerate(images)
        for j in range(2 + i % 2)
    ]
    return {"info": {"year": year}, "images": images, "annotations": rows, "licenses": []}


def write_coco(folder: Path, year: int = 2017, count: int = COUNT) -> tuple[Path, Path]:
    """Writes both; returns (captions json, image folder)."""
    images = folder / f"val{year}"
    images.mkdir(parents=True)
    found = annotations(year, count)
    for i, row in enumerate(found["images"]):
        Image.fromarray(picture(i)).save(images / row["file_name"])
    (images / "readme.txt").write_text("no image")
    path = folder / f"captions_val{year}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path, images


def write_clip(folder: Path, seed: int = 5) -> Path:
    """A folder as CLIPModel.save_pretrained leaves it, tokenizer beside it."""
    folder.mkdir()
    vocabulary, merges = tokenizer.learn(CAPTIONS, 20)
    tokenizer.write_tokenizer(folder, vocabulary, merges, LENGTH)
    width = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = width | dict(vocab_size=len(vocabulary), max_position_embeddings=LENGTH, eos_token_id=vocabulary[tokenizer.END])
    config = {"projection_dim": 6, "text_config": text, "vision_config": width | dict(image_size=16, patch_size=4)}
    towers = clip_score.tower_configs(config)
    shapes = make_text_encoder(towers[0]).shapes | clip_image.make_image_encoder(towers[1]).shapes
    tensors = weights.to_torch(random_params(shapes, seed)) | {"logit_scale": np.array(2.0, np.float32)}
    weights.save_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def small_network(path: Path, resize: str) -> tuple[Network, dict[str, np.ndarray]]:
    """In the place of `judges.feature_network`: means of cells, a matrix, a nonlinearity."""

    def apply(params: dict, images: np.ndarray) -> np.ndarray:
        b, h, w, c = images.shape
        cells = images.reshape(b, SIDE, h // SIDE, SIDE, w // SIDE, c).astype(jnp.float32).mean(axis=(2, 4)) / 255
        return jnp.tanh(jnp.einsum("bk,kd->bd", cells.reshape(b, -1), params["w"], precision="highest"))

    rng = np.random.default_rng(3)
    return Network({}, None, apply, {}), {"w": rng.standard_normal((SIDE * SIDE * 3, WIDTH)).astype(np.float32) / SIDE}
