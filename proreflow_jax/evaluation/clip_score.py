"""CLIP score: how well images fit their prompts, and the standard error of its mean.

score = 100 max(cos(image, text), 0), each pair by itself, of the projected states of CLIP's two towers. So do papers on
text-to-image print it; some print the bare cosine, 0.31 for 31. Hessel et al. 2021 (CLIPScore, eq. 1) weigh by 2.5 instead of
100 and put "A photo depicts" before every caption; here prompts stay as they are. A score means nothing without the name of
its network (NAMED): those of ViT-L/14 and ViT-g/14 do not compare.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8
from PIL import Image

from proreflow_jax import MissingFile, UserError
from proreflow_jax.evaluation.moments import Moments, gaussian
from proreflow_jax.flow import losses
from proreflow_jax.models import clip_image, network
from proreflow_jax.models.network import Network, Params
from proreflow_jax.pretrained import config_fields, tokenizer, weights

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images, red green blue; OpenCLIP took them over
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 100.0
FLAG = "--config.evaluate.clip"
CONVERT = (
    "convert it where you trust it: "
    """python -c "from transformers import CLIPModel as M; M.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')", """
    f"copy the tokenizer's files beside it, and name NEW_FOLDER by {FLAG}"
)
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_DEFAULTS = dict(  # transformers leaves these numbers out of a config.json
    eos_token_id=49407,
    hidden_act="quick_gelu",
    hidden_size=512,
    intermediate_size=2048,
    layer_norm_eps=1e-5,
    max_position_embeddings=77,
    num_attention_heads=8,
    num_hidden_layers=12,
    vocab_size=49408,
)
LOGIT_SCALE = {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}  # of CLIP's training loss


class Named(NamedTuple):
    """A published CLIP in numbers; `text` and `vision` have the columns of TOWER. Both take 224 px in patches of 14."""

    model: str
    projection_dim: int
    hidden_act: str
    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    parameters: int  # of both towers, without logit_scale


NAMED = {
    "openai/clip-vit-large-patch14": Named(
        "ViT-L/14", 768, "quick_gelu", (768, 3072, 12, 12), (1024, 4096, 24, 16), 427_616_512
    ),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": Named(
        "ViT-g/14", 1024, "gelu", (1024, 4096, 24, 16), (1408, 6144, 40, 16), 1_366_678_272
    ),
}


class Clip(NamedTuple):
    """Both towers; `params` holds the parameters of both in one flat dict, whose names do not meet."""

    text: Network
    image: Network
    params: dict[str, np.ndarray]
    name: str  # a `model` of NAMED with the same numbers, else that of the folder


def named_config(name: str) -> dict:
    """The config.json of an entry of NAMED. Raises ValueError for another name."""
    if name not in NAMED:
        raise UserError(f"CLIP {name!r} is unknown, known: {', '.join(NAMED)}")
    published = NAMED[name]
    tower = lambda row: dict(zip(TOWER, row, strict=True), hidden_act=published.hidden_act)
    vision = tower(published.vision) | dict(image_size=224, patch_size=14)
    return dict(projection_dim=published.projection_dim, text_config=tower(published.text), vision_config=vision)


def tower_configs(config: Mapping[str, Any]) -> tuple[dict, dict]:
    """(text, image) configs out of that of a CLIPModel, read as transformers does.

    Numbers left out are its defaults, `text_config_dict` of old files goes before `text_config`, and the projection's
    width is the model's, whatever a tower says.
    """
    width = {"projection_dim": config.get("projection_dim", 512)}
    text, vision = (config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {} for tower in ("text", "vision"))
    kind = {"architectures": ["CLIPTextModelWithProjection"]}
    return TEXT_DEFAULTS | text | width | kind, clip_image.DEFAULTS | vision | width


def load_clip(folder: Path) -> Clip:
    """Both towers from a folder of transformers' CLIPModel: config.json and model.safetensors, whole or sharded.

    Raises FileNotFoundError or ValueError, one line: no such folder, only pickled weights, or tensors that do not fit.
    """
    config, text, image = outline_clip(folder)
    with _of_clip():
        params = weights.from_torch(weights.read_tensors(folder), {**text.shapes, **image.shapes, **LOGIT_SCALE}, str(folder))
    del params["logit_scale"]
    same = (row.model for published, row in NAMED.items() if _alike(config, tower_configs(named_config(published))))
    return Clip(text, image, params, next(same, folder.resolve().name))


def outline_clip(folder: Path) -> tuple[tuple[dict, dict], Network, Network]:
    """(configs, text tower, image tower) by a folder's config.json alone. Raises as `load_clip`."""
    if not (folder / "config.json").is_file():
        other = (folder / "open_clip_config.json").is_file()
        why = (
            ", only OpenCLIP's: take the same network in transformers' format" if other else ": name the folder of a CLIPModel"
        )
        raise MissingFile(f"{folder} (--config.evaluate.clip) holds no config.json of transformers{why}")
    with _of_clip():
        towers = _checked_towers(folder)
        return towers, network.make_text_encoder(towers[0]), clip_image.make_image_encoder(towers[1])


