"""How a flow bends: straightness, velocity error in each window, velocities compared across times, a study of perturbed steps.

Velocity means dz/dt of the state itself, in the time of `flow.schedule` (1 is noise, 0 is data): of a student its reading's
velocity in the window that t lies in; of a diffusion model its probability flow a'/a z + (s' - s a'/a) eps. The latter grows
like t^(-1/2) towards the data, because s does.

Functions take `predict(z, t)`, `velocity(z, t)` or a solver's `step`, not networks. They give one number per example,
(b, ...): a caller joins batches and takes mean and spread.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from proreflow_jax import UserError
from proreflow_jax.flow import losses, prediction, solvers, windows
from proreflow_jax.flow.schedule import GRID, Schedule, as_time, per_example, position

_TINY = 1e-24  # a mean square below this counts as zero


class Kind(NamedTuple):
    """A way to perturb a step; the fields are numbers, so that one compiled program serves all ways.

    turned: 1 perturbs the direction, 0 the magnitude.
    held: 1 turns every step towards the same draw of noise, 0 draws anew at each step.
    sign: of the change of magnitude; 0 draws it for each example and step.
    """

    turned: float
    held: float
    sign: float


KINDS = {
    "direction": Kind(1.0, 0.0, 0.0),
    "magnitude": Kind(0.0, 0.0, 0.0),
    "direction_held": Kind(1.0, 1.0, 0.0),
    "magnitude_up": Kind(0.0, 0.0, 1.0),
    "magnitude_down": Kind(0.0, 0.0, -1.0),
}


def as_velocity(
    schedule: Schedule,
    z: Float[Array, "b *d"],
    out: Float[Array, "b *d"],
    t: Float[Array, "b"],
    reading: str,
    n: int,
    path: str,
) -> Float[Array, "b *d"]:
    """The velocity that a network's output at (z, t) means; shape of z. The last three are as in `make_velocity`."""
    if n == 0:
        return prediction.flow_velocity(schedule, z, prediction.convert(reading, "epsilon", schedule, z, out, t), t)
    _, t_s, t_e = windows.locate(t, n)
    return prediction.to_velocity(reading, path, schedule, z, out, t, t_s, t_e)


def make_velocity(
    schedule: Schedule, predict: solvers.Predict, reading: str, n: int = 0, path: str = "linear"
) -> solvers.Predict:
    """velocity(z, t) of a network behind `predict(z, t)`; the last three arguments are the fields of a `reflow.predict.Flow`.

    reading: a diffusion model's prediction_type where n is 0, else a student's reading.
    n: the student's number of windows; 0 for a diffusion model.
    Raises ValueError, when called, for an unknown reading or path.
    """
    return lambda z, t: as_velocity(schedule, z, predict(z, t), t, reading, n, path)


