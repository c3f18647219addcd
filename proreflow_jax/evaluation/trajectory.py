"""How a flow bends: straightness, velocity error in each window, velocities compared across times, a study of perturbed steps.

Velocity means dz/dt of the state itself, in the time of `flow.schedule` (1 is noise, 0 is data): `Parameterization.velocity`,
of a student the velocity in the window that t lies in; of a diffusion model its probability flow a'/a z + (s' - s a'/a) eps.
The latter grows like t^(-1/2) towards the data, because s does. Of a rectified flow the time of velocities and integrals is
its clock, s.

Functions take `predict(z, t)`, `velocity(z, t)` or a solver's `step`, not networks. They give one number per example,
(b, ...): a caller joins batches and takes mean and spread.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from proreflow_jax import UserError
from proreflow_jax.flow import losses, solvers, windows
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.flow.schedule import GRID, RectifiedFlow, Schedule, per_example, position

_TINY = 1e-24  # a mean square below this counts as zero


class Kind(NamedTuple):
    """A way to perturb a step. The fields are numbers, so that one compiled program serves all ways.

    turned: 1 perturbs the direction, 0 the magnitude.
    repeated: 1 turns every step towards the same noise, 0 draws new noise at each step.
    sign: of the change of magnitude; 0 draws it for each example and step.
    """

    turned: float
    repeated: float
    sign: float


KINDS = {
    "direction": Kind(1.0, 0.0, 0.0),
    "magnitude": Kind(0.0, 0.0, 0.0),
    "direction_held": Kind(1.0, 1.0, 0.0),
    "magnitude_up": Kind(0.0, 0.0, 1.0),
    "magnitude_down": Kind(0.0, 0.0, -1.0),
}


def trajectory(
    flow: Parameterization,
    schedule: Schedule,
    predict: solvers.Predict,
    z: Float[Array, "b *d"],
    nodes: Float[ArrayLike, "steps_plus_1"],
) -> tuple[Float[Array, "steps_plus_1 b *d"], Float[Array, "steps b *d"]]:
    """(every state from z on, the velocity at every node but the last) over falling nodes; one call of `predict` a step.

    A diffusion model moves by DDIM, a student along its own path.
    """

    def step(state: Array, t: Array, u: Array, carry: Any) -> tuple[Array, Any]:
        """A step of z that puts the velocity at t beside z_u: state is (b, 2, ...)."""
        z = state[:, 0]
        out = predict(z, t)
        z_u, carry = solvers.make_step(flow, schedule, lambda *_: out)(z, t, u, carry)
        return jnp.stack([z_u, flow.velocity(schedule, z, out, t)], axis=1), carry

    _, states = solvers.solve(step, jnp.stack([z, jnp.zeros_like(z)], axis=1), nodes, keep=True)
    return states[:, :, 0], states[1:, :, 1]


def straightness(
    schedule: Schedule,
    states: Float[Array, "steps_plus_1 b *d"],
    velocities: Float[Array, "steps b *d"],
    nodes: Float[np.ndarray, "steps_plus_1"],
    n: int,
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """How far a trajectory is from straight in each of n windows: (absolute, relative to the chord); 0 is straight.

    S_k = 1/(t_s - t_e) integral over the window of |c - v(z_t, t)|^2 dt, c = (z_e - z_s) / (t_e - t_s): Liu et al. 2022,
    sec. 2.1, of one window. |.|^2 is the mean over entries; relative is S_k / |c|^2 of the same example. The integral is
    the left sum over the nodes, so for Euler's steps S_k is the variance of the step velocities. It needs many nodes: with one
    step a window it is 0 for any student.

    states, velocities: of `trajectory`. nodes: known numbers that hold every bound, as `windows.sampling_nodes(steps, n)` has.
    Raises UserError if a bound is not among the nodes.
    """
    edges, times = _edges(nodes, n), np.asarray(nodes, np.float64)
    ticks = schedule.clock(times) if isinstance(schedule, RectifiedFlow) else times  # of a table in float64
    absolute, relative = [], []
    for i, j in zip(edges[:-1], edges[1:], strict=True):
        each = lambda t: jnp.full(states.shape[1], t)
        chord = windows.chord(schedule, states[i], states[j], each(times[i]), each(times[j]))
        weights = jnp.asarray((ticks[i:j] - ticks[i + 1 : j + 1]) / (ticks[i] - ticks[j]), chord.dtype)
        apart = jax.vmap(losses.squared_error, (0, None))(velocities[i:j], chord)
        absolute.append(weights @ apart)
        relative.append(absolute[-1] / jnp.maximum(losses.squared_error(chord, jnp.zeros_like(chord)), _TINY))
    return jnp.stack(absolute, axis=1), jnp.stack(relative, axis=1)


def _edges(nodes: Float[np.ndarray, "steps_plus_1"], n: int) -> list[int]:
    """Positions of the n + 1 bounds of n windows among the nodes."""
    positions = {round(GRID * float(t)): i for i, t in enumerate(nodes)}
    bounds = [round(GRID * float(t)) for t in windows.bounds(n)]
    missing = [bound / GRID for bound in bounds if bound not in positions]
    if missing:
        raise UserError(
            f"{len(nodes) - 1} steps do not stop at t = {missing[0]}, a bound of {n} windows; "
            f"change --config.evaluate.teacher_steps to a multiple of {n}"
        )
    return [positions[bound] for bound in bounds]


def window_times(n: int, m: int) -> Float[np.ndarray, "n m"]:
    """m times in each of n windows, in the place of uniform t: the middles of m equal parts, on the 1/1000 grid.

    Raises UserError if n does not divide 1000 or a window has fewer than 2 m grid steps.
    """
    windows.check_windows(n)
    width = GRID // n
    windows.check_steps(m, width // 2)
    return (windows.start_index(np.arange(n)[:, None], n) - (width * (2 * np.arange(m) + 1)) // (2 * m)) / GRID


def velocity_error(
    velocity: solvers.Predict,
    schedule: Schedule,
    path: str,
    states: Float[Array, "n_plus_1 b *d"],
    times: Float[np.ndarray, "n m"],
) -> tuple[Float[Array, "b n m"], Float[Array, "b n m"]]:
    """(relative error, cosine) of a model's velocity against the teacher's chord, at each of m times in each window.

    z_t lies on the model's `path` between the teacher's states at the window's bounds. The target is the velocity from z_t to
    the window's end, (z_e - z_t) / (t_e - t): on the linear path the chord at every t. Relative error is
    |v - target| / |target| (`flow.losses`).

    states: the teacher's, at the n + 1 bounds. times: `window_times(n, m)` for uniform t, `windows.bounds(n)[:-1, None]` for
    exactly the window starts.
    """
    n, m = times.shape
    b, k = states.shape[1], np.repeat(np.arange(n), m)
    places = windows.at_start(k, n, states.dtype)._replace(t=jnp.asarray(times.reshape(-1), states.dtype))

    def one(place: windows.Window) -> tuple[Array, Array]:
        z_s, z_e = states[place.k], states[place.k + 1]
        w = jax.tree.map(lambda x: jnp.broadcast_to(x, (b,)), place)
        z = windows.interpolate(path, schedule, z_s, z_e, w)
        begin, t = (z_s, w.t_s) if path == "linear" else (z, w.t)
        target = windows.chord(schedule, begin, z_e, t, w.t_e)
        v = velocity(z, w.t)
        return losses.relative_error(v, target), losses.cosine(v, target)

    relative, cosine = jax.lax.map(one, places)
    return relative.T.reshape(b, n, m), cosine.T.reshape(b, n, m)


def discrepancy(velocities: Float[Array, "m b *d"]) -> tuple[Float[Array, "b m m"], Float[Array, "b m m"]]:
    """(L2 distance, cosine) of the velocities at every pair of m times on one trajectory (ProReflow, fig. 1a).

    L2 is the root of the mean over entries. The paper does not say how it averages: here each example has its own matrix.
    """
    distance = lambda v, w: jnp.sqrt(losses.squared_error(v, w))
    pairs = lambda f: jax.lax.map(lambda v: jax.vmap(f, (0, None))(velocities, v), velocities)
    return jnp.moveaxis(pairs(distance), 2, 0), jnp.moveaxis(pairs(losses.cosine), 2, 0)


def perturb(
    v: Float[Array, "b *d"], noise: Float[Array, "b *d"], sign: Float[Array, "b"], turned: ArrayLike, size: ArrayLike
) -> Float[Array, "b *d"]:
    """v' with |v' - v| = size |v|, either turned or stretched; shape of v, which must have two entries or more.

    turned: v' = (1 - r^2/2) v + r sqrt(1 - r^2/4) |v| n, r = size, where n is the noise made orthogonal to v and of norm 1:
      a rotation by 2 asin(r/2), which keeps |v|. r is at most 2. Otherwise v' = (1 + sign r) v.
    turned and size are numbers, and may be traced.
    """
    r, flat = jnp.asarray(size, v.dtype), v.reshape(v.shape[0], -1)
    square = jnp.sum(flat * flat, axis=1, keepdims=True)
    n = noise.reshape(flat.shape)
    n = n - flat * jnp.sum(n * flat, axis=1, keepdims=True) / jnp.maximum(square, _TINY)
    n = n * jnp.sqrt(square / jnp.maximum(jnp.sum(n * n, axis=1, keepdims=True), _TINY))
    along = jnp.where(turned, 1 - r**2 / 2, 1 + sign * r)
    across = jnp.where(turned, r * jnp.sqrt(jnp.maximum(1 - r**2 / 4, 0.0)), 0.0)
    return per_example(along, v) * v + across * n.reshape(v.shape)


def perturbed_step(step: solvers.Step, key: Key[Array, ""], kind: Kind, size: ArrayLike) -> solvers.Step:
    """`step` with its velocity (z_u - z) / (u - t) perturbed, whatever solver made it. Times are shared by the batch.

    The noise of a step depends on the key and on t, unless `kind.repeated`. Size 0 is `step` itself.
    """

    def moved(z: Array, t: Array, u: Array, carry: Any) -> tuple[Array, Any]:
        z_u, carry = step(z, t, u, carry)
        at = jnp.round(position(t[0])).astype(jnp.int32)
        noise = jax.random.normal(jax.random.fold_in(key, jnp.where(kind.repeated, 0, at)), z.shape, z.dtype)
        random_sign = jax.random.rademacher(jax.random.fold_in(key, GRID + at), (z.shape[0],), z.dtype)
        sign = jnp.where(kind.sign == 0, random_sign, kind.sign)
        return z_u + (perturb(z_u - z, noise, sign, kind.turned, size) - (z_u - z)), carry

    return moved


def perturbed_samples(
    step: solvers.Step,
    z: Float[Array, "b *d"],
    nodes: Float[ArrayLike, "steps_plus_1"],
    key: Key[Array, ""],
    kind: Kind,
    sizes: Float[ArrayLike, "sizes"] | Sequence[float],
) -> Float[Array, "sizes b *d"]:
    """Latents at nodes[-1] from z, with every step's velocity perturbed by each relative size: direction against magnitude.

    The protocol (ProReflow, fig. 1b, shows such a study and does not state its own). A step z -> z_u has the velocity
    v = (z_u - z) / (u - t). It is replaced by v' with |v' - v| = r |v|, the same r for every kind, example and step:
      direction       turned by 2 asin(r/2) towards white noise orthogonal to v, |v| kept; a new draw at every step
      magnitude       (1 + r) v or (1 - r) v; the sign is drawn for each example and step
      direction_held  as direction, towards one draw of noise an example, the same at all steps
      magnitude_up    (1 + r) v at all steps
      magnitude_down  (1 - r) v at all steps
    The first two have errors that average out over the steps, the last three have errors that add up: compare like with
    like. Equal keys give equal draws for every size. Solvers should be one-step: a multistep one would remember its own x0.

    kind: an entry of KINDS. sizes: r, 0 to 2; r = 0 is the unperturbed sample.
    """
    draw = lambda r: solvers.solve(perturbed_step(step, key, kind, r), z, nodes)
    return jax.lax.map(draw, jnp.asarray(sizes, z.dtype))


def distances(z: Float[Array, "*n b h w c"], reference: Float[Array, "b h w c"]) -> Float[Array, "*n b"]:
    """Root mean square difference of each example's latents to its reference."""
    return jnp.sqrt(jnp.mean(jnp.square(z - reference), axis=(-3, -2, -1)))
