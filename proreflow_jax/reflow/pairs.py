"""A teacher's pairs (state at a window's noisy start, state at its clean end), for stored and online mode.

A diffusion teacher crosses a window by its solver (PeRFlow alg. 1), the student of the stage before by its own windows
(ProReflow sec. 3.2). Example i draws everything from fold_in(key, i), in any process and batch. At the end of the file: how any
network is asked for its output (`make_predict`), and the check that an untrained student is its teacher.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from proreflow_jax import UserError
from proreflow_jax.flow import solvers
from proreflow_jax.flow import windows as windowing
from proreflow_jax.flow.parameterization import JUMPS, OF_FLOWS, Parameterization
from proreflow_jax.flow.schedule import GRID, RectifiedFlow, Schedule, per_example
from proreflow_jax.models.network import Conditioner, Context, Network, Params, cast

STARTS = ("noise", "data")
TOLERANCE = 1e-5  # of the step-0 identity
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

    denoiser: Network
    condition: Conditioner  # ids -> the denoiser's conditioning
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
    base: Params = {}  # beside what is trained: all weights beside low-rank factors, else the denoiser's constants
    windows: Int[Array, ""] | None = None  # of the student, where one program trains all stages; else its flow says them
    unprompted: Context | None = None  # the empty prompt's, (1, ...), where batches bring their text states and `text` is {}


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

    predict = make_predict(networks.denoiser, networks.schedule, frozen.teacher, recipe.dtype)
    empty = empty_context(networks.condition, frozen) if recipe.guidance != 1 else None
    context = row_context(networks.condition, frozen, rows)
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
        empty = empty_context(networks.condition, frozen)
        rows["text"] = jnp.where(drop[:, None, None], empty.states, batch["text"].astype(empty.states.dtype))
        if empty.pooled is not None:
            rows["pooled"] = jnp.where(drop[:, None], empty.pooled, batch["pooled"].astype(empty.pooled.dtype))
    return rows


def spoken(frozen: Frozen, batch: Mapping[str, Array], networks: Networks) -> dict[str, Array]:
    """Pair records, with the empty prompt's text states where `ids` say that the prompt was dropped."""
    if "text" not in batch:
        return dict(batch)
    return {**batch, **dropped(frozen, batch, jnp.all(batch["ids"] == frozen.empty, axis=1), networks)}


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


def make_predict(
    denoiser: Network, schedule: Schedule, params: Params, dtype: str = "float32"
) -> Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]:
    """predict(z, t, context) of a denoiser that is fed the schedule's timestep, for `solvers.guided`.

    Computed in `dtype`, returned as float32.
    """
    weights = params if dtype == "float32" else cast(params, jnp.dtype(dtype))

    def predict(z: Array, t: Array, context: Context) -> Array:
        return denoiser.apply(weights, z.astype(dtype), schedule.timestep(t), *context.cast(dtype)).astype(z.dtype)

    return predict


