"""AdamW with a schedule, every number from the config; and the average of parameters (EMA).

Parameters are flat dicts {torch name: array}, so weight decay is an ordered (regex, bool) table over names.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from proreflow_jax import UserError
from proreflow_jax.runtime.mesh import first_match

FLAG = "--config.optimizer"
FIELDS = (
    "learning_rate", "schedule", "warmup_steps", "steps", "beta1", "beta2", "epsilon", "weight_decay", "decay_rules",
    "clip_norm",
)  # fmt: skip
DECAY: dict[str, Callable[[Array], Array]] = {  # progress after warm-up in [0, 1] -> factor on the peak
    "constant": lambda p: jnp.ones_like(p),
    "cosine": lambda p: 0.5 * (1.0 + jnp.cos(jnp.pi * p)),
    "linear": lambda p: 1.0 - p,
}


def make(cfg: Any) -> optax.GradientTransformation:
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


def learning_rate(cfg: Any) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """step -> learning rate: (step + 1) / (warmup_steps + 1) of the peak while warming up, then the schedule's decay.

    The decay reaches its end at `steps`: 0 for cosine and linear. The very first step already learns.
    """
    cfg = _checked(cfg)
    peak, warmup, steps = cfg["learning_rate"], cfg["warmup_steps"], cfg["steps"]
    decay = DECAY[cfg["schedule"]]

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        now = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (now + 1.0) / (warmup + 1.0))
        progress = jnp.clip((now - warmup) / jnp.maximum(steps - warmup, 1), 0.0, 1.0)
        return peak * warm * decay(progress)

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
        "clip_norm": (cfg["clip_norm"] >= 0, "not negative (0: off)"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{FLAG}.{name}={cfg[name]!r} must be {rule}")
    return cfg
