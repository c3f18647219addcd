"""Trains a small latent diffusion model from scratch: autoencoder, then denoiser and text encoders."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data import loader, training_set
from proreflow_jax.jobs import pretrain_networks, pretrain_pictures
from proreflow_jax.jobs.pretrain_facts import DIFFUSION, VAE
from proreflow_jax.jobs.pretrain_networks import Diffusion, fitting, latent_factors, make_autoencoder, make_diffusion
from proreflow_jax.jobs.pretrain_page import PretrainPage
from proreflow_jax.models.network import Network, Params
from proreflow_jax.pretrained import copying, pipeline, tokenizer, write_pipeline
from proreflow_jax.reflow import loop, pretraining
from proreflow_jax.reflow.train_step import TrainState, averaged, init_state, make_optimizer, state_shardings, train_step
from proreflow_jax.run.stages import seed_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.checkpoint import Checkpoints
from proreflow_jax.runtime.metrics import Metrics
from proreflow_jax.runtime.processes import job_lock
from proreflow_jax.runtime.progress import Progress
from proreflow_jax.storage import atomic, paths, sealed

log = logging.getLogger(__name__)
REPLICATED = [(".*", jax.sharding.PartitionSpec())]
LATENTS = "latents.json"  # in the run's folder: the factors of the autoencoder's config.json that its training decides


class Rows:
    """Arrays with the examples in front, as a source for the loader."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[index] for name, values in self.arrays.items()}


class Training(NamedTuple):
    """What is trained: how weights begin, and the block of the config with steps, batch and optimizer."""

    folder: Path  # of its checkpoints and metrics
    init: Callable[[jax.Array], Params]
    settings: ConfigDict
    ema: float  # decay of the average; 0: none


def pretrain(config: ConfigDict, out: str, snapshot: bool = False) -> None:
    """Trains both parts and writes the diffusers folder `out`; with `snapshot` writes what is trained by now.

    Raises ValueError if `out` exists, FileNotFoundError if there is nothing yet to take a snapshot of.
    """
    if not out:
        raise UserError("--out is empty: name the diffusers folder to write")
    if paths.parse_local(out, "--out").exists():
        raise UserError(f"{out} exists already: choose another --out")
    tokenizers = pretrain_networks.TOKENIZERS[pretrain_networks.kind(config)]
    pretrain_pictures.check_pictures(config)
    run = paths.parse_local(config.root, "--config.root") / paths.check_name(config.name)
    start = pipeline.load_pipeline(paths.parse_local(config.start, "--config.start")) if config.start else None
    if snapshot:
        write_model(config, run, out, averages(config, run, start))
        return
    with job_lock(run):
        page = PretrainPage(config, run, out)
        images, texts = training_set.load_training_set(config.data)
        vae, sheet = make_autoencoder(config), pretrain_pictures.choose_sheet(config, images, texts)
        if sheet:
            pretrain_pictures.write_record(run, config, sheet)
        vae_looks = page.onlookers(VAE, sheet, sheet and pretrain_pictures.reconstruction(vae, sheet))
        vae_params = fitting(start, "vae", vae) if start else _train_vae(config, vae, images, run, vae_looks)
        mean, std = _latents(vae, vae_params, images)
        factors = _start_factors(start) if start else latent_factors(config, mean, std)
        scaling, shift = factors["scaling_factor"], factors.get("shift_factor", 0.0)
        log.info("latents %s, scaling factor %.4f", mean.shape[1:], scaling)
        atomic.write_json(run / LATENTS, factors)

        prompts = _tokenizer(config, texts, [run / name for name in tokenizers])
        ids = prompts.encode([text for wordings in texts for text in wordings]).reshape(len(texts), -1, prompts.length)
        rows = Rows({"mean": (mean - shift) * scaling if shift else mean * scaling, "std": std * scaling, "ids": ids})
        diffusion, empty = make_diffusion(config, run), prompts.encode([""])[0]
        draw = None
        if sheet:
            decoder = pretrain_pictures.Decoder(make_autoencoder(config, factors), vae_params, scaling)
            draw = pretrain_pictures.prompted(config, diffusion, decoder, prompts.encode(list(sheet.prompts)), empty)
        begin = _begin(start, diffusion) if start else None
        looks = page.onlookers(DIFFUSION, sheet, draw)
        params = _train_diffusion(config, diffusion, rows, empty, run, begin=begin, onlookers=looks)
        write_model(config, run, out, {"vae": vae_params, **params})
        page.written()


