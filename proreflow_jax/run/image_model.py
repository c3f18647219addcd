"""A model that draws: prompts -> pictures, of a student or a diffusion model. The one way of drawing."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8
from PIL import Image

from proreflow_jax import UserError
from proreflow_jax.data.images import LINE_LIMIT, square
from proreflow_jax.flow.parameterization import JUMPS, Parameterization
from proreflow_jax.flow.schedule import GRID, RectifiedFlow
from proreflow_jax.flow.solvers import SOLVERS
from proreflow_jax.models.network import Context, Params, cpu_options
from proreflow_jax.pretrained.pipeline import Pipeline
from proreflow_jax.reflow import sampler
from proreflow_jax.reflow.pairs import Networks, posterior, text_context
from proreflow_jax.run import pictures
from proreflow_jax.run.check_config import DTYPES, check_choice
from proreflow_jax.run.experiment import Experiment, Weights
from proreflow_jax.run.ranges import LARGEST, check_range
from proreflow_jax.run.stages import seed_key
from proreflow_jax.runtime.digest import digest, fold
from proreflow_jax.runtime.metrics import check_finite_rows

BASE_STEPS = 50
OUTPUTS = ("pil", "array", "latent")
RANGES = {"steps": (0, 1000), "guidance": (-1000, 1000), "count": (1, 4096), "seed": (0, LARGEST), "strength": (0, 1)}
TOOL = (
    "Euler",
    "Simple",
)  # A1111's sampler and schedule type that make DDIM's steps, or Euler's of a flow (docs/take-it-to-your-tool.md)
Latents = Float[Array, "b h w c"]
Texts = str | Sequence[str]


class Step(NamedTuple):
    """What a callback is given after every step."""

    number: int  # of the steps that are taken, from 1
    count: int  # of the steps that are taken
    t: float  # the time of the latents: 1 is noise, 0 is data
    latents: Latents  # scaled


class Request(NamedTuple):
    """What is to be drawn; checked by `ImageModel`."""

    texts: list[str]
    negatives: list[str]  # one, or one of each text
    steps: int
    guidance: float
    count: int  # pictures of each text
    seed: int
    image: Any  # to start from; None: noise
    strength: float
    solver: str


class ImageModel:
    """A student or a diffusion model, on its devices. Programs are compiled once for each shape, and kept with the object.

    Attributes:
      name: how the model is called in the pictures' records.
      digest: of its weights.
      flow: how its output is read; `flow.windows` is 0 for a diffusion model.
      base: the pipeline around the denoiser: tokenizer, text encoders, VAE.
      networks: denoiser, conditioning, VAE and schedule as functions.
      params: the denoiser's weights by torch names.
    """

    def __init__(self, base: Pipeline, networks: Networks, weights: Weights, name: str, dtype: str = "float32") -> None:
        """dtype: of the denoiser's computation, "float32" or "bfloat16"."""
        check_choice(dtype, DTYPES, "dtype")
        self.base, self.networks, self.name, self.dtype = base, networks, name, dtype
        self.params, self.flow, self.digest = weights.params, weights.flow, weights.digest
        self._text, self._vae = jax.device_put((base.text, base.params["vae"]))
        bound = {"denoiser": networks.denoiser, "schedule": networks.schedule, "flow": weights.flow, "dtype": dtype}
        options = {"compiler_options": cpu_options(networks.denoiser, jax.default_backend())}
        of_vae = {"compiler_options": cpu_options(networks.vae, jax.default_backend())}
        draw, step = (partial(_guided, work, bound) for work in (sampler.sample_latents, sampler.sample_step))
        self._read = jax.jit(partial(text_context, networks.condition))
        self._draw = jax.jit(draw, static_argnames=("on", "solver", "steps", "skip"), **options)
        self._step = jax.jit(step, static_argnames=("on", "solver"), **options)
        self._encode = jax.jit(lambda vae, images: posterior(networks, vae, images)[0] * networks.scaling, **of_vae)
        self._decode = jax.jit(lambda vae, z: sampler.decode(networks.vae, vae, z, networks.scaling, dtype), **of_vae)

    @classmethod
    def of(cls, experiment: Experiment, weights: Weights, name: str) -> "ImageModel":
        """The model of an opened run."""
        return cls(experiment.base, experiment.networks, weights, name, experiment.config.model.sampling_dtype)

    def with_weights(self, params: Params, flow: Parameterization | None = None, name: str = "own weights") -> "ImageModel":
        """The same with other weights of the denoiser, by the same names; flow: how its output is read, None: as this one's."""
        weights = Weights(params, self.flow if flow is None else flow, fold(digest(params)))
        return ImageModel(self.base, self.networks, weights, name, self.dtype)

    def context(self, texts: Texts) -> Context:
        """The denoiser's conditioning by prompts, one row a text."""
        return self._read(self._text, self.base.tokenizer.encode(check_texts(texts, "texts")))

    def decode(self, latents: Latents) -> UInt8[np.ndarray, "b height width 3"]:
        """Scaled latents -> images."""
        return np.asarray(self._decode(self._vae, latents))

    def __repr__(self) -> str:
        kind = f"student of {self.flow.windows} windows" if self.flow.windows else "diffusion model"
        return f"<{kind} {self.name}, {self.base.resolution} x {self.base.resolution} pixels>"

    def __call__(
        self,
        prompt: Texts,
        *,
        negative: Texts = "",
        steps: int = 0,
        guidance: float = 1.0,
        count: int = 1,
        seed: int = 0,
        image: Any = None,
        strength: float = 0.5,
        solver: str = "ddim",
        output: str = "pil",
        callback: Callable[[Step], Any] | None = None,
    ) -> Any:
        """Draws `count` pictures of every prompt; picture j of every prompt starts from the same noise.

        Args:
          prompt: what to draw, or a list.
          negative: negative prompt, one for all or a list with one of each prompt; has an effect when guidance is not 1.
          steps: network evaluations a picture, at least the student's windows; 0: as many as windows, or 50.
          guidance: classifier-free guidance scale; 1: none.
          count: pictures of each prompt.
          seed: of the noise, 0 to 2**64 - 1.
          image: a PIL image (its centre square), or a list with one of each prompt, to start from in the place of noise.
          strength: of image-to-image: the share of the steps that is taken; 1 forgets the image.
          solver: of a diffusion model; a student moves along its own path.
          output: "pil", "array" for uint8 (b, h, w, 3), or "latent" for scaled latents (b, h, w, c).
          callback: called with a `Step` after every step; an exception from it ends the drawing.

        Returns:
          The pictures, prompt by prompt, in a list or array. An image's `info` has its record, which `save_pictures` keeps.

        Raises UserError, one line, for an argument that cannot be; FloatingPointError if latents are not finite.
        """
        numbers = {"steps": steps, "guidance": guidance, "count": count, "seed": seed, "strength": strength}
        for name, value in numbers.items():
            check_range(value, RANGES[name], name)
        check_choice(output, OUTPUTS, "output")
        check_choice(solver, SOLVERS, "solver")
        texts, negatives = check_texts(prompt, "prompt"), check_texts(negative, "negative")
        request = Request(texts, negatives, count_steps(steps, self.flow), guidance, count, seed, image, strength, solver)
        latents = self._latents(request, callback)
        if output == "latent":
            return latents
        arrays = self.decode(latents)
        return arrays if output == "array" else self._pictures(request, arrays)

    def _latents(self, request: Request, callback: Callable[[Step], Any] | None) -> Latents:
        """Scaled latents at t = 0, checked to be finite."""
        texts, count, encode = request.texts, request.count, self.base.tokenizer.encode
        each = _repeats(request.negatives, texts, count, "negative")
        context = self._read(self._text, np.repeat(encode(texts), count, axis=0))
        unwanted = self._read(self._text, np.repeat(encode(request.negatives), each, axis=0))
        noise = jax.random.normal(seed_key(request.seed), (count, *self.base.latent_shape))
        z, skip, times = jnp.tile(noise, (len(texts), 1, 1, 1)), 0, sampler.sampling_times(request.steps, self.flow)
        if request.image is not None:
            skip = skipped(request.steps, request.strength)
            z = sampler.noised(self.networks.schedule, self._encoded(request), z, times[skip])
        guidance = {"scale": float(request.guidance), "on": request.guidance != 1, "solver": request.solver}
        if callback is None:
            latents = self._draw(self.params, z, context, unwanted, steps=request.steps, skip=skip, **guidance)
        else:
            step = partial(self._step, self.params, context=context, negative=unwanted, **guidance)
            latents = _walk(step, self._beside_params(z), times[skip:], callback)
        check_finite_rows(np.isfinite(np.asarray(latents)).all(axis=(1, 2, 3)), np.repeat(texts, count).tolist())
        return latents

    def _encoded(self, request: Request) -> Latents:
        """Scaled latents of the images to start from, the mean of the autoencoder's posterior; one row a picture."""
        several = isinstance(request.image, list | tuple)
        images = list(request.image) if several else [request.image]
        each = _repeats(images, request.texts, request.count, "image")
        pixels = jnp.stack([square(_as_image(image), self.base.resolution) for image in images])
        latents = jnp.repeat(self._encode(self._vae, pixels), each, axis=0)
        return jnp.broadcast_to(latents, (len(request.texts) * request.count, *latents.shape[1:]))

    def _beside_params(self, z: Latents) -> Latents:
        """Whole on each of the weights' devices, where every step leaves it: one program does for all steps."""
        place = next(iter(self.params.values())).sharding
        return jax.device_put(z, NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place)

    def _pictures(self, request: Request, arrays: np.ndarray) -> list[Image.Image]:
        """The pictures with their records."""
        story = pictures.Story(
            steps=request.steps,
            guidance=float(request.guidance),
            seed=request.seed,
            sampler=self._sampler(request),
            model=self.name,
            digest=self.digest,
            strength=None if request.image is None else float(request.strength),
        )
        negatives = request.negatives * (len(request.texts) if len(request.negatives) == 1 else 1)
        pairs = [pair for pair in zip(request.texts, negatives, strict=True) for _ in range(request.count)]
        return [
            pictures.with_story(Image.fromarray(array), story._replace(prompt=text, negative=other, picture=i % request.count))
            for i, (array, (text, other)) in enumerate(zip(arrays, pairs, strict=True))
        ]

    def _sampler(self, request: Request) -> dict[str, Any]:
        """How the steps were made; "tool": sampler and schedule type of A1111 that make the same steps, if there are any."""
        flow = self.flow
        how = flow._asdict() if flow.windows else {"prediction": flow.prediction, "solver": request.solver}
        if isinstance(self.networks.schedule, RectifiedFlow):  # Simple takes every (1000 / steps)-th of 1000 shifted sigmas
            jumps = GRID % request.steps == 0 and (request.solver in ("ddim", "euler") or bool(flow.windows))
        else:
            jumps = flow.prediction in JUMPS and request.steps == flow.windows if flow.windows else request.solver == "ddim"
        return {**how, "dtype": self.dtype} | ({"tool": TOOL} if jumps else {})


