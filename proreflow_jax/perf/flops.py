"""Floating-point operations of a function, counted from its shapes: nothing is compiled and nothing runs.

Matrix products and convolutions count, a multiply-add as 2; the rest of a network is a few per mille. A scan's body counts as
often as it runs, and a `cond` as its most expensive branch. Kernels written by hand have no count and are listed by name.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

CONVOLUTIONS, LINEARS, ATTENTION = "convolutions", "linears", "attention"
UNKNOWN = "unknown"  # begins the keys of operations without a count


def count(function: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """{class: FLOPs} of one call; arguments may be `jax.ShapeDtypeStruct`.

    A product with batch dimensions is attention's; one without is a linear layer's. Keys that begin with "unknown " count
    calls of kernels and loops of unknown length.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def total(counted: Counter[str]) -> float:
    """FLOPs of all classes together."""
    return float(sum(value for name, value in counted.items() if not name.startswith(UNKNOWN)))


def _of(jaxpr: Any) -> Counter[str]:
    sums: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        sums.update(_equation(equation))
    return sums


def _equation(equation: Any) -> Counter[str]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "cond":
        return max((_of(branch.jaxpr) for branch in params["branches"]), key=total)
    if name == "pallas_call":
        return Counter({f"{UNKNOWN} kernel {params.get('name') or name}": 1})
    inner: Counter[str] = Counter()
    for jaxpr in _inner(params):
        inner.update(_of(jaxpr))
    if name == "while" and total(inner):
        return inner + Counter({f"{UNKNOWN} loop": 1})
    times = params["length"] if name == "scan" else 1
    return Counter({key: value * times for key, value in inner.items()})


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls; of a custom derivative only the function itself, whose rules are functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _dot(equation: Any) -> Counter[str]:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    depth = math.prod(left[axis] for axis in contracted)
    return Counter({ATTENTION if batched else LINEARS: 2 * math.prod(out) * depth})


def _convolution(equation: Any) -> Counter[str]:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return Counter({CONVOLUTIONS: 2 * math.prod(out) * math.prod(kernel) // kernel[features]})