def _checked_towers(folder: Path) -> tuple[dict, dict]:
    path = folder / "config.json"
    text, image = tower_configs(config_fields.read_config(folder, "clip"))
    return config_fields.check_fields("text_encoder", text, path), config_fields.check_fields("image_encoder", image, path)


def read_tokenizer(folder: Path) -> tokenizer.PromptTokenizer:
    """The tokenizer beside the towers. Raises FileNotFoundError or ValueError, one line, where there is none."""
    with _of_clip():
        return tokenizer.load_tokenizer(folder, encoders=[_checked_towers(folder)[0]])


@contextmanager
def _of_clip() -> Iterator[None]:
    """Puts this network's flag and command into errors of the readers of models."""
    try:
        yield
    except UserError as error:
        text = str(error).replace(weights.CONVERT, CONVERT).replace(tokenizer.RULE, FLAG)
        kind = MissingFile if isinstance(error, MissingFile) else UserError
        raise kind(text if FLAG in text else f"{text}: name another {FLAG}") from None


def _alike(first: tuple[dict, dict], second: tuple[dict, dict]) -> bool:
    """Whether two pairs of towers have the same numbers; their weights may still differ."""
    fields = (*TOWER, "hidden_act", "projection_dim", "image_size", "patch_size")
    return all(one.get(field) == other.get(field) for one, other in zip(first, second, strict=True) for field in fields)


def prepare_clip(images: Iterable[Shaped[np.ndarray, "..."]], size: int = 224) -> Float[np.ndarray, "n size size 3"]:
    """Images for the image tower, float32, on the host; bit for bit what transformers' CLIPImageProcessor makes by Pillow.

    The shorter side is resized to `size` by Pillow's bicubic filter on uint8 (antialiased and rounded; the longer side is
    rounded down), the centre cropped, values normalised by MEAN and STD. Where an odd number of pixels is cropped away,
    OpenAI's own code may cut one pixel further on; for square images there is no difference.

    images: each (h, w, 3) uint8, of any size: an array (n, h, w, 3) too. Raises ValueError for other kinds.
    """
    return np.stack([_normalised(_cropped(image, size)) for image in images])


def _cropped(image: Shaped[np.ndarray, "..."], size: int) -> UInt8[np.ndarray, "size size 3"]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"CLIP score takes images (h, w, 3) of uint8, not {image.shape} of {image.dtype}")
    h, w = image.shape[:2]
    new_h, new_w = (int(size * side / min(h, w)) for side in (h, w))
    resized = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC))
    top, left = (new_h - size) // 2, (new_w - size) // 2
    return resized[top : top + size, left : left + size]


def _normalised(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    unit = (image.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (unit - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


def make_scores(
    text: Network, image: Network
) -> Callable[[Params, Float[Array, "b h w 3"], Int[Array, "b s"]], Float[Array, "b"]]:
    """scores(params, images, ids): the CLIP score of every pair, (b,) in [0, 100], float32; pure, to be jitted.

    params: of both towers (`Clip.params`), in the dtype to compute in. images: from `prepare_clip`. ids: of the network's own
    tokenizer (`pretrained.tokenizer`).
    """

    def scores(params: Params, images: Float[Array, "b h w 3"], ids: Int[Array, "b s"]) -> Float[Array, "b"]:
        cosine = losses.cosine(image.apply(params, images), text.apply(params, ids).pooled)
        return SCALE * jnp.maximum(cosine, 0.0)

    return scores


def standard_error(scores: Moments) -> float:
    """Of the mean of scores, as moments of width 1: sample deviation / sqrt(count). Raises ValueError for fewer than two."""
    _, covariance = gaussian(scores)
    return math.sqrt(covariance[0, 0] / scores.count)