def trajectory(
    schedule: Schedule,
    predict: solvers.Predict,
    z: Float[Array, "b *d"],
    nodes: Float[ArrayLike, "steps_plus_1"],
    reading: str,
    n: int = 0,
    path: str = "linear",
) -> tuple[Float[Array, "steps_plus_1 b *d"], Float[Array, "steps b *d"]]:
    """(every state from z on, the velocity at every node but the last), by one scan over falling nodes, one call a step.

    A diffusion model moves by DDIM, a student along its reading's path. The last three are as in `make_velocity`.
    """
    times = jnp.broadcast_to(as_time(nodes)[:, None], (len(nodes), z.shape[0]))

    def body(z: Array, ends: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        t, u = ends
        out = predict(z, t)
        if n == 0:
            moved = prediction.ddim_jump(schedule, z, prediction.convert(reading, "epsilon", schedule, z, out, t), t, u)
        else:
            moved = prediction.advance(reading, path, schedule, z, out, t, u, *windows.locate(t, n)[1:])
        return moved.astype(z.dtype), (z, as_velocity(schedule, z, out, t, reading, n, path))

    last, (states, velocities) = jax.lax.scan(body, z, (times[:-1], times[1:]))
    return jnp.concatenate([states, last[None]]), velocities


def straightness(
    states: Float[Array, "steps_plus_1 b *d"],
    velocities: Float[Array, "steps b *d"],
    nodes: Float[np.ndarray, "steps_plus_1"],
    n: int,
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """How far a trajectory is from straight in each of n windows: (absolute, relative to the chord); 0 is straight.

    S_k = 1/(t_s - t_e) integral over the window of |c - v(z_t, t)|^2 dt, c = (z_e - z_s) / (t_e - t_s): Liu et al. 2022,
    sec. 2.1, of one window. |.|^2 is the mean over entries; relative is S_k / |c|^2 of the same example. The integral is
    the left sum over the nodes, so for Euler's steps S_k is the variance of the step velocities. It needs many nodes: with one
    a window it is 0 for any student.

    states, velocities: of `trajectory`. nodes: known numbers that hold every bound, as `windows.sampling_nodes(steps, n)` has.
    Raises ValueError if a bound is not among the nodes.
    """
    edges, times = _edges(nodes, n), np.asarray(nodes, np.float64)
    absolute, relative = [], []
    for i, j in zip(edges[:-1], edges[1:], strict=True):
        each = lambda t: jnp.full(states.shape[1], t)
        chord = windows.chord(states[i], states[j], each(times[i]), each(times[j]))
        weights = jnp.asarray((times[i:j] - times[i + 1 : j + 1]) / (times[i] - times[j]), chord.dtype)
        apart = jax.vmap(losses.squared_error, (0, None))(velocities[i:j], chord)
        absolute.append(weights @ apart)
        relative.append(absolute[-1] / jnp.maximum(losses.squared_error(chord, jnp.zeros_like(chord)), _TINY))
    return jnp.stack(absolute, axis=1), jnp.stack(relative, axis=1)


def _edges(nodes: Float[np.ndarray, "steps_plus_1"], n: int) -> list[int]:
    """Where the n + 1 bounds of n windows stand among the nodes."""
    found = {round(GRID * float(t)): i for i, t in enumerate(nodes)}
    wanted = [round(GRID * float(t)) for t in windows.bounds(n)]
    missing = [i / GRID for i in wanted if i not in found]
    if missing:
        raise UserError(
            f"{len(nodes) - 1} steps do not stop at t = {missing[0]}, a bound of {n} windows; "
            f"change --config.evaluate.teacher_steps to a multiple of {n}"
        )
    return [found[i] for i in wanted]


def window_times(n: int, m: int) -> Float[np.ndarray, "n m"]:
    """m times in each of n windows that stand for uniform t: the middles of m equal parts, on the 1/1000 grid.

    Raises ValueError if n does not divide 1000 or a window has fewer than 2 m grid steps.
    """
    width = GRID // n
    starts = np.round(windows.bounds(n)[:-1] * GRID).astype(int)
    windows.check_steps(m, width // 2)
    return (starts[:, None] - (width * (2 * np.arange(m) + 1)) // (2 * m)) / GRID


def velocity_error(
    velocity: solvers.Predict,
    schedule: Schedule,
    path: str,
    states: Float[Array, "n_plus_1 b *d"],
    times: Float[np.ndarray, "n m"],
) -> tuple[Float[Array, "b n m"], Float[Array, "b n m"]]:
    """(relative error, cosine) of a model's velocity against the teacher's chord, at each of m times in each window.

    The model is asked at z_t on its own `path` between the teacher's states at the window's bounds. Its target is the
    velocity from there to the window's end, (z_e - z_t) / (t_e - t): on the linear path the chord at every t.
    Relative error is |v - target| / |target| (`flow.losses`).

    states: the teacher's, at the n + 1 bounds. times: `window_times(n, m)` for uniform t, `windows.bounds(n)[:-1, None]` for
    exactly the window starts.
    """
    n, m = times.shape
    b, bounds = states.shape[1], windows.bounds(n)
    k = np.repeat(np.arange(n), m)
    ends = jnp.asarray(np.stack([times.reshape(-1), bounds[k], bounds[k + 1]]).T, states.dtype)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        i, (t, t_s, t_e) = inputs[0], (jnp.full(b, w) for w in inputs[1])
        z_s, z_e = states[i], states[i + 1]
        z = windows.interpolate(path, schedule, z_s, z_e, t_s, t_e, t)
        target = windows.chord(z_s, z_e, t_s, t_e) if path == "linear" else windows.chord(z, z_e, t, t_e)
        v = velocity(z, t)
        return losses.relative_error(v, target), losses.cosine(v, target)

    relative, cosine = jax.lax.map(one, (jnp.asarray(k), ends))
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
    keep = jnp.where(turned, 1 - r**2 / 2, 1 + sign * r)
    across = jnp.where(turned, r * jnp.sqrt(jnp.maximum(1 - r**2 / 4, 0.0)), 0.0)
    return per_example(keep, v) * v + across * n.reshape(v.shape)


def perturbed_step(step: solvers.Step, key: Key[Array, ""], kind: Kind, size: ArrayLike) -> solvers.Step:
    """`step` with its velocity (z_u - z) / (u - t) perturbed, whatever solver made it. Times are shared by the batch.

    The noise of a step depends on the key and on t; `held` draws it once for all steps. Size 0 is `step` itself.
    """

    def moved(z: Array, t: Array, u: Array, carry: solvers.History) -> tuple[Array, solvers.History]:
        there, carry = step(z, t, u, carry)
        at = jnp.round(position(t[0])).astype(jnp.int32)
        noise = jax.random.normal(jax.random.fold_in(key, jnp.where(kind.held, 0, at)), z.shape, z.dtype)
        drawn = jax.random.rademacher(jax.random.fold_in(key, GRID + at), (z.shape[0],), z.dtype)
        sign = jnp.where(kind.sign == 0, drawn, kind.sign)
        return there + (perturb(there - z, noise, sign, kind.turned, size) - (there - z)), carry

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


def distance(z: Float[Array, "*n b h w c"], reference: Float[Array, "b h w c"]) -> Float[Array, "*n"]:
    """Root mean square difference over all entries of all examples: the table's distance to the teacher."""
    return jnp.sqrt(jnp.mean(jnp.square(z - reference), axis=(-4, -3, -2, -1)))