def text_context(condition: Conditioner, params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
    """The denoiser's conditioning by prompts; no gradient flows into it. params: of the text encoders, by component."""
    return jax.lax.stop_gradient(condition(params, ids))


def empty_context(condition: Conditioner, frozen: Frozen) -> Context:
    """The conditioning by the empty prompt, (1, ...)."""
    return text_context(condition, frozen.text, frozen.empty[None]) if frozen.unprompted is None else frozen.unprompted


def row_context(condition: Conditioner, frozen: Frozen, rows: Mapping[str, Array]) -> Context:
    """The denoiser's conditioning by the prompts of a batch: from the rows' text states, or else from their ids.

    rows: ids (b, s), or text (b, s, d) with the pooled (b, p) of SDXL and SD 3.
    """
    if "text" not in rows:
        return text_context(condition, frozen.text, rows["ids"])
    one = empty_context(condition, frozen)  # its sizes are every row's
    context = Context(rows["text"], rows.get("pooled"), None).cast(one.states.dtype)
    sizes = None if one.time_ids is None else jnp.repeat(one.time_ids, len(context.states), axis=0)
    return jax.lax.stop_gradient(context._replace(time_ids=sizes))


def identity_gap(
    params: Params,
    z: Float[Array, "b h w c"],
    context: Context,
    *,
    denoiser: Network,
    schedule: Schedule,
    student: Parameterization,
) -> Float[Array, ""]:
    """Largest difference, over all windows, between the untrained student's step and one stock step of its teacher.

    The stock step is `stock_steps`. Relative to the first term of z_e = l z + h out, since the two may cancel. Both sides
    share one network call a window; a second comparison is that the network's timestep is the stock scheduler's, a rectified
    flow's in units of 1000.
    """
    n = student.windows
    entry, keep, add = stock_steps(schedule, student)
    unit = GRID if isinstance(schedule, RectifiedFlow) else 1

    def gap(row: tuple[Array, ...]) -> Float[Array, ""]:
        k, entry, ell, h = row
        w = windowing.at_start(jnp.broadcast_to(k, z.shape[:1]), n)
        out = make_predict(denoiser, schedule, params)(z, w.t, context)
        theirs = ell * z + h * out
        ours = student.advance(schedule, z, out, w, w.t_e)
        norm = lambda x: jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)
        late = jnp.abs(schedule.timestep(w.t) - entry) / unit
        return jnp.max(jnp.maximum(norm(ours - theirs) / (ell * norm(z)), late))

    steps = (np.arange(n), entry, keep.astype(np.float32), add.astype(np.float32))
    return jnp.max(jax.lax.map(gap, jax.tree.map(jnp.asarray, steps)))


def stock_steps(schedule: Schedule, student: Parameterization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(timestep, l, h), (n,) each, of diffusers' step z_e = l z + h out over each of the student's windows, in float64.

    Of a table DDIM's ("trailing" spacing, set_alpha_to_one=False), with the output read as the type that the student kept; of
    a rectified flow Euler's between the shifted bounds.
    """
    if isinstance(schedule, RectifiedFlow):
        t = windowing.bounds(student.windows)
        s = schedule.shift * t / (1 + (schedule.shift - 1) * t)
        return GRID * s[:-1], np.ones(student.windows), np.diff(s)
    width = GRID // student.windows
    begin = 999 - width * np.arange(student.windows)
    a_s, a_e = schedule.alphas_cumprod[begin], schedule.alphas_cumprod[np.maximum(begin - width, 0)]
    keep = np.sqrt(a_e / a_s)
    add = np.sqrt(1 - a_e) - keep * np.sqrt(1 - a_s)
    if JUMPS.get(student.prediction) == "v_prediction":  # eps = sqrt(a_s) out + sqrt(1 - a_s) z
        keep, add = keep + add * np.sqrt(1 - a_s), add * np.sqrt(a_s)
    return begin, keep, add


def check_identity(
    params: Params,
    context: Context,
    latent: tuple[int, int, int],
    key: Key[Array, ""],
    *,
    denoiser: Network,
    schedule: Schedule,
    base: Parameterization,
    student: Parameterization,
) -> float | None:
    """The step-0 identity: an untrained student with its teacher's prediction type is that teacher, one stock step a window.

    It holds for ddim_eps of an epsilon model and ddim_v of a v_prediction model, with DDIM, and for velocity of a rectified
    flow, with Euler. Returns the gap, or None for other pairs.
    Raises UserError if the gap exceeds 1e-5: schedule, time or prediction type are wrong, and training is money lost.
    """
    flows = base.prediction in OF_FLOWS and student.prediction == "velocity"
    if not flows and JUMPS.get(student.prediction) != base.prediction:
        return None
    z = jax.random.normal(key, (context.states.shape[0], *latent))
    gap = jax.jit(lambda p, x, c: identity_gap(p, x, c, denoiser=denoiser, schedule=schedule, student=student))
    value = float(gap(params, z, context))
    if not value <= TOLERANCE:
        raise UserError(
            f"step-0 identity: the untrained student differs from its teacher's {'Euler' if flows else 'DDIM'} step by "
            f"{value:.1e}, must be at most "
            f"{TOLERANCE:.0e}: look at scheduler/scheduler_config.json and weights of --config.model.path"
        )
    return value
