"""What training carries from step to step, its optimizer, and the update that every job of this project shares.

A job brings two pure functions: `draw(frozen, batch, key)` makes whatever is random (noise, times, the teacher's pairs) for the
whole global batch, and `loss(params, examples)` is deterministic. So gradients accumulated over parts of a batch are those
of the whole, and one key per run is enough: it is folded with the step here and nowhere else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from proreflow_jax import UserError
from proreflow_jax.models.network import Params
from proreflow_jax.runtime import mesh as meshes
from proreflow_jax.runtime import stacks
from proreflow_jax.runtime.mesh import first_match
from proreflow_jax.runtime.stacks import Table

Batch = Mapping[str, Array]
Draw = Callable[[PyTree, Batch, Key[Array, ""]], dict[str, PyTree]]
Loss = Callable[[Params, Mapping[str, PyTree]], tuple[Float[Array, ""], PyTree]]
FLAG = "--config.optimizer"
LEAST_NORM = 1e-6  # for clip_norm: Adam's epsilon swallows what is cut shorter
FIELDS = (
    "learning_rate", "schedule", "warmup_steps", "steps", "beta1", "beta2", "epsilon", "weight_decay", "decay_rules",
    "clip_norm",
)  # fmt: skip
DECAY: dict[str, Callable[[Array, Any], Array]] = {  # progress after warm-up in [0, 1] -> factor on the peak
    "constant": lambda p, xp: xp.ones_like(p),
    "cosine": lambda p, xp: 0.5 * (1.0 + xp.cos(xp.pi * p)),
    "linear": lambda p, xp: 1.0 - p,
}


class TrainState(NamedTuple):
    """Master weights and everything that must survive a kill; `ema` is empty when the config turns it off."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: PyTree


def averaged(state: TrainState) -> Params:
    """The weights to hand on: the average where there is one."""
    return state.ema or state.params


def init_state(params: Params, optimizer: optax.GradientTransformation, average: bool) -> TrainState:
    """A fresh state around `params`; their average starts as a copy of them."""
    copy = {name: jnp.array(value) for name, value in params.items()} if average else {}
    return TrainState(jnp.zeros((), jnp.int32), dict(params), copy, optimizer.init(dict(params)))


def train_step(
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    draw: Draw,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int,
    unroll: bool,
    in_order: Mesh | None = None,
    tables: Sequence[Table] = (),
) -> tuple[TrainState, PyTree]:
    """One update on one global batch.

    Args:
      state: donated by the jit that wraps this.
      frozen: whatever `draw` reads beside the batch and never changes: a teacher, encoders.
      batch: {name: (b, ...)}; leading axes split over the mesh.
      key: the run's one key; folded with the step.
      draw, loss, optimizer, ema_decay, accumulation: bound once by `partial`. `loss` returns (mean, metrics), and metrics
        are sums or means that average over parts of a batch.
      unroll: write the accumulation out instead of scanning (XLA's CPU convolution gradients are slow inside a scan).
      in_order: a mesh along whose data axis gradients are summed device by device, see `_in_order`; None: as XLA likes.
      tables: how the state's parameters lie in stacks (`runtime.stacks`); none: each has its name. `loss` knows names alone.

    Returns:
      (state, metrics): metrics plus "loss" and "grad_norm".
    """
    examples = draw(frozen, batch, jax.random.fold_in(key, state.step))

    means = partial(_means, jax.value_and_grad(loss, has_aux=True), count=accumulation, unroll=unroll)
    means = means if in_order is None else _in_order(means, in_order)
    (mean, metrics), gradients = means(stacks.unstack(state.params, *tables), examples)
    gradients = stacks.stack(gradients, *tables)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = ema(state.ema, params, ema_decay, state.step) if state.ema else {}
    numbers = {"loss": mean, "grad_norm": optax.global_norm(gradients), **metrics}
    return TrainState(state.step + 1, params, average, opt_state), numbers


