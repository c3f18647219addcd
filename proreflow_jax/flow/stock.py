"""Diffusers' FlowMatchEulerDiscreteScheduler, and how it comes to stop at the bounds of a student's windows.

A velocity student of a rectified flow needs no scheduler of ours: at sigma it moves by z + (sigma' - sigma) v, and so does
the stock scheduler. What differs is where it stops. Windows end at S(1 - k/N), with S(u) = shift u / (1 + (shift - 1) u).

Told `sigmas`, unshifted, the scheduler shifts and visits them: `windows.told_sigmas(steps, n)` are the right ones for any
number of steps, the bounds among them (`StableDiffusion3Pipeline(..., sigmas=[1.0, 0.75, 0.5, 0.25])`).

Untold, its M sigmas are S(u) with u even from 1 to S(1/1000), then 0: the shift comes twice, the last step is spent on the
last 0.9 % (shift 3), and no bound but the first is met. With `shift_terminal` T the curve is stretched until the last of
the M is T. Let S' be the curve of another shift s', d = (1 - S'(1/1000)) / (M - 1) and c the factor of the stretch. Then

    1 - sigma_k = c k d / (s' - (s' - 1) k d),    and of the bounds    1 - S(1 - k/N) = (k/N) / (s - (s - 1) k/N)

are the same function of k if M = N, T = S(1/N) and (s' - 1) / s' d = (s - 1) / (s N): two fields of the config, s' and T,
which `untold_fields` solves for. With them the sigmas are S(1 - (1 - 1/N) k / (M - 1)) for every M, then 0: every bound is
among them for M = N and for each N - 1 more steps (N = 2: any M; N = 4: 7, 10, ...; N = 8: 15, ...), and the last window
always takes one step. No config meets all bounds at both N and 2N steps if N > 2: whatever its fields, the last of M
sigmas does not depend on M. Nor do told sigmas help then, which are stretched too: for other numbers of steps give the
scheduler its model's shift back, without shift_terminal.

ComfyUI's `simple` takes entry 1000 - floor(1000 k / M) of its table S(1/1000), ..., S(1), then 0: S(1 - k/M) where M divides
1000. A model with its own shift so stops at every bound of N windows for N | M | 1000, told nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

from proreflow_jax import UserError

FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"  # diffusers' scheduler of a rectified flow
_LEAST = 1 / 1000  # the last time of its training, 1 / num_train_timesteps
_FLAGS = {  # that change where it stops or how it moves, and why none is read here
    "use_dynamic_shifting": "windows are even in the time of one fixed shift",
    "use_karras_sigmas": "windows are even in the time of one fixed shift",
    "use_exponential_sigmas": "windows are even in the time of one fixed shift",
    "use_beta_sigmas": "windows are even in the time of one fixed shift",
    "invert_sigmas": "sigma falls from noise to data",
    "stochastic_sampling": "a window is crossed along a line",
}


def untold_fields(shift: float, windows: int) -> dict[str, Any]:
    """{"shift", "shift_terminal"} with which the scheduler stops untold at the bounds of N windows in N steps.

    shift: the model's. With one window there is no bound to miss: the model's shift, and no terminal.
    Raises UserError if no shift does it: (1 - 1/shift) (1 - 1/N) above 0.938, far from any model's.
    """
    if windows == 1:
        return {"shift": shift, "shift_terminal": None}
    # x = s' - 1 solves x (1 - e) = q (1 + x) (1 + e x), with e = 1/1000
    q = (1 - 1 / shift) * (1 - 1 / windows)
    linear = 1 - _LEAST - q * (1 + _LEAST)
    inside = linear**2 - 4 * q * q * _LEAST
    if linear <= 0 or inside < 0:
        raise UserError(
            f"no stock scheduler of shift {shift:g} stops at the bounds of {windows} windows untold: tell it `sigmas`, "
            "or choose fewer windows by --config.stages"
        )
    return {"shift": 1 + 2 * q / (linear + inside**0.5), "shift_terminal": shift / (shift + windows - 1)}


def model_shift(scheduler_config: Mapping[str, Any]) -> float:
    """The model's shift in a config of FLOW_MATCH, of `untold_fields` too.

    Raises UserError, one line, for a shift that is no positive number, a flag that is set (dynamic shifting, other sigmas,
    inverted or stochastic ones) and a shift_terminal of another origin than `untold_fields`.
    """
    for name, reason in _FLAGS.items():
        if value := scheduler_config.get(name):
            raise UserError(
                f"{name}={value!r} in scheduler_config.json must be false: {reason}; choose another --config.model.path"
            )
    shift, terminal = scheduler_config.get("shift", 1.0), scheduler_config.get("shift_terminal")
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise UserError(
            f"shift={shift!r} in scheduler_config.json must be a number above 0; choose another --config.model.path"
        )
    return _before_untold(shift, terminal) if terminal else float(shift)


def _before_untold(shift: float, terminal: Any) -> float:
    """The model's shift, from the two fields that `untold_fields` made of it and of a number of windows."""
    if type(terminal) is float and 0 < terminal < 1:
        x = shift - 1
        q = x * (1 - _LEAST) / ((1 + x) * (1 + x * _LEAST))
        windows = 1 / (terminal * (1 - q))
        n = round(windows)
        if n > 1 and 1000 % n == 0 and abs(windows - n) < 1e-9 * n:
            return float(f"{terminal * (n - 1) / (1 - terminal):.12g}")
    raise UserError(
        f"shift_terminal={terminal!r} in scheduler_config.json must be null: windows end at the data, sigma 0; "
        "choose another --config.model.path"
    )
