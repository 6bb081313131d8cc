"""Equations of a traced program in place of others."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import BODIES, scan_body


def with_body(eqn: Any, inner: Any) -> Any:
    """A call or a scan with another body, given its jaxpr without constants."""
    # calls of different kinds name it differently
    key = next(name for name in BODIES if name in eqn.params)
    old, new = eqn.params[key], inner
    if isinstance(old, jex.ClosedJaxpr):
        new = jex.ClosedJaxpr(inner, old.consts)
    return eqn.replace(params=eqn.params | {key: new})


def rewritten(
    function: Callable,
    operands: Sequence[Any],
    out: Any,
    source: Any,
) -> list[Any]:
    """Equations of `function(*operands)`, which write `out`.

    Args:
      function: of arrays, to one.
      operands: values of the program.
      out: a value of the program.
      source: where in the user's code they come from.
    """
    equations, (made,) = _equations(function, operands)
    # the last equation writes into the value that others read
    last = equations.pop()
    written = [out if v is made else v for v in last.outvars]
    assert out in written, "the last equation writes the output"
    equations.append(last.replace(outvars=written))
    # errors and profiles name the line that was replaced
    return [eqn.replace(source_info=source) for eqn in equations]


def _equations(function: Callable, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    # traced for the types of its operands alone
    types = [v.aval for v in operands]
    closed = jax.make_jaxpr(function)(*types)
    assert not closed.consts, "what is written in place of an equation has no constants"
    return renamed(closed.jaxpr, operands)


def renamed(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Equations of a jaxpr with these values for its inputs and new ones inside, and its outputs."""
    names = dict(zip(jaxpr.invars, operands, strict=True))

    # literals are values themselves
    def name(v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else names[v]

    equations = []
    for eqn in jaxpr.eqns:
        given = list(map(name, eqn.invars))
        # new variables: a jaxpr that stands in two places writes nothing twice
        written = []
        for v in eqn.outvars:
            names[v] = v if isinstance(v, jex.DropVar) else jex.Var(v.aval)
            written.append(names[v])
        equations.append(eqn.replace(invars=given, outvars=written))
    return equations, list(map(name, jaxpr.outvars))


def scan_with(
    eqn: Any,
    inner: Any,
    brought: Sequence[tuple[Any, bool]],
) -> tuple[list[Any], dict[Any, Any]]:
    """Equations of a scan with another body that has further inputs, and new names for those of its
    outputs that no equation writes, as they were values before.

    Args:
      eqn: the scan.
      inner: jaxpr of the body, without constants of its own.
      brought: values outside for the inputs that the body has more, and whether the scan goes over
        them.
    """
    _, constants, carried = scan_body(eqn)
    count = len(eqn.invars)
    first = constants + carried
    outside = [v for v, _ in brought]
    rides = [over for _, over in brought]
    body = jex.jaxpr_as_fun(jex.ClosedJaxpr(inner, []))

    def function(*values: jax.Array) -> list[jax.Array]:
        # inputs of the scan as it was, and what comes in addition
        fixed = values[:constants]
        start = list(values[constants:first])
        over = list(values[first:count])
        more = list(zip(values[count:], rides, strict=True))
        scanned = [x for x, rides_along in more if rides_along]

        def step(carry: Any, xs: Any) -> Any:
            old, new = xs
            slices = iter(new)
            # in the order in which the body has them
            last = [next(slices) if rides_along else x for x, rides_along in more]
            outs = body(*fixed, *carry, *old, *last)
            return outs[:carried], outs[carried:]

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(step, start, (over, scanned), **options)
        return [*carry, *ys]

    equations, made = _equations(function, [*eqn.invars, *outside])
    return _into(equations, made, eqn.outvars)


def _into(
    equations: Sequence[Any],
    made: Sequence[Any],
    outs: Sequence[Any],
) -> tuple[list[Any], dict[Any, Any]]:
    """Equations that write `outs` and not `made`; what no equation writes, or one that has another
    name already, by name.
    """
    written: set[Any] = set()
    for eqn in equations:
        written.update(eqn.outvars)
    new: dict[Any, Any] = {}
    names: dict[Any, Any] = {}
    for v, out in zip(made, outs, strict=True):
        if isinstance(out, jex.DropVar):
            continue
        if isinstance(v, jex.Literal) or v not in written:
            names[out] = v
        elif v in new:
            names[out] = new[v]
        else:
            new[v] = out

    def name(v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else new.get(v, v)

    # read under the same names
    renamed_equations = []
    for eqn in equations:
        read = list(map(name, eqn.invars))
        outputs = list(map(name, eqn.outvars))
        renamed_equations.append(eqn.replace(invars=read, outvars=outputs))
    return renamed_equations, names
