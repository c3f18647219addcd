"""The lab as a testbed: vectors of a mixture of Gaussians, where a million forwards are seconds of a CPU.

Only the networks and the data are the lab's own. Pairs, loss, update and sampler are those of every other run.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proreflow_jax import UserError
from proreflow_jax.data import mixture
from proreflow_jax.evaluation import frechet, sliced
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import from_config
from proreflow_jax.models import mlp
from proreflow_jax.models.network import Context, Params, make_conditioner
from proreflow_jax.pretrained import pipeline, sources, weights, write_pipeline
from proreflow_jax.pretrained.tokenizer import PromptTokenizer
from proreflow_jax.reflow import pretraining, sampler, train_step
from proreflow_jax.reproduction.cell import read_as
from proreflow_jax.reproduction.testbed import Testbed, measured_steps
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.open import BaseDenoiser, open_in_memory
from proreflow_jax.run.stages import EVALUATION_KEY, Stage, fold_seed, run_key, seed_key
from proreflow_jax.runtime import mesh
from proreflow_jax.runtime.metrics import check_finite
from proreflow_jax.storage import atomic, paths

log = logging.getLogger(__name__)
REAL = 1 << 20  # seeds of real examples for measuring begin here, out of the way of those for training
CHUNK = 100  # updates of the base model in one call


class Instruments(NamedTuple):
    """What all cells are measured with."""

    draw: Callable[..., jax.Array]  # (params, noise, context, context, flow=, steps=)
    real: tuple[np.ndarray, np.ndarray]  # moments of the mixture, in closed form


class Inputs(NamedTuple):
    """What every method of a seed is measured by."""

    noise: jax.Array  # (n, 1, 1, d)
    context: Context
    reference: np.ndarray  # the teacher's own many-step results from that noise, (n, d)
    teacher: tuple[np.ndarray, np.ndarray]  # moments of these
    real: np.ndarray  # as many real examples, as `sliced.project` gives them
    floor: dict[str, float]  # the measures of as many other real examples


def the_mixture(config: ConfigDict) -> mixture.Mixture:
    """The data of a config."""
    c = config.lab
    return mixture.make_mixture(c.classes, c.components, c.dimensions, c.mixture_seed)


def open_lab(config: ConfigDict) -> Experiment:
    """The lab's experiment; trains the base model, once for each run folder. Raises UserError, one line."""
    machine = mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    base = _pipeline(config)
    path = paths.parse_local(config.root, "--config.root") / paths.check_name(config.name)
    return open_in_memory(config, machine, base, BaseDenoiser(partial(_base_weights, config, base, path)))


def _pipeline(config: ConfigDict) -> pipeline.Pipeline:
    """A model in miniature: latents are the examples themselves, a prompt is the name of a class."""
    c = config.lab
    empty = c.classes  # id of the empty prompt
    shape = {"in_channels": c.dimensions, "cross_attention_dim": empty + 1, "sample_size": 1}
    encoder = mlp.make_one_hot(empty + 1)
    networks = {
        "unet": mlp.make_mlp(shape | {"width": c.width, "blocks": c.blocks, "features": c.time_features}),
        "vae": mlp.make_no_autoencoder(),
        "text_encoder": encoder,
    }
    encode = lambda prompts: np.array([[int(text) if text else empty] for text in prompts], np.int32).reshape(-1, 1)
    return pipeline.Pipeline(
        source=sources.ModelSource(Path("lab"), {}, "v1"),
        networks=networks,
        params={"vae": {}, "text_encoder": {}},
        tokenizer=PromptTokenizer(1, encode),
        condition=make_conditioner({"text_encoder": encoder}, (), None),
        scheduler=write_pipeline.scheduler_config(c.schedule),
    )


def _base_weights(config: ConfigDict, base: pipeline.Pipeline, run: Path) -> Params:
    """The base model's weights, from the run's folder; trained where they are not there. The name says what they depend on."""
    key = atomic.json_digest(atomic.plain_json(config.lab.to_dict()))[:12]
    path = run / f"base-{key}.safetensors"
    if not path.is_file():
        trained = _pretrain(config, base)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.drafted(path) as draft:
            weights.save_tensors(draft, weights.to_torch(trained))
    return {
        name: jnp.asarray(x) for name, x in weights.from_torch(weights.Tensors([path]), base.denoiser.shapes, str(path)).items()
    }


def _pretrain(config: ConfigDict, base: pipeline.Pipeline) -> dict[str, np.ndarray]:
    """Noise prediction on fresh examples, by the loss and the update of `pretrain`."""
    c, data = config.lab, the_mixture(config)
    chain = train_step.make_optimizer({**c.optimizer, "steps": c.steps})
    first = pretraining.joined({pretraining.DENOISER: jax.jit(base.denoiser.init)(seed_key(c.seed))})
    now = train_step.init_state(first, chain, True)
    empty = jnp.asarray(base.tokenizer.encode([""])[0])
    schedule = from_config(base.scheduler)
    step = partial(
        train_step.train_step,
        draw=partial(pretraining.draw_noise, schedule=schedule, empty=empty, drop=c.prompt_dropout),
        loss=partial(pretraining.noise_loss, denoiser=base.denoiser, text_encoder=base.networks["text_encoder"]),
        optimizer=chain,
        ema_decay=c.ema,
        accumulation=1,
        unroll=True,
    )
    key = jax.random.fold_in(seed_key(c.seed), 1)

    @partial(jax.jit, donate_argnums=0)
    def chunk(now: train_step.TrainState, batches: Any) -> tuple[train_step.TrainState, jax.Array]:
        return jax.lax.scan(lambda s, b: (lambda r: (r[0], r[1]["loss"]))(step(s, None, b, key)), now, batches)

    log.info("the lab's base model: %d updates of %d examples", c.steps, c.batch)
    for begin in range(0, c.steps, CHUNK):
        rng = np.random.default_rng((c.seed, begin))
        labels = rng.integers(0, c.classes, min(CHUNK, c.steps - begin) * c.batch)
        x = mixture.draw(data, rng, labels).astype(np.float32).reshape(-1, c.batch, 1, 1, c.dimensions)
        ids = labels.astype(np.int32).reshape(-1, c.batch, 1, 1)
        now, losses = chunk(now, {"mean": jnp.asarray(x), "std": jnp.zeros(x.shape), "ids": jnp.asarray(ids)})
    check_finite(c.steps, {"loss": float(losses[-1])})
    return jax.device_get(pretraining.part(train_step.averaged(now), pretraining.DENOISER))


