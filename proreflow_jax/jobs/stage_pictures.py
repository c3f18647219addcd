"""What a stage's student draws while it learns: fixed prompts from fixed noise at every checkpoint, beside the base model.

  <run>/samples/samples.json            prompts (rows), count (noises, columns of each half), tile (pixels), gap, and how both
                                        halves were drawn; `teacher` names the base model's own picture
  <run>/samples/teacher-<hash>.png      the base model's half, drawn once a run; the hash is of all that it depends on
  <stage>/samples/step-00000100.png     left the base model, right the student after so many steps; of step 0 the untrained one

A picture depends on config, seed, base model and the weights of its step alone, so a run that goes on from a checkpoint draws
what one that never stopped draws, under the same names. The state is read and never changed. One program a stage draws.
"""

import json
import logging
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.models.network import Context, Params
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import text_context
from proreflow_jax.run import outlook, train_state
from proreflow_jax.run.experiment import Experiment
from proreflow_jax.run.pictures import HALVES
from proreflow_jax.run.stages import PICTURE_KEY, SAMPLES, Stage, run_key
from proreflow_jax.run.text_states import host_context, spares_encoders
from proreflow_jax.runtime import mesh, stacks
from proreflow_jax.runtime.processes import first, first_says, host_arrays, leads
from proreflow_jax.storage import atomic, paths
from proreflow_jax.storage.paths import Location

log = logging.getLogger(__name__)
RECORD = "samples.json"
GAP = 4  # white pixels between base model and student


