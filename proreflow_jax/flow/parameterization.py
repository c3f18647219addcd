"""How a network's output is read: a diffusion model by its prediction type, a student by its windows and path."""

from typing import Any, NamedTuple

from jaxtyping import Array

from proreflow_jax import UserError
from proreflow_jax.flow import prediction, schedule, solvers, windows

DIFFUSION = ("epsilon", "v_prediction", "sample")  # diffusers' prediction_type


class Parameterization(NamedTuple):
    """How a network's output is read.

    prediction: a diffusion model's prediction_type, or a student's reading (velocity, ddim_eps, diff_eps, ddim_v).
    windows: the student's number of windows; 0 for a diffusion model.
    path: the student's path inside a window.
    """

    prediction: str
    windows: int = 0
    path: str = "linear"


def make_step(flow: Parameterization, noise: schedule.Schedule, predict: solvers.Predict, solver: str = "ddim") -> solvers.Step:
    """The step (z, t, u, carry) -> (z_u, carry) of a network behind `predict(z, t)`.

    A diffusion model moves by `solver`; a student moves along its reading's path, in the window t lies in.
    """
    if flow.windows == 0:
        return solvers.make_solver_step(solver, noise, as_epsilon(flow.prediction, noise, predict))

    def step(z: Array, t: Array, u: Array, carry: Any) -> tuple[Array, Any]:
        _, t_s, t_e = windows.locate(t, flow.windows)
        return prediction.advance(flow.prediction, flow.path, noise, z, predict(z, t), t, u, t_s, t_e), carry

    return step


def as_epsilon(kind: str, noise: schedule.Schedule, predict: solvers.Predict) -> solvers.Predict:
    """A diffusion model of any prediction_type as an epsilon model."""
    if kind not in DIFFUSION:
        raise UserError(f"prediction_type {kind!r} in scheduler_config.json must be one of {', '.join(DIFFUSION)}")
    if kind == "epsilon":
        return predict
    return lambda z, t: prediction.convert(kind, "epsilon", noise, z, predict(z, t), t)
