"""The step-0 identity: an untrained student is its teacher, one DDIM step a window. Checked before money is spent."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from proreflow_jax import UserError
from proreflow_jax.flow import windows
from proreflow_jax.flow.parameterization import JUMPS, Parameterization
from proreflow_jax.flow.schedule import GRID, Schedule, timestep
from proreflow_jax.models.conditioning import Context
from proreflow_jax.models.network import Network, Params
from proreflow_jax.reflow.predict import make_predict

TOLERANCE = 1e-5


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
