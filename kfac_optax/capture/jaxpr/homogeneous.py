"""How operations treat factors of their operands: degrees of homogeneity of their results."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from kfac_optax.capture.jaxpr.shared_leaves import SharedLeaf
from kfac_optax.capture.tap import tap_p

# What a norm adds to a variance, or a variance is at least: as good as nothing.
_EPSILON = 1e-2
# One number after another, or some of them: what is a constant stays that constant.
_AXES = ("broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose")
_CUT = ("dynamic_slice", "slice", "split")
_SAME = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "stop_gradient")
_PLACED = ("layout_constraint", "mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint")
MOVED = frozenset(_AXES + _CUT + _SAME + _PLACED)
# Functions `f(c x) = c f(x)` of one operand.
_ENTRIES = ("abs", "imag", "neg", "real")
_REDUCED = ("reduce_max", "reduce_min", "reduce_sum")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_RUNNING = ("cummax", "cummin", "cumsum")
_LINEAR = frozenset(_ENTRIES + _REDUCED + _WINDOWS + _RUNNING)
# Functions `f(c x, c y, ...) = c f(x, y, ...)`, indices and flags among the operands apart.
_BY_ENTRY = ("add", "add_any", "clamp", "max", "min", "select_n", "sub")
_IN_PLACE = ("concatenate", "dynamic_update_slice", "pad", "scatter", "scatter-add")
_JOINT = frozenset(_BY_ENTRY + _IN_PLACE)
# Of these an epsilon may be an operand.
_WITH_EPSILON = ("add", "max")
_COMPARED = ("eq", "ge", "gt", "le", "lt", "ne")
_PRODUCTS = ("conv_general_dilated", "dot_general", "mul")
_POWERS = {
    "argmax": 0.0,
    "argmin": 0.0,
    "is_finite": 0.0,
    "sign": 0.0,
    "cbrt": 1 / 3,
    "rsqrt": -0.5,
    "sqrt": 0.5,
    "square": 2.0,
}

Degrees = dict[int, float]


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      degrees: in every set of parameters, zeros left out.
      constant: the number that all of its entries are, if it is one.
      leaf: the parameter that it is, where several sets have a part of that.
    """

    degrees: Degrees
    constant: float | None = None
    leaf: SharedLeaf | None = None

    @property
    def of_any_degree(self) -> bool:
        """Whether a factor would change nothing."""
        return self.constant is not None and _absorbs(self.constant)

    @property
    def is_epsilon(self) -> bool:
        """Whether it is what keeps norms away from zero."""
        return self.constant is not None and 0 < self.constant <= _EPSILON


DATA = Value({})


def _absorbs(number: float) -> bool:
    """Whether a positive factor leaves a number as it is."""
    return number == 0 or not math.isfinite(number)


def without(degrees: Degrees, unknown: set[int]) -> Degrees:
    """Degrees in all other sets."""
    return {i: degree for i, degree in degrees.items() if i not in unknown}


def literal(v: Any) -> Value:
    """A number in the program."""
    # zeros are often whole numbers, cast where they are used
    kinds = (jnp.floating, jnp.integer)
    real = any(jnp.issubdtype(v.aval.dtype, kind) for kind in kinds)
    return Value({}, float(v.val)) if real and v.aval.ndim == 0 else DATA


def degrees_behind(eqn: Any, values: Sequence[Value], unknown: set[int]) -> Degrees | None:
    """Degrees of an operation's result; `None` where it has none."""
    name, first = eqn.primitive.name, values[0].degrees
    if eqn.primitive is tap_p or name in _LINEAR:
        return first
    if name in MOVED:
        # rounded to whole numbers they have none
        return first if _inexact(eqn.outvars[0]) else None
    if name == "gather":
        return first if _fills_with_nothing(eqn.params["fill_value"]) else None
    if name in _PRODUCTS:
        return _sum(first, values[1].degrees, 1)
    if name == "div":
        return _sum(first, values[1].degrees, -1)
    if name in _POWERS:
        return _times(first, _POWERS[name])
    if name == "integer_pow":
        return _times(first, eqn.params["y"])
    if name == "pow" and (power := values[1].constant) is not None:
        return _times(first, power)
    if name in _COMPARED:
        return _times(_common(values, unknown), 0.0)
    if name in _JOINT:
        # indices and flags have no degree
        pairs = zip(eqn.invars, values, strict=True)
        joint = [value for v, value in pairs if _inexact(v)]
        if name in _WITH_EPSILON:
            joint = [value for value in joint if not value.is_epsilon]
        return _common(joint, unknown)
    return None


def constant_behind(eqn: Any, values: Sequence[Value]) -> float | None:
    """The number that all entries of an operation's result are, where that is worth knowing: zeros
    and epsilons.
    """
    name = eqn.primitive.name
    if name in MOVED:
        return values[0].constant
    zeros = name in _PRODUCTS and any(value.constant == 0 for value in values)
    return 0.0 if zeros else None


def _inexact(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _fills_with_nothing(fill: Any) -> bool:
    """Whether what a look-up gives outside of its table is zero or not finite, as by default."""
    return fill is None or (isinstance(fill, numbers.Real) and _absorbs(float(fill)))


def _sum(left: Degrees, right: Degrees, sign: int) -> Degrees:
    return {i: left.get(i, 0.0) + sign * right.get(i, 0.0) for i in {**left, **right}}


def _times(degrees: Degrees, factor: float) -> Degrees:
    return {i: factor * degree for i, degree in degrees.items()}


def _common(values: Iterable[Value], unknown: set[int]) -> Degrees:
    """Degrees that all values have; where they differ there is none."""
    mine = [value.degrees for value in values if not value.of_any_degree]
    if not mine:
        return {}
    for other in mine[1:]:
        unknown.update(i for i, _ in mine[0].items() ^ other.items())
    return without(mine[0], unknown)


def joined(values: Sequence[Value], unknown: set[int]) -> Value:
    """What is one of these values."""
    if all(value == values[0] for value in values):
        return values[0]
    return Value(_common(values, unknown))
