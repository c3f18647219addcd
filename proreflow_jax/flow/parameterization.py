"""One algebra for everything a network may output.

A diffusion model's output belongs to one time: epsilon, x0 ("sample"), v ("v_prediction") or the flow f, tied by

    z = a x0 + s eps,    v = a eps - s x0,    f = eps - x0.

A student's output belongs to a window [t_s, t_e]: the velocity of the window ("velocity"), the epsilon of one DDIM jump
across it ("ddim_eps"), or PeRFlow's rescaled noise ("diff_eps"). The two jumps are z_e = l z_s + h out with constants l
and h of the window. Let z_t lie on the chord z_t = z_s + v (t - t_s), so that z_e is the chord at t_e; eliminate z_s:

    z_t = z_s + v (t - t_s)   and   v (t_e - t_s) = (l - 1) z_s + h out
    =>  v [(t_e - t_s) + (l - 1) (t - t_s)] = (l - 1) z_t + h out
    =>  v = [(l - 1) z_t + h out] / D,    D = l (t - t_s) + (t_e - t).

A model that was trained as a v_prediction keeps its prediction type as a student: in "ddim_v" the output is the v of the
same jump, eps = a_t out + s_t z_t at the state z_t, put into the line above.

So each prediction type is one affine map v = A(t) z_t + B(t) out. D never vanishes in the window: at t_s it is t_e - t_s,
at t_e it is l (t_e - t_s). The longer way, z_e first and (z_e - z_t) / (t_e - t) after, is 0/0 at t_e. Losses, samplers
and teachers all speak velocity and need nothing else.

Of a rectified flow f is the velocity itself, per unit of the clock s, and the output of model and student alike. Epsilon
says nothing there at t = 1, where z = eps, so no jump in epsilon crosses the first window: the other types are refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from proreflow_jax import UserError
from proreflow_jax.flow.schedule import RectifiedFlow, Schedule, as_time, per_example
from proreflow_jax.flow.stock import FLOW_MATCH
from proreflow_jax.flow.windows import Window, check_path, locate

OF_TABLES = ("epsilon", "v_prediction", "sample")  # diffusers' prediction_type
OF_FLOWS = ("flow",)  # of a model whose schedule is a rectified flow: diffusers has no word for it in a config
DIFFUSION = OF_TABLES + OF_FLOWS
STUDENT = ("velocity", "ddim_eps", "diff_eps", "ddim_v")  # a student's prediction types
JUMPS = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}  # those of stock schedulers' DDIM step -> diffusers' prediction_type


class Parameterization(NamedTuple):
    """What a network's output means. Methods take the schedule and z, out: (b, ...) each.

    prediction: a diffusion model's prediction_type (DIFFUSION), or a student's prediction type (STUDENT).
    windows: the student's number of windows; 0 for a diffusion model.
    path: the student's path inside a window (`windows.PATHS`).
    """

    prediction: str
    windows: int = 0
    path: str = "linear"

    def affine(self, schedule: Schedule, w: Window) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """(A, B), each (b,), of v = A z_t + B out at w.t of a student's window; finite at every t of it, ends included.

        linear: v is the chord's velocity, by the derivation on top of this file (diff_eps: PeRFlow, Yan et al. 2024).
        first_order: v = (z_e - z_t) / (t_e - t), where z_e is the DDIM jump from t to t_e; at t_e its limit,
          `flow_velocity`. In float32 A and B keep a relative error below 1e-4, the worst of it one grid step before t_e.
        Raises UserError as `check_prediction`.
        """
        check_prediction(self.prediction, self.path, schedule)
        t, t_s, t_e = as_time(w.t), as_time(w.t_s), as_time(w.t_e)
        if self.prediction == "velocity":
            return jnp.zeros_like(t), jnp.ones_like(t)
        if self.prediction == "ddim_v":
            A, B = self._replace(prediction="ddim_eps").affine(schedule, w)
            return A + B * schedule.sigma(t), B * schedule.alpha(t)
        if self.path == "first_order":
            return _first_order(schedule, t, t_e)
        jump = _ddim_coefficients if self.prediction == "ddim_eps" else _diff_coefficients
        ell, h = jump(schedule, t_s, t_e)
        D = ell * (t - t_s) + (t_e - t)
        return (ell - 1) / D, h / D

    def to_velocity(
        self, schedule: Schedule, z: Float[Array, "b *d"], out: Float[Array, "b *d"], w: Window
    ) -> Float[Array, "b *d"]:
        """The velocity, per unit of the clock, that a student's output at (z, w.t) means; shape of z. Raises as `affine`."""
        A, B = self.affine(schedule, w)
        return per_example(A, z) * z + per_example(B, z) * out

    def from_velocity(
        self, schedule: Schedule, z: Float[Array, "b *d"], v: Float[Array, "b *d"], w: Window
    ) -> Float[Array, "b *d"]:
        """The student's output that means velocity v at (z, w.t), the target of the raw output; shape of z. Raises as `affine`.

        Between t = 1/1000 and 0 the noise level is constant: where no output moves the state (B = 0: first_order there, or
        the last of 1000 windows) the target is 0.
        """
        A, B = self.affine(schedule, w)
        out = (v - per_example(A, z) * z) / per_example(jnp.where(B == 0, 1.0, B), z)
        return jnp.where(per_example(B, z) == 0, 0.0, out)

    def advance(
        self, schedule: Schedule, z: Float[Array, "b *d"], out: Float[Array, "b *d"], w: Window, u: Float[ArrayLike, "b"]
    ) -> Float[Array, "b *d"]:
        """The state at u of the same window, moved from (z, w.t) along the student's path; shape of z. Raises as `affine`.

        linear: z + (u - t) v, on the clock. first_order: a DDIM step, which stays on that path.
        """
        check_prediction(self.prediction, self.path, schedule)
        if self.path == "first_order":
            return ddim_jump(schedule, z, convert(JUMPS[self.prediction], "epsilon", schedule, z, out, w.t), w.t, u)
        v = self.to_velocity(schedule, z, out, w)
        return z + per_example(schedule.clock(u) - schedule.clock(w.t), z) * v

    def velocity(
        self, schedule: Schedule, z: Float[Array, "b *d"], out: Float[Array, "b *d"], t: Float[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """dz/dt, on the clock, that any network's output at (z, t) means; shape of z.

        Of a diffusion model `flow_velocity`, or its output as a flow; of a student `to_velocity` in the window that t lies in.
        """
        if self.windows == 0:
            if isinstance(schedule, RectifiedFlow):
                return convert(self.prediction, "flow", schedule, z, out, t)
            return flow_velocity(schedule, z, convert(self.prediction, "epsilon", schedule, z, out, t), t)
        return self.to_velocity(schedule, z, out, locate(t, self.windows))


def prediction_types(scheduler_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The prediction types that a model with this `scheduler_config.json` may have; the first is that of one that says none."""
    return OF_FLOWS if scheduler_config.get("_class_name") == FLOW_MATCH else OF_TABLES


def check_model(prediction: str, schedule: Schedule) -> None:
    """Raises UserError unless a diffusion model on this schedule may have this prediction type: of a rectified flow "flow"."""
    if isinstance(schedule, RectifiedFlow):
        if prediction not in OF_FLOWS:
            raise UserError(
                f"prediction_type {prediction!r} of a rectified flow, must be {OF_FLOWS[0]}: at t = 1 its alpha is 0; "
                "choose another --config.model"
            )
    elif prediction not in OF_TABLES:
        raise UserError(f"prediction_type {prediction!r} in scheduler_config.json must be one of {', '.join(OF_TABLES)}")


def check_prediction(prediction: str, path: str, schedule: Schedule | None = None) -> None:
    """Raises UserError unless `prediction` is a student's prediction type that has a meaning on `path`.

    schedule: of a rectified flow, the prediction must be velocity and the path linear.
    """
    if prediction not in STUDENT:
        raise UserError(f"prediction {prediction!r}, must be one of {', '.join(STUDENT)}; change --config.student.prediction")
    check_path(path, schedule)
    if isinstance(schedule, RectifiedFlow) and prediction != "velocity":
        raise UserError(
            f"prediction {prediction!r} of a rectified flow, must be velocity: at t = 1 its alpha is 0; "
            "change --config.student.prediction"
        )
    if path == "first_order" and prediction not in JUMPS:
        known = " or ".join(JUMPS)
        raise UserError(f"path first_order with {prediction}, must be used with {known}; change --config.student.path")


def convert(
    source: str,
    target: str,
    schedule: Schedule,
    z: Float[Array, "b *d"],
    out: Float[Array, "b *d"],
    t: Float[ArrayLike, "b"],
) -> Float[Array, "b *d"]:
    """A diffusion model's output at (z, t), of type `source`, as type `target`; shape of z.

    source, target: "epsilon", "sample" (x0), "v_prediction" (Salimans and Ho 2022, app. D) or "flow" (eps - x0).
    Of a rectified flow epsilon at t = 1 leaves x0 open, and x0 at t = 0 leaves epsilon open: what is open is 0 there.
    Raises UserError for another name.
    """
    for name in (source, target):
        if name not in DIFFUSION:
            raise UserError(f"prediction_type {name!r}, must be one of {', '.join(DIFFUSION)}; choose another --config.model")
    if source == target:
        return out
    a, s = per_example(schedule.alpha(t), z), per_example(schedule.sigma(t), z)
    if source == "epsilon":
        x0, eps = _over(schedule, z - s * out, a), out
    elif source == "sample":
        x0, eps = out, _over(schedule, z - a * out, s)
    elif source == "flow":
        x0, eps = z - s * out, z + a * out
        if not isinstance(schedule, RectifiedFlow):  # where a + s = 1
            x0, eps = x0 / (a + s), eps / (a + s)
    else:
        x0, eps = a * z - s * out, s * z + a * out
        if isinstance(schedule, RectifiedFlow):
            x0, eps = x0 / (a * a + s * s), eps / (a * a + s * s)
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[target]


def _over(schedule: Schedule, x: Float[Array, "b *d"], level: Float[Array, "b *ones"]) -> Float[Array, "b *d"]:
    """x / level; of a rectified flow, where the level vanishes, 0."""
    if not isinstance(schedule, RectifiedFlow):
        return x / level
    return jnp.where(level == 0, 0.0, x / jnp.where(level == 0, 1.0, level))


def ddim_jump(
    schedule: Schedule,
    z: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Float[ArrayLike, "b"],
    u: Float[ArrayLike, "b"],
) -> Float[Array, "b *d"]:
    """One deterministic DDIM step from t to u, z_u = a_u x0 + s_u eps (Song et al. 2021, eq. 12, eta 0); shape of z.

    Of a rectified flow the step from t = 1 is that of x0 = 0, as `convert` has it.
    """
    if isinstance(schedule, RectifiedFlow):
        x0 = convert("epsilon", "sample", schedule, z, eps, t)
        return per_example(schedule.alpha(u), z) * x0 + per_example(schedule.sigma(u), z) * eps
    ell, h = _ddim_coefficients(schedule, t, u)
    return per_example(ell, z) * z + per_example(h, z) * eps


def flow_velocity(
    schedule: Schedule, z: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Float[ArrayLike, "b"]
) -> Float[Array, "b *d"]:
    """dz/dt of an epsilon model's probability flow, a'/a z + (s' - s a'/a) eps, per unit of the clock; shape of z.

    It is the derivative of `ddim_jump` in u at u = t (Song et al. 2021, eq. 13-14).
    """
    if isinstance(schedule, RectifiedFlow):
        return convert("epsilon", "flow", schedule, z, eps, t)
    A, B = _flow_coefficients(schedule, t)
    return per_example(A, z) * z + per_example(B, z) * eps


def _ddim_coefficients(
    schedule: Schedule, t: Float[ArrayLike, "b"], u: Float[ArrayLike, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(l, h) of the DDIM step z_u = l z_t + h eps."""
    ell = schedule.alpha(u) / schedule.alpha(t)
    return ell, schedule.sigma(u) - ell * schedule.sigma(t)


def _diff_coefficients(
    schedule: Schedule, t_s: Float[ArrayLike, "b"], t_e: Float[ArrayLike, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(l, h) of PeRFlow's jump: undo z_s = g z_e + sqrt(1 - g^2) out with g = a_s / a_e."""
    a_s, a_e = schedule.alpha(t_s), schedule.alpha(t_e)
    return a_e / a_s, -jnp.sqrt((a_e - a_s) * (a_e + a_s)) / a_s


def _flow_coefficients(schedule: Schedule, t: Float[ArrayLike, "b"]) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(A, B) of the probability flow dz/dt = A z + B eps."""
    da, ds = schedule.rates(t)
    A = da / schedule.alpha(t)
    return A, ds - A * schedule.sigma(t)


def _first_order(
    schedule: Schedule, t: Float[Array, "b"], t_e: Float[Array, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(A, B) of the mean velocity of a DDIM step from t to t_e, and of its limit where t = t_e."""
    ell, h = _ddim_coefficients(schedule, t, t_e)
    at_end = t == t_e
    left = jnp.where(at_end, 1.0, t_e - t)
    A, B = _flow_coefficients(schedule, t_e)
    return jnp.where(at_end, A, (ell - 1) / left), jnp.where(at_end, B, h / left)
