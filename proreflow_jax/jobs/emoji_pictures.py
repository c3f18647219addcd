"""Pictures for the emoji's prompts, as arrays that are kept: features, latents, the first few pictures; resumable by batches.

The noise of picture i depends on (seed, i) alone, so rows of a table share it, and neither the batch nor the devices change it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from proreflow_jax.evaluation import fid
from proreflow_jax.evaluation.picture_features import PictureFeatures
from proreflow_jax.flow import solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.pretrained import weights as weight_files
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import make_predict, text_context
from proreflow_jax.run.experiment import Experiment, Weights
from proreflow_jax.run.stages import EVALUATION_KEY, seed_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.runtime.metrics import check_finite_rows
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic, paths
from proreflow_jax.storage.atomic import json_digest
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
SHOWN = 16  # pictures kept of each row, for the grid
SAVE_EVERY = 5  # batches that a kill costs at most
Arrays = dict[str, np.ndarray]


class PictureRow(NamedTuple):
    """One method at one number of steps and one guidance scale."""

    method: str
    windows: int  # 0: the base model
    flow: Parameterization
    steps: int
    guidance: float
    shipped: bool = False  # drawn by the student that comes with the base model

    @property
    def calls(self) -> int:
        """Evaluations of the network for a picture; guidance takes two a step."""
        return self.steps * (1 if self.guidance == 1 else 2)


class PictureDraw(NamedTuple):
    """What draws, and what it need not compile again."""

    run: Callable  # (weights, row, rows, seed) -> (latents, pictures) of a batch on the mesh; rows: "number" and "ids"
    compiled: set[tuple[Parameterization, bool]]  # flows, each with guidance or without


class PromptRows(NamedTuple):
    """What is drawn: prompts as ids, and a digest of all beside the UNet that pictures depend on."""

    name: str  # for the log
    noise: int  # number of the first one's noise
    texts: Sequence[str]
    ids: Int[np.ndarray, "n s"]
    digest: str


def read_prompts(experiment: Experiment, name: str, texts: Sequence[str], noise: int = 0) -> PromptRows:
    """The prompts as ids of the base model's tokenizer; noise: number of the first one's."""
    base = experiment.base
    ids = base.tokenizer.encode(list(texts))
    frozen = fold(digest({"text": base.text, "vae": base.params["vae"]}))
    configs = {name: network.config for name, network in base.networks.items()}
    about = {"ids": ids.tolist(), "empty": base.tokenizer.encode([""]).tolist(), "frozen": frozen}
    about |= {"noise": noise, "configs": configs, "scheduler": base.scheduler}
    return PromptRows(name, noise, texts, ids, json_digest(about))


def make_picture_draw(experiment: Experiment) -> PictureDraw:
    """One step is compiled for each flow, with guidance and without, and serves every number of steps and every scale."""
    n, base, dtype = experiment.networks, experiment.base, experiment.config.model.sampling_dtype
    whole, split = mesh.replicated(experiment.mesh), mesh.batch_sharding(experiment.mesh)
    text, vae = jax.device_put(base.text, whole), jax.device_put(base.params["vae"], whole)
    context = jax.jit(partial(text_context, n.condition))
    negative = context(text, jax.device_put(base.tokenizer.encode([""]), whole))
    decode = jax.jit(lambda params, latents: sampler.decode(n.vae, params, latents, n.scaling, dtype))

    @partial(jax.jit, out_shardings=split)
    def noise(numbers: jax.Array, key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, EVALUATION_KEY)
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), base.latent_shape))(numbers)

    @partial(jax.jit, static_argnames=("flow", "plain"))
    def move(params: Any, z: jax.Array, ends: jax.Array, states: Any, scale: Any, *, flow: Any, plain: bool) -> jax.Array:
        predict = solvers.guided(make_predict(n.denoiser, n.schedule, params, dtype), states, negative, 1 if plain else scale)
        t, u = (jnp.full(z.shape[0], end) for end in ends)
        return solvers.make_step(flow, n.schedule, predict)(z, t, u, None)[0]

    def draw(weights: Weights, row: PictureRow, rows: dict[str, jax.Array], seed: int) -> tuple[jax.Array, jax.Array]:
        nodes = windows.sampling_nodes(row.steps, max(row.flow.windows, 1)).astype(np.float32)
        z, states = noise(rows["number"], seed_key(seed)), context(text, rows["ids"])
        scale = np.float32(row.guidance)
        for ends in zip(nodes[:-1], nodes[1:], strict=True):
            z = move(weights.params, z, np.array(ends), states, scale, flow=row.flow, plain=row.guidance == 1)
        return z, decode(vae, z)

    return PictureDraw(draw, set())


def measure_pictures(
    experiment: Experiment,
    row: PictureRow,
    weights: Weights,
    prompts: PromptRows,
    seed: int,
    *,
    draw: PictureDraw,
    judge: PictureFeatures,
) -> Arrays:
    """features (n, 1280), latents (n, h, w, c), pictures (SHOWN or n, height, width, 3), seconds () an image.

    Read from <run>/scores if they are there, computed from where the last run was stopped otherwise. Raises FloatingPointError,
    one line with the prompts, for latents that are no finite numbers; nothing of that batch is kept.
    """
    config = experiment.config
    model = {"weights": weights.digest, "flow": list(row.flow), "steps": row.steps, "guidance": row.guidance}
    about = model | {"seed": seed, "prompts": prompts.digest, "judge": judge.digest, "dtype": config.model.sampling_dtype}
    about |= sampler.decoding_facts(experiment.networks.vae, config.model.sampling_dtype)
    folder, stem = experiment.run / "scores", f"emoji-{fid.file_stem(about)}"
    path = folder / f"{stem}.safetensors"
    arrays, count = _read(path), len(prompts.ids)
    position = len(arrays["features"]) if arrays else 0
    if position >= count:
        return arrays
    said = f"{row.method}, {row.steps} steps, guidance {row.guidance:g}, seed {seed}"
    log.info("%s: %d pictures of %s pairs", said, count - position, prompts.name)
    batch = config.evaluate.batch
    start = lambda first, row=row: draw.run(weights, row, _batch(experiment, prompts, first, batch), seed)
    if (form := (row.flow, row.guidance == 1)) not in draw.compiled:  # now, so that `seconds` are those of drawing
        jax.block_until_ready(start(position, row._replace(steps=max(row.flow.windows, 1))))
        draw.compiled.add(form)
    progress = Progress(said, count, "picture", position)
    for done, first in enumerate(range(position, count, batch), 1):
        began = time.monotonic()
        latents, images = (np.asarray(part)[: count - first] for part in jax.block_until_ready(start(first)))
        seconds = (time.monotonic() - began) / batch
        check_finite_rows(np.isfinite(latents).all(axis=(1, 2, 3)), prompts.texts[first : first + batch])
        arrays = _joined(arrays, {"features": judge.of(images), "latents": latents, "pictures": images}, seconds)
        if done % SAVE_EVERY == 0 or first + batch >= count:
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / f"{stem}.json", about)
            with atomic.drafted(path) as draft:
                weight_files.save_tensors(draft, arrays | {"pictures": arrays["pictures"].astype(np.float16)})  # exact to 2,048
        progress.advance(len(images))
    progress.close()
    return arrays


def _batch(experiment: Experiment, prompts: PromptRows, first: int, batch: int) -> dict[str, jax.Array]:
    """Rows from picture `first` on; the last batch is filled up by its last prompt."""
    numbers = np.arange(first, first + batch, dtype=np.uint32)
    rows = {"number": prompts.noise + numbers, "ids": prompts.ids[np.minimum(numbers, len(prompts.ids) - 1)]}
    return mesh.put_batch(experiment.mesh, rows, batch)


def _read(path: Location) -> Arrays:
    if not path.is_file():
        return {}
    tensors = dict(weight_files.Tensors([paths.local_copy(path)]))
    return tensors | {"pictures": tensors["pictures"].astype(np.uint8)}


def _joined(arrays: Arrays, new: Arrays, seconds: float) -> Arrays:
    """The arrays with a batch behind them; pictures beyond SHOWN are dropped, seconds are those of the fastest batch."""
    joined = {name: np.concatenate([arrays[name], part]) if arrays else part for name, part in new.items()}
    joined["pictures"] = joined["pictures"][:SHOWN]
    fastest = min(float(arrays["seconds"]), seconds) if arrays else seconds
    return joined | {"seconds": np.array(fastest, np.float32)}