def _means(value_and_grad: Callable, params: Params, examples: Mapping[str, PyTree], *, count: int, unroll: bool) -> PyTree:
    """((loss, metrics), gradients) of a batch, worked out in `count` parts."""
    parts = jax.tree.map(lambda x: _split(x, count), examples)
    one = lambda part: value_and_grad(params, part)
    if count == 1 or unroll:
        results = [one(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(count)]
        return jax.tree.map(lambda *xs: sum(xs) / count, *results)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    add = lambda total, part: (jax.tree.map(lambda a, b: a + b / count, total, one(part)), None)
    return jax.lax.scan(add, zero, parts)[0]


def _in_order(means: Callable[[Params, PyTree], PyTree], mesh: Mesh) -> Callable[[Params, PyTree], PyTree]:
    """The same of a batch whose rows lie along data: what the devices find is summed in their order, and told to all.

    XLA leaves the order of a sum over devices to whoever carries it out: on CPUs its own threads add from the first device on
    where one process holds all, gloo in rings where several do. Their last bits differ, and Adam makes them larger.
    """
    devices, whole = mesh.shape["data"], PartitionSpec()

    def summed(params: Params, examples: PyTree) -> PyTree:
        flat, unflatten = ravel_pytree(means(params, examples))
        pieces = jnp.pad(flat, (0, -flat.size % devices)).reshape(devices, -1)  # device i sums the i-th
        mean = jnp.mean(jax.lax.all_to_all(pieces, "data", 0, 0), axis=0)
        return unflatten(jax.lax.all_gather(mean, "data", tiled=True)[: flat.size])

    return jax.shard_map(summed, mesh=mesh, in_specs=(whole, PartitionSpec("data")), out_specs=whole, check_vma=False)


def _split(x: Array, parts: int) -> Array:
    """(b, ...) -> (parts, b / parts, ...), each part spread over the devices as the whole was."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def state_shardings(mesh: Mesh, rules: list, state: PyTree) -> PyTree:
    """Shardings of a TrainState (or its shapes) by the rules over parameter names; moments follow their parameter."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = {name: value.shape for name, value in state.params.items()}
    by_name = meshes.shardings(mesh, meshes.specs(rules, shapes, mesh))

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        sharding = by_name.get(names[-1]) if names else None
        return sharding if sharding is not None and leaf.shape == shapes[names[-1]] else replicated

    return jax.tree_util.tree_map_with_path(place, state)


def make_optimizer(cfg: Any) -> optax.GradientTransformation:
    """Clip by global norm (clip_norm 0: off), Adam, decoupled weight decay, -learning rate.

    `cfg` is a mapping or ConfigDict with exactly FIELDS; its steps may be traced. Raises ValueError naming the flag
    of a wrong field; a name that no rule of decay_rules matches is refused when the optimiser is initialised. (Loshchilov &
    Hutter 2019, algorithm 2.)
    """
    cfg = _checked(cfg)
    clip = optax.clip_by_global_norm(cfg["clip_norm"]) if cfg["clip_norm"] else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=cfg["beta1"], b2=cfg["beta2"], eps=cfg["epsilon"]),
        optax.add_decayed_weights(cfg["weight_decay"], mask=partial(decays, cfg)),
        optax.scale_by_learning_rate(learning_rate(cfg)),
    )


def learning_rate(cfg: Any, xp: Any = jnp) -> Callable[[Any], Any]:
    """step -> learning rate: (step + 1) / (warmup_steps + 1) of the peak while warming up, then the schedule's decay.

    The decay reaches its end at `steps`: 0 for cosine and linear. The very first step already learns. xp: jax.numpy, or numpy
    on the host while the devices are busy.
    """
    cfg = _checked(cfg)
    peak, warmup, steps = cfg["learning_rate"], cfg["warmup_steps"], cfg["steps"]
    decay = DECAY[cfg["schedule"]]

    def schedule(step: Int[Array, ""] | int) -> Any:
        now = xp.asarray(step, xp.float32)
        warm = xp.minimum(1.0, (now + 1.0) / (warmup + 1.0))
        progress = xp.clip((now - warmup) / xp.maximum(steps - warmup, 1), 0.0, 1.0)
        return peak * warm * decay(progress, xp)

    return schedule


def ema(old: PyTree, new: PyTree, decay: float | Array, step: int | Array) -> PyTree:
    """The average after `step` updates: old + (1 - d)(new - old) in float32, d = min(decay, (1 + step) / (10 + step)).

    The warm-up forgets the random start (as in tf.train.ExponentialMovingAverage).
    """
    step = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(jnp.asarray(decay, jnp.float32), (1.0 + step) / (10.0 + step))

    def average(o: Array, n: Array) -> Array:
        o, n = o.astype(jnp.float32), n.astype(jnp.float32)
        return o + (1.0 - d) * (n - o)

    return jax.tree.map(average, old, new)


def decays(cfg: Any, names: Iterable[str]) -> dict[str, bool]:
    """{name: whether it decays} by decay_rules. Raises ValueError naming every name that no rule matches."""
    return first_match([(pattern, bool(value)) for pattern, value in cfg["decay_rules"]], names, f"{FLAG}.decay_rules")


def _checked(cfg: Any) -> dict[str, Any]:
    """The config as a dict, every field there and in range."""
    cfg = dict(cfg)
    unknown, missing = sorted(set(cfg) - set(FIELDS)), sorted(set(FIELDS) - set(cfg))
    if unknown or missing:
        flags = ", ".join(f"{FLAG}.{name}" for name in [*unknown, *missing])
        raise UserError(f"{flags}: unknown or missing; the fields are {', '.join(FIELDS)}")
    traced = isinstance(cfg["steps"], jax.core.Tracer)  # then its value is the caller's business
    rules = {
        "schedule": (cfg["schedule"] in DECAY, f"one of {', '.join(DECAY)}"),
        "steps": (traced or cfg["steps"] > 0, "positive"),
        "warmup_steps": (
            cfg["warmup_steps"] >= 0 and (traced or cfg["warmup_steps"] <= cfg["steps"]),
            f"from 0 to steps={cfg['steps']}",
        ),
        "learning_rate": (cfg["learning_rate"] >= 0, "not negative"),
        "beta1": (0 <= cfg["beta1"] < 1, "in [0, 1)"),
        "beta2": (0 <= cfg["beta2"] < 1, "in [0, 1)"),
        "epsilon": (cfg["epsilon"] > 0, "positive"),
        "weight_decay": (cfg["weight_decay"] >= 0, "not negative"),
        "clip_norm": (cfg["clip_norm"] == 0 or cfg["clip_norm"] >= LEAST_NORM, f"0 (off) or at least {LEAST_NORM}"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{FLAG}.{name}={cfg[name]!r} must be {rule}")
    return cfg
