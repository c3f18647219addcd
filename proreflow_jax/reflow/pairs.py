"""A teacher's pairs (state at a window's noisy start, state at its clean end), for stored and online mode.

A diffusion teacher crosses a window by its solver (PeRFlow alg. 1), the student of the stage before by its own windows
(ProReflow sec. 3.2). Example i draws everything from fold_in(key, i), in any process and batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from proreflow_jax import UserError
from proreflow_jax.flow import solvers
from proreflow_jax.flow import windows as windowing
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import GRID, Schedule, per_example
from proreflow_jax.models.network import Conditioner, Network, Params
from proreflow_jax.reflow.predict import make_predict, row_context, text_context

STARTS = ("noise", "data")
RECORD = ("states", "first", "ids")  # what is stored of a pair


class PairRecipe(NamedTuple):
    """How one stage's pairs are made; every field comes from the config."""

    windows: int  # N of the stage that trains on them
    start: str  # "noise": whole trajectories from pure noise; "data": one window, from noised latents
    steps: int  # teacher steps per window
    solver: str  # of a diffusion teacher
    guidance: float  # scale of classifier-free guidance; 1: none
    dropout: float  # probability that a prompt is replaced by the empty one, for teacher and student alike
    latent: tuple[int, int, int]  # (h, w, c)
    dtype: str  # of the teacher's computation


class Networks(NamedTuple):
    """The networks of a model and the numbers around them; functions only, parameters travel as `Frozen`."""

    unet: Network
    condition: Conditioner  # ids -> the UNet's conditioning
    vae: Network
    schedule: Schedule
    scaling: float  # diffusion works on latents times this


class Frozen(NamedTuple):
    """Arrays that a job reads and never changes. They are arguments of its jitted function, no constants of it."""

    text: dict[str, Params]  # of the text encoders, by component
    vae: Params  # {} unless pairs start from data
    teacher: Params  # {} where no pairs are made
    empty: Int[Array, " s"]  # ids of the empty prompt
    key: Key[Array, ""]  # of the pairs
    base: Params = {}  # beside which low-rank factors are trained; {} where all weights are


def cross_windows(
    frozen: Frozen, batch: Mapping[str, Array], *, recipe: PairRecipe, flow: Parameterization, networks: Networks
) -> dict[str, Array]:
    """Pairs of one batch.

    Args:
      frozen: the teacher, the text encoder, the VAE, the empty prompt, the key of the job.
      batch: index (b,) example numbers, ids (b, s) prompts; when recipe.start is "data" image (b, h, w, 3) uint8, or its
        latents' mean and std (b, h, w, c). Cached text states: text (b, s, d) and SDXL's pooled (b, p).
      recipe, flow, networks: bound by `partial` before jit. flow is the teacher's parameterization.

    Returns:
      states (b, m + 1, h, w, c), first (b,), ids (b, s): records as `data.records` keeps them; m = N from noise, 1 from data.
      Also the batch's text states, if any, for online training.
    """
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(frozen.key, i), 4))(batch["index"])
    drop = jax.vmap(lambda k: jax.random.bernoulli(k, recipe.dropout))(keys[:, 0])
    rows = dropped(frozen, batch, drop, networks)
    noise = jax.vmap(lambda k: jax.random.normal(k, recipe.latent))(keys[:, 1])

    predict = make_predict(networks.unet, frozen.teacher, recipe.dtype)
    empty = text_context(networks.condition, frozen.text, frozen.empty[None]) if recipe.guidance != 1 else None
    context = row_context(networks.condition, frozen.text, frozen.empty, rows)
    guided = solvers.guided(predict, context, empty, recipe.guidance)
    step = solvers.make_step(flow, networks.schedule, guided, recipe.solver)

    if recipe.start == "noise":
        return {"states": whole_trajectory(step, noise, recipe), "first": jnp.zeros(len(noise), jnp.int32), **rows}
    if "mean" in batch:
        x0 = draw_latents(networks, batch["mean"], batch["std"], keys[:, 2])
    else:
        x0 = encode(networks, frozen.vae, batch["image"], keys[:, 2])
    k = jax.vmap(lambda w: jax.random.randint(w, (), 0, recipe.windows))(keys[:, 3])
    return {"states": one_window(step, networks.schedule, x0, noise, k, recipe), "first": k, **rows}