def count_steps(steps: int, flow: Parameterization) -> int:
    """The steps themselves; in the place of 0 a student's windows, or 50.

    Raises UserError, one line, if such a network cannot be sampled in so many.
    """
    steps = steps or flow.windows or BASE_STEPS
    sampler.check_sampling(steps, flow)
    return steps


def skipped(steps: int, strength: float) -> int:
    """How many of the steps image-to-image leaves out. Raises UserError, one line, if none is left to take."""
    taken = int(steps * strength + 1e-9)  # 100 * 0.29 is 28.999999999999996
    if taken < 1:
        raise UserError(f"strength={strength:g} of {steps} steps leaves no step: strength times steps must be at least 1")
    return steps - taken


def check_texts(texts: Texts, name: str) -> list[str]:
    """The texts as a list. Raises UserError, one line, for what is no text, or too long to be one."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UserError(f"{name} is empty: name at least one")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name} holds {text!r}, which is no text")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise UserError(f"{name}={text!a} holds bytes that are no UTF-8 text") from None
        if size > LINE_LIMIT:
            raise UserError(f"{name} is longer than {LINE_LIMIT} bytes: shorten it")
    return texts


def _repeats(values: Sequence[Any], texts: Sequence[str], count: int, name: str) -> int:
    """How often each value stands in a batch of `count` rows a text; 1 for one value, which is for all rows."""
    if len(values) not in (1, len(texts)):
        raise UserError(f"{name}: {len(values)} for {len(texts)} prompts: name one, or one of each prompt")
    return 1 if len(values) == 1 else count


def _as_image(image: Any) -> Image.Image:
    try:
        return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"image={image!r:.80} is no PIL image, nor an array of uint8 (h, w, 3)") from None


def _guided(function: Callable[..., Any], bound: Mapping[str, Any], *arrays: Any, scale: Any, on: bool, **words: Any) -> Any:
    """A function of the sampler, its guidance traced where it is on: another scale compiles nothing."""
    return function(*arrays, guidance=scale if on else 1, **bound, **words)


def _walk(step: Callable[..., Any], z: Latents, times: Float[np.ndarray, " n"], callback: Callable[[Step], Any]) -> Latents:
    """All steps, one call each, with the callback after each."""
    carry = (jnp.zeros_like(z), jnp.full_like(z[:, 0, 0, 0], times[0]))
    for number, (t, u) in enumerate(pairwise(times), 1):
        z, carry = step(z, (t, u), carry)
        callback(Step(number, len(times) - 1, float(u), z))
    return z
