"""Parameters without a scale: what a program computes stays the same when they are multiplied.

Every value of the program has a degree of homogeneity in each set of parameters: multiplied by
`c > 0` they multiply it by `c^degree`. Behind a normalisation the degree is zero again.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import bodies, call_body, scan_body
from kfac_optax.capture.tap import tap_p

# What a norm adds to a variance, or a variance is at least: as good as nothing.
_EPSILON = 1e-2
# A function with a derivative of its own is what its body computes.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")

# One number after another, or some of them: what is a constant stays that constant.
_MOVED = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p dynamic_slice expand_dims layout_constraint "
    "mesh_cast name pcast pvary reduce_precision reshape reshard rev sharding_constraint slice "
    "split squeeze stop_gradient transpose".split()
)
# Functions `f(c x) = c f(x)` of one operand.
_LINEAR = frozenset(
    "abs cummax cummin cumsum imag neg real reduce_max reduce_min reduce_sum reduce_window_max "
    "reduce_window_min reduce_window_sum".split()
)
# Functions `f(c x, c y, ...) = c f(x, y, ...)`, numbers and flags among the operands apart.
_JOINT = frozenset(
    "add add_any clamp concatenate dynamic_update_slice max min pad scatter scatter-add select_n "
    "sub".split()
)
# Of these an epsilon may be an operand.
_WITH_EPSILON = ("add", "max")
_COMPARED = frozenset("eq ge gt le lt ne".split())
_PRODUCTS = frozenset("conv_general_dilated dot_general mul".split())
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


class _Value(NamedTuple):
    """Degree in every set of parameters, zeros left out; the number that all entries are, if it is
    known.
    """

    degrees: Degrees
    constant: float | None = None

    @property
    def of_any_degree(self) -> bool:
        """Whether a factor would change nothing."""
        return self.constant is not None and (self.constant == 0 or math.isinf(self.constant))

    @property
    def is_epsilon(self) -> bool:
        """Whether it is what keeps norms away from zero."""
        return self.constant is not None and 0 < self.constant <= _EPSILON


_DATA = _Value({})


def without_scale(jaxpr: Any, owners: Sequence[int | None]) -> set[int]:
    """Sets of parameters that may be multiplied by any `c > 0` without a change of the outputs.

    Proven but for the epsilons of norms; what is not returned may have a scale or not.

    Args:
      jaxpr: of which every equation has a part in the outputs.
      owners: for each input the set that it belongs to, `None` for data.
    """
    # sets with a value of no degree: all that reads it has none either
    unknown: set[int] = set()
    inputs = [_DATA if owner is None else _Value({owner: 1.0}) for owner in owners]
    outputs = _walk(jaxpr, inputs, unknown)
    scaled = unknown.union(*(value.degrees for value in outputs))
    return {owner for owner in owners if owner is not None} - scaled


def _walk(jaxpr: Any, inputs: Sequence[_Value], unknown: set[int]) -> list[_Value]:
    """Values of the outputs; adds to `unknown`."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> _Value:
        if isinstance(v, jex.Literal):
            return _literal(v)
        value = known.get(v, _DATA)
        if unknown.isdisjoint(value.degrees):
            return value
        return value._replace(degrees=_without(value.degrees, unknown))

    for eqn in jaxpr.eqns:
        values = list(map(read, eqn.invars))
        if any(value.degrees for value in values):
            outputs = _behind(eqn, values, unknown)
            known.update(zip(eqn.outvars, outputs, strict=True))
        elif eqn.primitive.name in _MOVED:
            # a function of data is data, but zeros and epsilons are worth knowing
            known.update(dict.fromkeys(eqn.outvars, values[0]))
    return list(map(read, jaxpr.outvars))


def _without(degrees: Degrees, unknown: set[int]) -> Degrees:
    return {i: degree for i, degree in degrees.items() if i not in unknown}


def _literal(v: Any) -> _Value:
    real = jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.ndim == 0
    return _Value({}, float(v.val)) if real else _DATA


def _behind(eqn: Any, values: Sequence[_Value], unknown: set[int]) -> Sequence[_Value]:
    """Values of an equation's outputs."""
    name = eqn.primitive.name
    if (body := call_body(eqn)) is not None:
        return _walk(body.jaxpr, values, unknown)
    if name in _WITH_RULES:
        body = bodies(eqn)[0]
        return _walk(getattr(body, "jaxpr", body), values, unknown)
    if name == "scan":
        return _behind_scan(eqn, values, unknown)
    if name == "cond":
        # which branch is a number without a degree
        return _behind_cond(eqn, values[1:], unknown)
    # as many outputs as operands; a factor leaves the order of numbers as it is
    if name in ("optimization_barrier", "sort"):
        return values
    degrees = _degrees(eqn, values, unknown)
    if degrees is None:
        unknown.update(*(value.degrees for value in values))
        return [_DATA] * len(eqn.outvars)
    degrees = {i: degree for i, degree in degrees.items() if degree}
    return [_Value(degrees)] * len(eqn.outvars)


def _degrees(eqn: Any, values: Sequence[_Value], unknown: set[int]) -> Degrees | None:
    """Degrees of an operation's result; `None` where it has none."""
    name, first = eqn.primitive.name, values[0].degrees
    if eqn.primitive is tap_p or name in _LINEAR:
        return first
    if name in _MOVED:
        # rounded to whole numbers they have none
        return first if _inexact(eqn.outvars[0]) else None
    if name == "gather":
        return first if _fills_with_nothing(eqn) else None
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


def _inexact(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _fills_with_nothing(eqn: Any) -> bool:
    """Whether what a look-up gives outside of its table is NaN or zero."""
    return eqn.params["fill_value"] in (None, 0)


def _sum(left: Degrees, right: Degrees, sign: int) -> Degrees:
    return {i: left.get(i, 0.0) + sign * right.get(i, 0.0) for i in {**left, **right}}


def _times(degrees: Degrees, factor: float) -> Degrees:
    return {i: factor * degree for i, degree in degrees.items()}


def _common(values: Iterable[_Value], unknown: set[int]) -> Degrees:
    """Degrees that all values have; where they differ there is none."""
    mine = [value.degrees for value in values if not value.of_any_degree]
    if not mine:
        return {}
    for other in mine[1:]:
        unknown.update(i for i, _ in mine[0].items() ^ other.items())
    return _without(mine[0], unknown)


def _joined(values: Sequence[_Value], unknown: set[int]) -> _Value:
    """What is one of these values."""
    if all(value == values[0] for value in values):
        return values[0]
    return _Value(_common(values, unknown))


def _behind_cond(eqn: Any, values: Sequence[_Value], unknown: set[int]) -> list[_Value]:
    outputs = [_walk(branch.jaxpr, values, unknown) for branch in eqn.params["branches"]]
    return [_joined(choices, unknown) for choices in zip(*outputs, strict=True)]


def _behind_scan(eqn: Any, values: Sequence[_Value], unknown: set[int]) -> list[_Value]:
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    carry = list(values[constants:first])
    while True:  # zeros to start from may take another degree in a step, once each
        inputs = [*values[:constants], *carry, *values[first:]]
        outputs = _walk(closed.jaxpr, inputs, unknown)
        pairs = zip(carry, outputs[:carried], strict=True)
        after = [_joined(pair, unknown) for pair in pairs]
        if after == carry:
            return [*carry, *outputs[carried:]]
        carry = after
