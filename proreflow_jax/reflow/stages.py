"""8 -> 4 -> 2: which stage starts from whom, who makes its pairs, and the check that the first one starts where it should."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from proreflow_jax.flow import losses, prediction, windows
from proreflow_jax.flow.schedule import Schedule, grid_time
from proreflow_jax.models.network import Network, Params
from proreflow_jax.reflow.teacher import Flow, as_epsilon, make_predict

DONE = "DONE.json"
TOLERANCE = 1e-5


class Stage(NamedTuple):
    """One stage of a run: N windows, its folder, and the folder of the stage it starts from (None: the base model)."""

    windows: int
    folder: Path
    parent: Path | None


def plan_stages(windows_of_stages: Sequence[int], run: Path) -> list[Stage]:
    """The stages in order. Raises ValueError unless every count divides 1000 and the count before it."""
    counts = list(windows_of_stages)
    if not counts:
        raise ValueError("--config.stages is empty: name at least one window count, as in --config.stages='(8, 4, 2)'")
    for count in counts:
        windows.check_windows(count)
    for before, after in zip(counts, counts[1:], strict=False):
        if before <= after or before % after:
            raise ValueError(f"--config.stages={tuple(counts)}: {after} must be a smaller divisor of {before}: windows are merged")
    folders = [run / f"stage-{count}" for count in counts]
    return [Stage(*row) for row in zip(counts, folders, [None, *folders[:-1]], strict=True)]


def find_stage(stages: Sequence[Stage], count: int) -> Stage:
    """The stage of so many windows. Raises ValueError naming those there are."""
    for stage in stages:
        if stage.windows == count:
            return stage
    raise ValueError(f"--stage={count} is not a stage of this config: --config.stages has {[s.windows for s in stages]}")


def identity_gap(
    params: Params, z: Float[Array, "b h w c"], context: Float[Array, "b s d"], *, unet: Network, schedule: Schedule,
    base: Flow, student: Flow
) -> Float[Array, ""]:
    """Largest relative difference, over all windows, between the untrained student's step and one DDIM step of its teacher."""
    predict = lambda x, t: make_predict(unet, params)(x, t, context)
    gaps = []
    for k in range(student.windows):
        width = 1000 // student.windows
        t_s, t_e = (jnp.full(z.shape[0], grid_time(1000 - i * width)) for i in (k, k + 1))
        theirs = prediction.ddim_jump(schedule, z, as_epsilon(base.prediction, schedule, predict)(z, t_s), t_s, t_e)
        ours = prediction.advance(student.prediction, student.path, schedule, z, predict(z, t_s), t_s, t_e, t_s, t_e)
        gaps.append(jnp.max(losses.relative_error(ours, theirs)))
    return jnp.max(jnp.stack(gaps))


def check_identity(
    params: Params, context: Float[Array, "b s d"], latent: tuple[int, int, int], key: Key[Array, ""], *, unet: Network,
    schedule: Schedule, base: Flow, student: Flow
) -> float | None:
    """The step-0 identity: an untrained ddim_eps student of an epsilon model is that model, one DDIM step a window.

    Returns the gap, or None where the identity does not hold by design (another reading or another kind of teacher).
    Raises ValueError if the gap exceeds 1e-5: then the schedule, the time or the reading is wrong, and training is money lost.
    """
    if student.prediction != "ddim_eps" or base.prediction != "epsilon":
        return None
    z = jax.random.normal(key, (context.shape[0], *latent))
    gap = jax.jit(lambda p, x, c: identity_gap(p, x, c, unet=unet, schedule=schedule, base=base, student=student))
    value = float(gap(params, z, context))
    if not value <= TOLERANCE:
        raise ValueError(
            f"step-0 identity: the untrained student differs from its teacher's DDIM step by {value:.1e}, must be at most "
            f"{TOLERANCE:.0e}: is scheduler/scheduler_config.json of --config.model.path the one it was trained with?"
        )
    return value
