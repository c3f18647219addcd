"""Trains a small latent diffusion model from scratch: autoencoder, then UNet and text encoder."""

import itertools
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import captions, digits, loader
from proreflow_jax.flow.schedule import make_schedule
from proreflow_jax.models.network import Network, Params, make_text_encoder, make_unet, make_vae
from proreflow_jax.pretrained import tokenizer, write_pipeline
from proreflow_jax.reflow import loop, pretraining
from proreflow_jax.reflow.train_step import TrainState, averaged, init_state, state_shardings, train_step
from proreflow_jax.runtime import mesh, optimizer
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.processes import job_lock
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
REPLICATED = [(".*", jax.sharding.PartitionSpec())]


class Rows:
    """Arrays with the examples in front, as a source for the loader."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[index] for name, values in self.arrays.items()}


def pretrain(config: ConfigDict, out: str) -> None:
    """Trains both parts and writes the diffusers folder `out`. Raises ValueError if `out` exists."""
    if not out:
        raise UserError("--out is empty: name the diffusers folder to write")
    if paths.parse_local(out, "--out").exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it")
    run = paths.parse_local(config.root, "--config.root") / paths.check_name(config.name)
    with job_lock(run):
        images, texts = _images(config)
        vae = make_vae(write_pipeline.vae_config(config.vae, config.data.resolution))
        vae_params = _train_vae(config, vae, images, run / "vae")
        mean, std = _latents(vae, vae_params, images)
        scaling = float(1.0 / np.sqrt(mean.var() + (std**2).mean()))
        log.info("latents %s, scaling factor %.4f", mean.shape[1:], scaling)

        folder = run / "tokenizer"
        tokenizer.write_tokenizer(folder, *tokenizer.learn(sorted(set(texts)), config.text.merges), config.text.length)
        prompts = tokenizer.load_tokenizer(folder)
        sizes = write_pipeline.text_config(config.text, tokenizer.vocabulary_size(folder))
        text_encoder = make_text_encoder(sizes)
        unet = make_unet(write_pipeline.unet_config(config.unet, config.text, mean.shape[1:]))
        rows = Rows({"mean": mean * scaling, "std": std * scaling, "ids": prompts.encode(texts)})
        params = _train_diffusion(config, unet, text_encoder, rows, prompts.encode([""])[0], run / "diffusion")
        trained = {"vae": vae_params, "unet": params[0], "text_encoder": params[1]}
        configs = {"vae": {**vae.config, "scaling_factor": scaling}, "unet": unet.config, "text_encoder": sizes}
        scheduler = write_pipeline.scheduler_config(config.schedule)
        with atomic.atomic_folder(out) as draft:
            write_pipeline.write_pipeline(draft, configs, trained, scheduler)
            shutil.copytree(folder, draft / "tokenizer")
    log.info("wrote %s", out)


def _images(config: ConfigDict) -> tuple[np.ndarray, list[str]]:
    """All images of the dataset, each in every shift, uint8 (n, h, w, 3), and their captions."""
    d = config.data
    digits.write_dataset(d.path, d.resolution, seed=0)
    source = captions.open_tfds(d.path, d.split, d.image_key, d.caption_key, d.resolution)
    rows = [source[i] for i in range(len(source))]
    still, texts = np.stack([row["image"] for row in rows]), [row["caption"] for row in rows]
    padded = np.pad(still, ((0, 0), (d.shift, d.shift), (d.shift, d.shift), (0, 0)))
    offsets = list(itertools.product(range(2 * d.shift + 1), repeat=2))
    moved = [padded[:, y : y + d.resolution, x : x + d.resolution] for y, x in offsets]
    return np.concatenate(moved), texts * len(offsets)


def _train_vae(config: ConfigDict, vae: Network, images: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    c = config.vae
    side = config.data.resolution // 2 ** (len(c.block_out_channels) - 1)
    draw = partial(pretraining.draw_autoencoder, latent=(side, side, c.latent_channels))
    loss = partial(pretraining.autoencoder_loss, vae=vae, kl_weight=c.kl_weight)
    state = _fit(config, folder, lambda key: vae.init(key), Rows({"image": images}), draw, loss, c, ema=0.0)
    return jax.device_get(averaged(state))


def _latents(vae: Network, params: Params, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every image's unscaled latents."""
    encode = jax.jit(lambda x: vae.apply(params, pretraining.to_float(x), method="encode"))
    pad = -len(images) % batch
    padded = np.concatenate([images, images[:pad]])
    parts = [jax.device_get(encode(padded[i : i + batch])) for i in range(0, len(padded), batch)]
    mean, std = (np.concatenate(column)[: len(images)] for column in zip(*parts, strict=True))
    return mean, std


def _train_diffusion(
    config: ConfigDict, unet: Network, text_encoder: Network, rows: Rows, empty: np.ndarray, folder: Path
) -> tuple[dict, dict]:
    c, s = config.diffusion, config.schedule
    schedule = make_schedule(s.beta_schedule, s.beta_start, s.beta_end)
    draw = partial(pretraining.draw_noise, schedule=schedule, empty=jnp.asarray(empty), drop=c.prompt_dropout)
    loss = partial(pretraining.noise_loss, unet=unet, text_encoder=text_encoder)

    def init(key: jax.Array) -> Params:
        first, second = jax.random.split(key)
        return pretraining.joined({pretraining.UNET: unet.init(first), pretraining.TEXT: text_encoder.init(second)})

    state = _fit(config, folder, init, rows, draw, loss, c, ema=c.ema)
    params = averaged(state)
    return jax.device_get((pretraining.part(params, pretraining.UNET), pretraining.part(params, pretraining.TEXT)))


def _fit(
    config: ConfigDict, folder: Path, init: Callable, rows: Rows, draw: Callable, loss: Callable, c: ConfigDict, ema: float
) -> TrainState:
    """One training, resumed from its newest checkpoint if there is one."""
    machine = mesh.make_mesh()
    mesh.check_batch(c.batch, 1, machine)
    chain = optimizer.make({**c.optimizer, "steps": c.steps})
    key = jax.random.key(config.seed)
    fresh = lambda: init_state(init(jax.random.fold_in(key, 2**31 - 1)), chain, ema > 0)
    places = state_shardings(machine, REPLICATED, jax.eval_shape(fresh))
    step = partial(train_step, draw=draw, loss=loss, optimizer=chain, ema_decay=ema, accumulation=1, unroll=True)
    batches = mesh.batch_sharding(machine)
    jitted = jax.jit(step, in_shardings=(places, None, batches, None), out_shardings=(places, None), donate_argnums=0)
    with Checkpoints(folder, every=config.checkpoint_every) as checkpoints:
        if checkpoints.latest() is None:
            start, state = 0, jax.jit(fresh, out_shardings=places)()
        else:
            shapes = jax.eval_shape(fresh)
            target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
            start, state, _ = checkpoints.restore(None, target)
        if start >= c.steps:
            return state
        log.info("%s: %d of %d steps", folder, start, c.steps)
        with (
            loader.Loader(rows, c.batch, config.seed, start_step=start) as source,
            Metrics(folder, start, c.steps, tensorboard=False) as metrics,
        ):
            placed = ((at, mesh.put_batch(machine, batch, c.batch)) for at, batch in source)
            advance = lambda state, batch: jitted(state, None, batch, key)
            kw = dict(total=c.steps, metrics=metrics, checkpoints=checkpoints, log_every=config.log_every)
            return loop.run_loop(advance, state, placed, meta=lambda done: {"position": done * c.batch}, **kw)
