"""A diffusers scheduler that walks a windowed flow at any number of steps: `reflow/sampler.py` for a torch pipeline.

A student of N windows is a diffusion model to every stock pipeline but in one respect: at N steps DDIM moves it rightly,
at more steps DDIM does not know that the output speaks of the whole window (rms error .38 at 2N). This file does. It
imports nothing of ours: copied into a pipeline folder as `scheduler/windowed_scheduler.py`, with
`"scheduler": ["windowed_scheduler", "WindowedFlowScheduler"]` in model_index.json, it is loaded by
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. A pipeline that holds it writes such a folder itself
(`save_pretrained`).

Conventions, as in `flow/schedule.py`: t = 1 is noise and t = 0 data on a grid of 1000 steps; entry i of the table of noise
levels a_i^2 = alphas_cumprod[i], s_i^2 = 1 - a_i^2 sits at t = (i + 1) / 1000 and is the network's timestep; t = 0 has no
entry and borrows entry 0. Every node of a walk is a grid point (`walk`), so timesteps are whole numbers, no two of a walk
are equal, and the table is never interpolated.

Each step from t to u is one affine map, z_u = P z_t + Q out, as each prediction type is. Window [t_s, t_e] holds t (a bound
belongs to the window that begins there) and u:

    first_order  a DDIM step (Song et al. 2021, eq. 12):  P = l,  Q = h,  l = a_u / a_t,  h = s_u - l s_t
    linear       z_u = z_t + (u - t) v,  v = A z_t + B out:  P = 1 + (u - t) A,  Q = (u - t) B, where
      velocity   A = 0,  B = 1
      ddim_eps   A = (l - 1) / D,  B = h / D,  D = l (t - t_s) + (t_e - t),  l = a_e / a_s,  h = s_e - l s_s
      diff_eps   the same with h = -sqrt(1 - g^2) / g,  g = a_s / a_e (PeRFlow, Yan et al. 2024)
    ddim_v       the output is v at t, eps = a_t out + s_t z_t, then ddim_eps:  P + Q s_t,  Q a_t

They are computed in float64 once per `set_timesteps` and applied in float32.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

GRID = 1000  # grid steps in [0, 1], and entries of the table
NO_STEP = "no step is left to take: strength x num_inference_steps must be at least 1; raise strength or num_inference_steps"
MODULE = "windowed_scheduler"  # this file's name in a pipeline folder
PREDICTIONS = ("ddim_eps", "diff_eps", "velocity", "ddim_v")
STOCK = {"ddim_eps": "epsilon", "ddim_v": "v_prediction"}  # prediction -> prediction_type of stock DDIM for that student
PATHS = {"linear": PREDICTIONS, "first_order": ("ddim_eps", "ddim_v")}  # path -> prediction types that have a meaning on it


def _prediction(prediction: str | None, prediction_type: str | None) -> str:
    """The prediction type, by its own name or by a stock scheduler's. Raises ValueError if the two contradict each other."""
    if prediction_type not in (None, *STOCK.values()):
        raise ValueError(
            f"prediction_type {prediction_type!r}, must be one of {', '.join(STOCK.values())}; change prediction_type"
        )
    if prediction is None:
        return next(name for name, stock in STOCK.items() if stock == (prediction_type or "epsilon"))
    if prediction_type and STOCK.get(prediction, prediction_type) != prediction_type:
        raise ValueError(
            f"prediction {prediction!r} contradicts prediction_type {prediction_type!r}; leave prediction out, or change one"
        )
    return prediction


