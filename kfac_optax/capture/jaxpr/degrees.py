"""Parameters without a scale: what a program computes stays the same when they are multiplied.

Every value of the program has a degree of homogeneity in each set of parameters: multiplied by
`c > 0` they multiply it by `c^degree`. Behind a normalisation the degree is zero again.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import bodies, call_body, scan_body
from kfac_optax.capture.jaxpr.homogeneous import (
    DATA,
    MOVED,
    Value,
    constant_behind,
    degrees_behind,
    joined,
    literal,
    without,
)
from kfac_optax.capture.jaxpr.shared_leaves import Owner, SharedLeaf, cut_out
from kfac_optax.capture.jaxpr.views import of_parameter

# A function with a derivative of its own is what its body computes.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def without_scale(jaxpr: Any, owners: Sequence[Sequence[Owner]]) -> set[int]:
    """Sets of parameters that may be multiplied by any `c > 0` without a change of the outputs.

    Proven but for the epsilons of norms; what is not returned may have a scale or not.

    Args:
      jaxpr: of which every equation has a part in the outputs.
      owners: for each input the sets that it belongs to, none for data.
    """
    # sets with a value of no degree: all that reads it has none either
    unknown: set[int] = set()
    inputs = list(map(_input, itertools.count(), jaxpr.invars, owners))
    outputs = _settled(_walk(jaxpr, inputs, unknown), unknown)
    scaled = unknown.union(*(value.degrees for value in outputs))
    return {owner.number for owner in itertools.chain(*owners)} - scaled


def _input(index: int, v: Any, owners: Sequence[Owner]) -> Value:
    if not owners:
        return DATA
    return _of_leaf(SharedLeaf(of_parameter(index, v.aval.shape), tuple(owners)))


def _of_leaf(leaf: SharedLeaf) -> Value:
    """A parameter, which is followed further where it is not of one degree in all sets."""
    degrees = dict.fromkeys(leaf.having_all(), 1.0)
    return Value(degrees, leaf=leaf if leaf.having_some() else None)


def _walk(jaxpr: Any, inputs: Sequence[Value], unknown: set[int]) -> list[Value]:
    """Values of the outputs; adds to `unknown`."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Value:
        if isinstance(v, jex.Literal):
            return literal(v)
        value = known.get(v, DATA)
        if unknown.isdisjoint(value.degrees):
            return value
        return value._replace(degrees=without(value.degrees, unknown))

    for eqn in jaxpr.eqns:
        values = list(map(read, eqn.invars))
        if any(value.degrees or value.leaf for value in values):
            outputs = _behind(eqn, values, unknown)
            known.update(zip(eqn.outvars, outputs, strict=True))
        elif (constant := constant_behind(eqn, values)) is not None:
            # any other function of data is data
            known.update(dict.fromkeys(eqn.outvars, Value({}, constant)))
    return list(map(read, jaxpr.outvars))


def _settled(values: Sequence[Value], unknown: set[int]) -> list[Value]:
    """The same values; what several sets have a part of has no degree in them."""
    settled = []
    for value in values:
        if value.leaf is not None:
            unknown.update(value.leaf.having_some())
            value = value._replace(leaf=None)
        settled.append(value)
    return settled


def _behind(eqn: Any, values: Sequence[Value], unknown: set[int]) -> Sequence[Value]:
    """Values of an equation's outputs."""
    name = eqn.primitive.name
    if (body := call_body(eqn)) is not None:
        return _walk(body.jaxpr, values, unknown)
    if name in _WITH_RULES:
        body = bodies(eqn)[0]
        return _walk(getattr(body, "jaxpr", body), values, unknown)
    if name in MOVED and (cut := cut_out(eqn, [value.leaf for value in values])) is not None:
        return list(map(_of_leaf, cut))
    if name == "scan":
        return _behind_scan(eqn, values, unknown)
    values = _settled(values, unknown)
    if name == "cond":
        # which branch is a number without a degree
        return _behind_cond(eqn, values[1:], unknown)
    # as many outputs as operands; a factor leaves the order of numbers as it is
    if name in ("optimization_barrier", "sort"):
        return values
    degrees = degrees_behind(eqn, values, unknown)
    if degrees is None:
        unknown.update(*(value.degrees for value in values))
        return [DATA] * len(eqn.outvars)
    degrees = {i: degree for i, degree in degrees.items() if degree}
    return [Value(degrees, constant_behind(eqn, values))] * len(eqn.outvars)


def _behind_cond(eqn: Any, values: Sequence[Value], unknown: set[int]) -> list[Value]:
    outputs = [_walk(branch.jaxpr, values, unknown) for branch in eqn.params["branches"]]
    return [joined(choices, unknown) for choices in zip(*outputs, strict=True)]


def _behind_scan(eqn: Any, values: Sequence[Value], unknown: set[int]) -> list[Value]:
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    carry = _settled(values[constants:first], unknown)
    slices = list(map(_sliced, values[first:]))
    while True:  # zeros to start from may take another degree in a step, once each
        inputs = [*values[:constants], *carry, *slices]
        outputs = _settled(_walk(closed.jaxpr, inputs, unknown), unknown)
        pairs = zip(carry, outputs[:carried], strict=True)
        after = [joined(pair, unknown) for pair in pairs]
        if after == carry:
            return [*carry, *outputs[carried:]]
        carry = after


def _sliced(value: Value) -> Value:
    """What one step of a scan over a value sees; all steps are of one degree."""
    return value if value.leaf is None else _of_leaf(value.leaf.sliced())