class StagePictures:
    """Draws one stage's pictures; all processes ask for each. With --config.samples.prompts empty it does nothing.

    Beside a LoRA it holds the base model's weights, else its constants. Make it while the base model is in memory.
    """

    def __init__(self, experiment: Experiment, stage: Stage) -> None:
        self._experiment, self._stage = experiment, stage
        self._config = experiment.config.samples
        self.on = bool(self._config.prompts)
        if not self.on:
            return
        self._base: Params = experiment.denoiser.beside(experiment.layout)
        self._inputs = self._make_inputs()
        steps = max(self._config.steps, stage.student.windows)
        self._draw = self._program(stage.student, steps, self._config.guidance)
        self._compiled = False
        self._teacher = self._teacher_picture()

    def due(self, step: int) -> bool:
        """Whether a step's picture is kept: at the start, at every checkpoint that is due, and at the end."""
        train = self._experiment.config.train.steps
        return self.on and (step in (0, train) or step % self._experiment.config.checkpoint.every == 0)

    def path(self, step: int) -> Location:
        """Where a step's picture lies."""
        return self._stage.picture(step)

    def missing(self, step: int) -> bool:
        """Whether a step should have a picture and has none."""
        return self.due(step) and not first_says(self.path(step).is_file)

    def draw(self, step: int, trained: Params) -> UInt8[np.ndarray, "h w 3"] | None:
        """Draws what is trained, stacked or by names, and keeps the picture if one is due; None on the other processes.

        The first call compiles the program.
        """
        if not self.on:
            return None
        if not self._compiled:
            outlook.compiling("the sampler of pictures", self._experiment.networks.denoiser)
            self._compiled = True
        student = self._grid(self._draw(trained, self._base, *self._inputs, self._vae()))
        if not leads():
            return None
        gap = np.full((len(student), GAP, 3), 255, np.uint8)
        picture = np.concatenate([self._teacher, gap, student], axis=1)
        if self.due(step):
            about = {**self._record, "step": step, "windows": self._stage.windows}
            about["right"] = {**about["right"], "taken": max(self._config.steps, self._stage.student.windows)}
            write_picture(self.path(step), picture, about)
        return picture

    def _make_inputs(self) -> tuple[jax.Array, Any, Any]:
        """Noise, conditioning of every row and of the empty prompt; the batch is filled up to split over the devices."""
        base, machine, c = self._experiment.base, self._experiment.mesh, self._config
        images = len(c.prompts) * c.count
        size = -(-images // mesh.ways(machine)) * mesh.ways(machine)
        ids = np.repeat(base.tokenizer.encode(list(c.prompts)), c.count, axis=0)
        noise = jax.random.normal(run_key(self._experiment.config, PICTURE_KEY, 0), (c.count, *base.latent_shape))
        own = mesh.own_rows(machine, size) % images
        rows = {"noise": np.tile(np.asarray(noise), (len(c.prompts), 1, 1, 1))[own], "ids": ids[own]}
        if spares_encoders(self._experiment.config, base):
            read = host_context(base, [c.prompts[row // c.count] for row in own])
            states = {name: value for name, value in read._asdict().items() if value is not None}
            placed = mesh.put_batch(machine, {"noise": rows["noise"], **states}, size)
            empty = jax.device_put(host_context(base, [""]), mesh.replicated(machine))
            return placed.pop("noise"), Context(**placed), empty
        rows = mesh.put_batch(machine, rows, size)
        text = jax.device_put(base.text, mesh.replicated(machine))
        read = jax.jit(partial(text_context, self._experiment.networks.condition))
        return (
            rows["noise"],
            read(text, rows["ids"]),
            read(text, jax.device_put(base.tokenizer.encode([""]), mesh.replicated(machine))),
        )

    def _program(self, flow: Parameterization, steps: int, guidance: float) -> Any:
        """(trained, base, noise, context, negative, VAE) -> images (b, h, w, 3), whole on every device."""
        experiment, layout, n = self._experiment, self._experiment.layout, self._experiment.networks
        options = dict(
            denoiser=n.denoiser, schedule=n.schedule, flow=flow, steps=steps, guidance=1 if guidance == 1 else guidance
        )
        dtype = experiment.config.model.sampling_dtype

        def images(trained: Params, base: Params, noise: jax.Array, context: Any, negative: Any, vae: Params) -> jax.Array:
            named = stacks.unstack(trained, layout.table)
            params = train_state.whole_weights(layout, named, base) if base else named
            latents = sampler.sample_latents(params, noise, context, negative, dtype=dtype, **options)
            return sampler.decode(n.vae, vae, latents, n.scaling, dtype)

        return jax.jit(images, out_shardings=mesh.replicated(experiment.mesh))

    def _vae(self) -> Params:
        return jax.device_put(self._experiment.base.params["vae"], mesh.replicated(self._experiment.mesh))

    def _grid(self, images: jax.Array) -> UInt8[np.ndarray, "h w 3"]:
        """One row a prompt, one column a noise."""
        rows, count = len(self._config.prompts), self._config.count
        pictures = host_arrays(images)[: rows * count]
        pictures = pictures.reshape(rows, count, *pictures.shape[1:])
        return np.concatenate(np.concatenate(pictures, axis=1), axis=1)

    def _teacher_picture(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The base model's half, as it lies in the run's folder or drawn now; on process 0."""
        experiment, c = self._experiment, self._config
        steps, baked = max(c.teacher_steps, experiment.flow.windows), experiment.config.pairs.guidance
        guidance = baked if baked != 1 else c.guidance  # what is in the student already
        half = {"model": "base model", "steps": steps, "guidance": guidance, "flow": list(experiment.flow)}
        other = {"model": "student", "steps": f"{c.steps}, at least the windows", "guidance": c.guidance}
        record = {"prompts": list(c.prompts), "count": c.count, "tile": experiment.base.resolution, "gap": GAP}
        record |= {
            "left": half,
            "right": other,
            "seed": experiment.config.seed,
            "dtype": experiment.config.model.sampling_dtype,
            **sampler.decoding_facts(experiment.networks.vae, experiment.config.model.sampling_dtype),
        }
        self._record = record
        about = {**record, "right": None, "digest": experiment.denoiser.digest(), **experiment.identity()}
        folder = experiment.run / SAMPLES
        path = folder / f"teacher-{atomic.json_digest(about)[:12]}.png"
        if not first_says(path.is_file):
            outlook.compiling("the base model's sampler", experiment.networks.denoiser)
            draw = self._program(experiment.flow, steps, guidance)
            picture = self._grid(draw(experiment.denoiser.params(), {}, *self._inputs, self._vae()))
            first(lambda: write_picture(path, picture, half))
        first(lambda: atomic.write_json(folder / RECORD, record | {"teacher": path.name}))
        return _read(path) if leads() else None


def write_picture(path: Location, picture: UInt8[np.ndarray, "h w 3"], about: dict[str, Any]) -> None:
    """Writes a PNG; about: how it was drawn, a text in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text(HALVES, json.dumps(about, sort_keys=True))
    with atomic.drafted(path) as draft:
        Image.fromarray(picture).save(draft, "PNG", pnginfo=info)


def _read(path: Location) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(paths.local_copy(path)) as image:
        return np.asarray(image.convert("RGB"))