def rows(experiment: Experiment, stage: Stage) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The reader of a stage's examples, fresh ones for every seed and stage."""
    config, data = experiment.config, the_mixture(experiment.config)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((config.seed, stage.windows, int(numbers[0])))
        labels = rng.integers(0, data.classes, len(numbers))
        out = {"index": numbers.astype(np.int32), "ids": labels.astype(np.int32)[:, None]}
        if stage.pairs.start == "noise":
            return out
        x = mixture.draw(data, rng, labels).astype(np.float32).reshape(-1, 1, 1, data.width)
        return out | {"mean": x, "std": np.zeros_like(x)}

    return read


def make_instruments(experiment: Experiment) -> Instruments:
    """The sampler, and the mixture's moments."""
    n = experiment.networks
    draw = partial(sampler.sample_latents, denoiser=n.denoiser, schedule=n.schedule, guidance=1)
    return Instruments(jax.jit(draw, static_argnames=("flow", "steps")), mixture.moments(the_mixture(experiment.config)))


def make_inputs(experiment: Experiment, seed: int, instruments: Instruments) -> Inputs:
    """The noise of a seed, what the teacher draws from it in config.evaluate.teacher_steps[0] steps, and real examples."""
    e, data = experiment.config.evaluate, the_mixture(experiment.config)
    key = fold_seed(run_key(experiment.config, EVALUATION_KEY, 0), seed)
    noise = jax.random.normal(key, (e.examples, *experiment.base.latent_shape))
    labels = np.arange(e.examples) % data.classes
    context = experiment.base.condition(experiment.base.text, jnp.asarray(labels)[:, None])
    base, flow, steps = experiment.denoiser.params(), experiment.flow, e.teacher_steps[0]
    reference = _vectors(instruments.draw(base, noise, context, context, flow=flow, steps=steps))
    real, others = (mixture.draw(data, np.random.default_rng((REAL + seed, i)), labels) for i in (0, 1))
    projected = sliced.project(real)
    floor = {
        "frechet": frechet.frechet_distance(frechet.moments(others), instruments.real),
        "sliced": sliced.sliced_distance(sliced.project(others), projected),
    }
    return Inputs(noise, context, reference, frechet.moments(reference), projected, floor)


def _vectors(latents: jax.Array) -> np.ndarray:
    return np.asarray(latents, np.float64).reshape(len(latents), -1)


def measure_student(
    experiment: Experiment, params: Params, flow: Parameterization, instruments: Instruments, inputs: Inputs
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """(numbers, no images) of a network at each number of steps."""
    scores = {}
    for steps in measured_steps(experiment.config, flow.windows):
        way = read_as(flow, steps)
        x = _vectors(instruments.draw(params, inputs.noise, inputs.context, inputs.context, flow=way, steps=steps))
        its = frechet.moments(x)
        scores[str(steps)] = {
            "distance": float(np.sqrt(np.mean((x - inputs.reference) ** 2))),
            "frechet_teacher": frechet.frechet_distance(its, inputs.teacher),
            "frechet": frechet.frechet_distance(its, instruments.real),
            "sliced": sliced.sliced_distance(sliced.project(x), inputs.real),
        }
    return {"steps": scores} | ({} if flow.windows else {"floor": inputs.floor}), {}


def check_lab(experiment: Experiment) -> None:
    """Raises UserError, one line, for a lab that cannot be measured."""
    examples, width = experiment.config.evaluate.examples, experiment.config.lab.dimensions
    if examples <= width:
        raise UserError(f"--config.evaluate.examples={examples} must be more than --config.lab.dimensions={width}")


def _notes(config: ConfigDict) -> str:
    c, n = config.lab, config.evaluate.examples
    return (
        f"The lab: {c.classes} classes of {c.components} anisotropic Gaussians in {c.dimensions} dimensions. n = {n} samples. "
        f"Distance: RMS difference to the teacher's own {config.evaluate.teacher_steps[0]}-step result from the same noise. "
        f"Frechet distances: to that result's samples, and to the mixture's moments in closed form. Sliced W2: to {n} real "
        "examples. Guidance 1."
    )


LAB = Testbed(
    open=open_lab,
    check=check_lab,
    prepare=lambda experiment: None,
    rows=rows,
    instruments=make_instruments,
    inputs=make_inputs,
    measure=measure_student,
    measures={
        "distance": "Distance to the teacher",
        "frechet_teacher": "Frechet distance to the teacher",
        "frechet": "Frechet distance to the real distribution",
        "sliced": "Sliced W2 to real examples",
    },
    short={"distance": "distance", "frechet_teacher": "Frechet, teacher", "frechet": "Frechet, real", "sliced": "W2, real"},
    real="frechet",
    notes=_notes,
)
