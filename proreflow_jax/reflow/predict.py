"""The forward pass of a UNet, teacher or student, its conditioning by prompts, and the step-0 identity of the two."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from proreflow_jax import UserError
from proreflow_jax.flow import schedule, windows
from proreflow_jax.flow.parameterization import JUMPS, Parameterization
from proreflow_jax.flow.schedule import GRID, Schedule, timestep
from proreflow_jax.models.network import Conditioner, Context, Network, Params, cast

TOLERANCE = 1e-5


def make_predict(
    unet: Network, params: Params, dtype: str = "float32"
) -> Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]:
    """predict(z, t, context) of a UNet, for `solvers.guided`; computed in `dtype`, returned as float32."""
    weights = params if dtype == "float32" else cast(params, jnp.dtype(dtype))

    def predict(z: Array, t: Array, context: Context) -> Array:
        return unet.apply(weights, z.astype(dtype), schedule.timestep(t), *context.cast(dtype)).astype(z.dtype)

    return predict


def text_context(condition: Conditioner, params: Mapping[str, Params], ids: Int[Array, "b s"]) -> Context:
    """The UNet's conditioning by prompts; no gradient flows into it. params: of the text encoders, by component."""
    return jax.lax.stop_gradient(condition(params, ids))


def row_context(
    condition: Conditioner, params: Mapping[str, Params], empty: Int[Array, " s"], rows: Mapping[str, Array]
) -> Context:
    """The UNet's conditioning by the prompts of a batch: from the rows' text states, or else from their ids.

    rows: ids (b, s), or text (b, s, d) with SDXL's pooled (b, p). empty: ids of the empty prompt.
    """
    if "text" not in rows:
        return text_context(condition, params, rows["ids"])
    one = text_context(condition, params, empty[None])  # its sizes are every row's
    context = Context(rows["text"], rows.get("pooled"), None).cast(one.states.dtype)
    sizes = None if one.time_ids is None else jnp.repeat(one.time_ids, len(context.states), axis=0)
    return jax.lax.stop_gradient(context._replace(time_ids=sizes))


def identity_gap(
    params: Params,
    z: Float[Array, "b h w c"],
    context: Context,
    *,
    unet: Network,
    schedule: Schedule,
    student: Parameterization,
) -> Float[Array, ""]:
    """Largest difference, over all windows, between the untrained student's step and one DDIM step of its teacher.

    Relative to the first term of z_e = l z + h out, since the two may cancel. The teacher's coefficients are diffusers'
    ("trailing" spacing, set_alpha_to_one=False), from the table in float64. Both sides share one network call a window; a
    second comparison is that the network's timestep is the table's entry.
    """
    n, width = student.windows, GRID // student.windows
    begin = 999 - width * np.arange(n)
    a_s, a_e = schedule.alphas_cumprod[begin], schedule.alphas_cumprod[np.maximum(begin - width, 0)]
    keep = np.sqrt(a_e / a_s)
    add = np.sqrt(1 - a_e) - keep * np.sqrt(1 - a_s)
    if JUMPS.get(student.prediction) == "v_prediction":  # eps = sqrt(a_s) out + sqrt(1 - a_s) z
        keep, add = keep + add * np.sqrt(1 - a_s), add * np.sqrt(a_s)

    def gap(row: tuple[Array, ...]) -> Float[Array, ""]:
        k, entry, ell, h = row
        w = windows.at_start(jnp.broadcast_to(k, z.shape[:1]), n)
        out = make_predict(unet, params)(z, w.t, context)
        theirs = ell * z + h * out
        ours = student.advance(schedule, z, out, w, w.t_e)
        norm = lambda x: jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)
        return jnp.max(jnp.maximum(norm(ours - theirs) / (ell * norm(z)), jnp.abs(timestep(w.t) - entry)))

    steps = (np.arange(n), begin, keep.astype(np.float32), add.astype(np.float32))
    return jnp.max(jax.lax.map(gap, jax.tree.map(jnp.asarray, steps)))


def check_identity(
    params: Params,
    context: Context,
    latent: tuple[int, int, int],
    key: Key[Array, ""],
    *,
    unet: Network,
    schedule: Schedule,
    base: Parameterization,
    student: Parameterization,
) -> float | None:
    """The step-0 identity: an untrained student with its teacher's prediction type is that teacher, one DDIM step a window.

    It holds for ddim_eps of an epsilon model and ddim_v of a v_prediction model. Returns the gap, or None for other pairs.
    Raises UserError if the gap exceeds 1e-5: schedule, time or prediction type are wrong, and training is money lost.
    """
    if JUMPS.get(student.prediction) != base.prediction:
        return None
    z = jax.random.normal(key, (context.states.shape[0], *latent))
    gap = jax.jit(lambda p, x, c: identity_gap(p, x, c, unet=unet, schedule=schedule, student=student))
    value = float(gap(params, z, context))
    if not value <= TOLERANCE:
        raise UserError(
            f"step-0 identity: the untrained student differs from its teacher's DDIM step by {value:.1e}, must be at most "
            f"{TOLERANCE:.0e}: look at scheduler/scheduler_config.json and weights of --config.model.path"
        )
    return value