def dropped(frozen: Frozen, batch: Mapping[str, Array], drop: Bool[Array, " b"], networks: Networks) -> dict[str, Array]:
    """ids, and text and pooled where the batch has them. Rows that drop their prompt get the empty prompt's."""
    rows = {"ids": jnp.where(drop[:, None], frozen.empty, batch["ids"])}
    if "text" in batch:
        empty = text_context(networks.condition, frozen.text, frozen.empty[None])
        rows["text"] = jnp.where(drop[:, None, None], empty.states, batch["text"].astype(empty.states.dtype))
        if empty.pooled is not None:
            rows["pooled"] = jnp.where(drop[:, None], empty.pooled, batch["pooled"].astype(empty.pooled.dtype))
    return rows


def whole_trajectory(step: solvers.Step, noise: Float[Array, "b h w c"], recipe: PairRecipe) -> Float[Array, "b bounds h w c"]:
    """The states at every window's bound, from pure noise to data: (b, N + 1, h, w, c)."""
    nodes = windowing.sampling_nodes(recipe.windows * recipe.steps, recipe.windows)
    _, states = solvers.solve(step, noise, nodes.astype(np.float32), keep=True)
    return jnp.moveaxis(states[:: recipe.steps], 0, 1)


def one_window(
    step: solvers.Step,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    k: Int[Array, " b"],
    recipe: PairRecipe,
) -> Float[Array, "b 2 h w c"]:
    """Latents noised to the start of window k, and the teacher's state at its end: (b, 2, h, w, c)."""
    w = windowing.at_start(k, recipe.windows)
    z_s = per_example(schedule.alpha(w.t_s), x0) * x0 + per_example(schedule.sigma(w.t_s), x0) * noise
    z_e = solvers.solve(step, z_s, windowing.nodes(w.t_s, w.t_e, recipe.steps))
    return jnp.stack([z_s, z_e], axis=1)


def encode(networks: Networks, vae: Params, images: Array, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """uint8 images -> scaled latents, drawn from the autoencoder's posterior."""
    mean, std = posterior(networks, vae, images)
    return draw_latents(networks, mean, std, keys)


def posterior(networks: Networks, vae: Params, images: Array) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """uint8 images -> mean and standard deviation of their latents, not scaled."""
    pixels = images.astype(jnp.float32) / 127.5 - 1.0
    return networks.vae.apply(vae, pixels, method="encode")


def draw_latents(
    networks: Networks, mean: Float[Array, "b h w c"], std: Float[Array, "b h w c"], keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Scaled latents from their posterior; computed in float32, whatever the dtype of mean and std."""
    mean, std = mean.astype(jnp.float32), std.astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return jax.lax.stop_gradient((mean + std * noise) * networks.scaling)


def check_pair_steps(recipe: PairRecipe, flow: Parameterization) -> None:
    """Raises UserError, one line, if a recipe cannot be carried out."""
    windowing.check_windows(recipe.windows)
    windowing.check_steps(recipe.steps, GRID // recipe.windows)
    if recipe.start not in STARTS:
        raise UserError(f"--config.pairs.start={recipe.start!r} must be one of {', '.join(STARTS)}")
    if flow.windows == 0 and recipe.solver not in solvers.SOLVERS:
        raise UserError(f"--config.pairs.solver={recipe.solver!r} must be one of {', '.join(solvers.SOLVERS)}")
    if flow.windows and flow.windows % recipe.windows:
        raise UserError(
            f"a stage of {recipe.windows} windows cannot learn from {flow.windows}: each of --config.stages must "
            "divide the one before"
        )