def beta_table(beta_schedule: str, beta_start: float, beta_end: float) -> np.ndarray:
    """The 1000 betas of a named schedule, float64, by diffusers' formulas. Raises ValueError for another name."""
    if beta_schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, GRID) ** 2
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, GRID)
    if beta_schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17
        bar = np.cos((np.arange(GRID + 1) / GRID + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    raise ValueError(
        f"beta_schedule={beta_schedule!r}, must be scaled_linear, linear or squaredcos_cap_v2; change beta_schedule"
    )


def walk(steps: int, n: int) -> np.ndarray:
    """The steps + 1 grid points, int64 from 1000 down to 0, that an n-window student visits; every bound is one of them.

    Each window gets steps // n steps, as even as the grid allows; a remainder goes to the noisiest windows, one each.
    Raises ValueError if steps < n or steps > 1000.
    """
    if steps < n:
        raise ValueError(f"{steps} sampling steps, must be at least the number of windows, {n}; change num_inference_steps")
    if steps > GRID:
        raise ValueError(f"{steps} sampling steps, must be at most the {GRID} steps of the grid; change num_inference_steps")
    width, shares = GRID // n, [steps // n + (k < steps % n) for k in range(n)]
    return np.array([GRID - k * width - (j * width + m // 2) // m for k, m in enumerate(shares) for j in range(m)] + [0])


def moves(prediction: str, path: str, alphas_cumprod: np.ndarray, points: np.ndarray, n: int) -> np.ndarray:
    """(steps, 2) float64, the (P, Q) of each step of a walk over grid points, by the derivation on top of this file."""
    entry = lambda x: np.maximum(x - 1, 0)
    a, s = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    x, y = points[:-1], points[1:]
    if path == "first_order":
        P, Q = _ddim(a, s, entry(x), entry(y))
    else:
        width = GRID // n
        x_s = GRID - (GRID - x) // width * width
        x_e = x_s - width
        A, B = _velocity(prediction, a, s, (x - x_s) / GRID, (x_e - x) / GRID, entry(x_s), entry(x_e))
        P, Q = 1 + (y - x) / GRID * A, (y - x) / GRID * B
    if prediction == "ddim_v":
        P, Q = P + Q * s[entry(x)], Q * a[entry(x)]
    return np.stack([P, Q], axis=1)


def _velocity(
    prediction: str, a: np.ndarray, s: np.ndarray, since: np.ndarray, left: np.ndarray, i: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of v = A z + B out; since = t - t_s, left = t_e - t, i and j the entries of the window's two ends."""
    if prediction == "velocity":
        return np.zeros(len(since)), np.ones(len(since))
    ell, h = _ddim(a, s, i, j)
    if prediction == "diff_eps":
        h = -np.sqrt((a[j] - a[i]) * (a[j] + a[i])) / a[i]
    D = ell * since + left
    return (ell - 1) / D, h / D


def _ddim(a: np.ndarray, s: np.ndarray, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(l, h) of the DDIM step z_j = l z_i + h eps between entries of the table."""
    ell = a[j] / a[i]
    return ell, s[j] - ell * s[i]


class WindowedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Deterministic sampling of an N-window student in N or more steps, in any pipeline made for DDIM.

    Args:
      num_train_timesteps: must be 1000, the grid of the windows.
      beta_start, beta_end, beta_schedule: of the base model; "scaled_linear", "linear" or "squaredcos_cap_v2".
      windows: N, which divides 1000.
      prediction: what the network's output means: "ddim_eps", "diff_eps", "velocity", "ddim_v"; None: as prediction_type says.
      path: inside a window, "linear" or (ddim_eps and ddim_v only) "first_order".
      prediction_type: of a stock scheduler's config, "epsilon" or "v_prediction"; so `from_config(pipe.scheduler.config)` reads
        a student as its stock scheduler does.

    Raises:
      ValueError: one of these rules is broken.
    """

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = GRID,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        windows: int = 4,
        prediction: str | None = None,
        path: str = "linear",
        prediction_type: str | None = None,
    ) -> None:
        prediction = _prediction(prediction, prediction_type)
        if num_train_timesteps != GRID:
            raise ValueError(f"num_train_timesteps={num_train_timesteps}, must be {GRID}, the grid; change num_train_timesteps")
        if windows < 1 or GRID % windows:
            raise ValueError(f"{windows} windows, must divide {GRID} (1000 % n == 0); change windows")
        if path not in PATHS:
            raise ValueError(f"path {path!r}, must be one of {', '.join(PATHS)}; change path")
        if prediction not in PATHS[path]:
            raise ValueError(
                f"prediction {prediction!r}, must be one of {', '.join(PATHS[path])} on path {path}; change prediction"
            )
        self._table = np.cumprod(1 - beta_table(beta_schedule, beta_start, beta_end))
        self.alphas_cumprod = torch.from_numpy(self._table).float()
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(GRID - 1, -1, -1)
        self._moves: dict[int, tuple[int, float, float]] = {}  # timestep -> (index, P, Q)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        stock = {"prediction": prediction, "prediction_type": STOCK.get(prediction, "epsilon")}
        self.register_to_config(**stock, _use_default_values=[])  # a stock scheduler made from this config keeps all of it
        self.__module__ = MODULE  # of this object: where a pipeline's model_index.json shall say that the class is found

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep of a walk that does not start at noise, as image-to-image set it."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the timestep that comes next; None before the first step."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Notes where a walk begins. Steps do not need it: no two timesteps of a walk are equal.

        Raises ValueError if the walk is over before it begins, as where image-to-image has a small strength.
        """
        if self.num_inference_steps is not None and begin_index >= self.num_inference_steps:
            raise ValueError(NO_STEP)
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lays the nodes of a walk from noise to data: `timesteps`, int64 (num_inference_steps,), falling from 999.

        Raises ValueError if there are fewer steps than windows, or more than 1000.
        """
        points = walk(num_inference_steps, self.config.windows)
        PQ = moves(self.config.prediction, self.config.path, self._table, points, self.config.windows).tolist()
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(points[:-1] - 1).to(device)
        self._moves = {int(x) - 1: (i, P, Q) for i, (x, (P, Q)) in enumerate(zip(points[:-1], PQ, strict=True))}
        self._begin_index = self._step_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: the network reads z_t itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        **ignored: Any,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state at the node after `timestep`, from the state there; shape and dtype of sample.

        Args:
          model_output: what the network gave at (sample, timestep), after guidance; shape of sample.
          timestep: one of `timesteps`, in any order and as often as wanted: the step depends on nothing before it.
          sample: z_t.
          return_dict: False returns a tuple of one tensor.
          generator, ignored: no noise is drawn here, so eta and its like mean nothing.

        Raises:
          ValueError: timestep is not a node of this walk.
        """
        if int(timestep) not in self._moves:
            raise ValueError(
                f"timestep {int(timestep)}, must be one that set_timesteps laid; call set_timesteps and use timesteps"
            )
        index, P, Q = self._moves[int(timestep)]
        z = P * _wide(sample) + Q * _wide(model_output)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=z.to(sample.dtype)) if return_dict else (z.to(sample.dtype),)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """a x0 + s eps at whole timesteps, (b,) or (1,) or (), each 0 to 999; shape and dtype of original_samples."""
        if not len(torch.as_tensor(timesteps).flatten()):
            raise ValueError(NO_STEP)
        a, s = self._levels(timesteps, original_samples)
        return (a * _wide(original_samples) + s * _wide(noise)).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = a eps - s x0 (Salimans and Ho 2022, app. D) at whole timesteps; shape and dtype of sample, which is x0."""
        a, s = self._levels(timesteps, sample)
        return (a * _wide(noise) - s * _wide(sample)).to(sample.dtype)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes scheduler_config.json, and this file beside it, so that a saved pipeline opens where we are not."""
        target = Path(save_directory) / f"{MODULE}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def __len__(self) -> int:
        return GRID

    def _levels(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s) at timesteps, on the device of `like` and shaped to multiply its examples; at least float32."""
        i = torch.as_tensor(timesteps).flatten().cpu().numpy().astype(np.int64)
        if np.any((i < 0) | (i >= GRID)):
            raise ValueError(f"timesteps {i.min()} to {i.max()}, must lie in 0 to {GRID - 1}; change timesteps")
        levels = (torch.from_numpy(np.sqrt(bar[i])) for bar in (self._table, 1 - self._table))
        a, s = (x.to(_wide(like).dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1)) for x in levels)
        return a, s


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
