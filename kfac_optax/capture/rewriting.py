"""Equations of a traced program in place of others."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from kfac_optax.capture.calls import scan_body


def with_body(eqn: Any, inner: Any) -> Any:
    # calls of different kinds name it differently
    """A call or a scan with another body, given its jaxpr without constants."""
    key = next(k for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    old = eqn.params[key]
    new = jex.ClosedJaxpr(inner, old.consts) if isinstance(old, jex.ClosedJaxpr) else inner
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
    # traced for the types of its operands alone
    closed = jax.make_jaxpr(function)(*(v.aval for v in operands))
    assert not closed.consts, "what is written in place of an equation has no constants"
    equations, (made,) = renamed(closed.jaxpr, operands)
    # the last equation writes into the value that others read
    last = equations[-1]
    written = [out if v is made else v for v in last.outvars]
    assert out in written, "the last equation writes the output"
    equations[-1] = last.replace(outvars=written)
    # errors and profiles name the line that was replaced
    return [eqn.replace(source_info=source) for eqn in equations]


def renamed(jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Equations of a jaxpr with these values for its inputs and new ones inside, and its outputs."""
    names = dict(zip(jaxpr.invars, operands, strict=True))

    def name(v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else names[v]

    equations = []
    for eqn in jaxpr.eqns:
        given = list(map(name, eqn.invars))
        # new variables: a jaxpr that stands in two places writes nothing twice
        for v in eqn.outvars:
            names[v] = v if isinstance(v, jex.DropVar) else jex.Var(v.aval)
        equations.append(eqn.replace(invars=given, outvars=[names[v] for v in eqn.outvars]))
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
    count, first = len(eqn.invars), constants + carried
    rides = [over for _, over in brought]
    body = jex.jaxpr_as_fun(jex.ClosedJaxpr(inner, []))

    def function(*values: jax.Array) -> list[jax.Array]:
        more = values[count:]
        over = [x for x, scanned in zip(more, rides, strict=True) if scanned]

        def step(carry: Any, xs: Any) -> Any:
            old, new = xs
            slices = iter(new)
            # in the order in which the body has them
            last = [next(slices) if s else x for x, s in zip(more, rides, strict=True)]
            outs = body(*values[:constants], *carry, *old, *last)
            return outs[:carried], outs[carried:]

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        start = list(values[constants:first])
        carry, ys = jax.lax.scan(step, start, (list(values[first:count]), over), **options)
        return [*carry, *ys]

    operands = [*eqn.invars, *(v for v, _ in brought)]
    closed = jax.make_jaxpr(function)(*(v.aval for v in operands))
    assert not closed.consts, "what is written in place of a scan has no constants"
    equations, made = renamed(closed.jaxpr, operands)
    return _into(equations, made, eqn.outvars)


def _into(
    equations: Sequence[Any],
    made: Sequence[Any],
    outs: Sequence[Any],
) -> tuple[list[Any], dict[Any, Any]]:
    """Equations that write `outs` and not `made`; what no equation writes, or one that has another
    name already, by name.
    """
    written = {v for eqn in equations for v in eqn.outvars}
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
    return [
        eqn.replace(invars=list(map(name, eqn.invars)), outvars=list(map(name, eqn.outvars)))
        for eqn in equations
    ], names