def write_model(config: ConfigDict, run: Path, out: str, params: Mapping[str, Params]) -> None:
    """Writes the diffusers folder `out` with the run's tokenizers and the latents' factors; parameters by component."""
    diffusion, vae = make_diffusion(config, run), make_autoencoder(config, atomic.read_json(run / LATENTS))
    configs = {"vae": vae.config, **{name: network.config for name, network in diffusion.networks.items()}}
    with atomic.atomic_folder(out) as draft:
        write_pipeline.write_pipeline(draft, configs, params, diffusion.scheduler, np.dtype(config.dtype))
        for name in pretrain_networks.TOKENIZERS[diffusion.name]:
            copying.copy_component(run, name, draft)
        if card := training_set.card(config.data.kind, diffusion.name):
            (draft / "README.md").write_text(card, encoding="utf-8")
        if lines := training_set.known_prompts(config.data):
            (draft / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sealed.seal(draft, {"model": config.name})
    log.info("wrote %s", out)


def averages(config: ConfigDict, run: Path, start: pipeline.Pipeline | None) -> dict[str, Params]:
    """{component: parameters} of the newest checkpoints. Raises FileNotFoundError if there are none yet."""
    if not (run / LATENTS).is_file():
        raise MissingFile(f"{run} has no diffusion training yet: take the snapshot after its first checkpoint")
    vae, diffusion = make_autoencoder(config), make_diffusion(config, run)
    trained = fitting(start, "vae", vae) if start else averaged(_newest(config, _vae_training(config, vae, run)))
    joint = averaged(_newest(config, _diffusion_training(config, diffusion, run)))
    return jax.device_get({"vae": trained, **diffusion.apart(joint)})


def _start_factors(start: pipeline.Pipeline) -> dict[str, float]:
    """The latents' factors of the model to start from."""
    shift = start.vae.config.get("shift_factor")
    return {"scaling_factor": start.scaling} | ({} if shift is None else {"shift_factor": shift})


def _tokenizer(config: ConfigDict, texts: Sequence[Sequence[str]], folders: Sequence[Path]) -> tokenizer.PromptTokenizer:
    """The run's tokenizers side by side: copied from the model to start from, or learned on the captions, all alike."""
    if config.start:
        for folder in folders:
            copying.copy_component(paths.parse_local(config.start, "--config.start"), folder.name, folder.parent)
    else:
        every = sorted({text for wordings in texts for text in wordings})
        learned = tokenizer.learn(every, config.text.merges)
        for folder in folders:
            tokenizer.write_tokenizer(folder, *learned, config.text.length)
    return tokenizer.load_tokenizer(*folders)


def _vae_training(config: ConfigDict, vae: Network, run: Path) -> Training:
    return Training(run / VAE, lambda key: vae.init(key), config.vae, ema=0.0)


def _train_vae(config: ConfigDict, vae: Network, images: np.ndarray, run: Path, onlookers: loop.Onlookers) -> Params:
    draw = partial(pretraining.draw_autoencoder, latent=pretrain_networks.latent_shape(config))
    loss = partial(pretraining.autoencoder_loss, vae=vae, kl_weight=config.vae.kl_weight)
    state = _fit(config, _vae_training(config, vae, run), Rows({"image": images}), draw, loss, onlookers=onlookers)
    return jax.device_get(averaged(state))


def _latents(vae: Network, params: Params, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every image's unscaled latents."""
    encode = jax.jit(lambda x: vae.apply(params, pretraining.to_float(x), method="encode"))
    pad = -len(images) % batch
    padded = np.concatenate([images, images[:pad]])
    parts = [jax.device_get(encode(padded[i : i + batch])) for i in range(0, len(padded), batch)]
    mean, std = (np.concatenate(column)[: len(images)] for column in zip(*parts, strict=True))
    return mean, std


def _diffusion_training(config: ConfigDict, diffusion: Diffusion, run: Path) -> Training:
    return Training(run / DIFFUSION, diffusion.init, config.diffusion, config.diffusion.ema)


def _begin(start: pipeline.Pipeline, diffusion: Diffusion) -> Params:
    """Denoiser and text encoders of the model to start from, as they are trained."""
    return diffusion.join({name: fitting(start, name, network) for name, network in diffusion.networks.items()})


def _train_diffusion(
    config: ConfigDict,
    diffusion: Diffusion,
    rows: Rows,
    empty: np.ndarray,
    run: Path,
    *,
    begin: Params | None,
    onlookers: loop.Onlookers,
) -> dict[str, Params]:
    draw, loss = pretrain_networks.draw_and_loss(config, diffusion, empty)
    state = _fit(config, _diffusion_training(config, diffusion, run), rows, draw, loss, begin, onlookers=onlookers)
    return jax.device_get(diffusion.apart(averaged(state)))


def _fresh(config: ConfigDict, training: Training) -> Callable[..., TrainState]:
    """The state at step 0, a function of the weights to begin with, or of nothing."""
    chain = make_optimizer({**training.settings.optimizer, "steps": training.settings.steps})
    key = jax.random.fold_in(seed_key(config.seed), 2**31 - 1)
    return lambda *begin: init_state(begin[0] if begin else training.init(key), chain, training.ema > 0)


def _target(shapes: TrainState, places: Any) -> TrainState:
    """What a checkpoint is restored to."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)


def _newest(config: ConfigDict, training: Training) -> TrainState:
    """The newest checkpoint, of a training that may be under way."""
    shapes = jax.eval_shape(_fresh(config, training))
    with Checkpoints(training.folder, read_only=True) as checkpoints:
        step, state, _ = checkpoints.restore(None, _target(shapes, state_shardings(mesh.make_mesh(), REPLICATED, shapes)))
    log.info("%s: step %d", training.folder, step)
    return state


def _fit(
    config: ConfigDict,
    training: Training,
    rows: Rows,
    draw: Callable,
    loss: Callable,
    begin: Params | None = None,
    *,
    onlookers: loop.Onlookers,
) -> TrainState:
    """One training, resumed from its newest checkpoint if there is one."""
    c, folder, machine = training.settings, training.folder, mesh.make_mesh()
    mesh.check_batch(c.batch, 1, machine)
    chain = make_optimizer({**c.optimizer, "steps": c.steps})
    key = seed_key(config.seed)
    fresh = _fresh(config, training)
    shapes = jax.eval_shape(fresh)
    places = state_shardings(machine, REPLICATED, shapes)
    step = partial(train_step, draw=draw, loss=loss, optimizer=chain, ema_decay=training.ema, accumulation=1, unroll=True)
    batches = mesh.batch_sharding(machine)
    jitted = jax.jit(step, in_shardings=(places, None, batches, None), out_shardings=(places, None), donate_argnums=0)
    with Checkpoints(folder, every=config.checkpoint_every) as checkpoints:
        if checkpoints.latest() is None:
            meta, start, state = {}, 0, jax.jit(fresh, out_shardings=places)(*([] if begin is None else [begin]))
        else:
            start, state, meta = checkpoints.restore(None, _target(shapes, places))
        if start >= c.steps:
            return state
        log.info("%s: %d of %d steps", folder, start, c.steps)
        with (
            loader.Loader(rows, c.batch, config.seed, start_step=start) as source,
            Metrics(folder, start, tensorboard=False) as metrics,
            Progress(folder.name, c.steps, "step", start) as progress,
        ):
            placed = ((at, mesh.put_batch(machine, batch, c.batch)) for at, batch in source)
            advance = lambda state, batch: jitted(state, None, batch, key)
            onlookers = onlookers._replace(stepped=lambda done, values: progress.advance(1, f"loss {values['loss']:.4g}"))
            kw = dict(total=c.steps, metrics=metrics, checkpoints=checkpoints, log_every=config.log_every)
            kw |= dict(sums=meta.get(loop.SUMS), onlookers=onlookers)
            return loop.run_loop(advance, state, placed, meta=lambda done: {"position": done * c.batch}, **kw)
