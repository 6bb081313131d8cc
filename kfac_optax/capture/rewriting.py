"""Equations of a traced program in place of others."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex


def with_body(eqn: Any, inner: Any) -> Any:
    # calls of different kinds name it differently
    """A call or a scan with another body, given its jaxpr without constants."""
    key = next(k for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    old = eqn.params[key]
    new = jex.ClosedJaxpr(inner, old.consts) if isinstance(old, jex.ClosedJaxpr) else inner
    return eqn.replace(params=eqn.params | {key: new})


def rewritten(function: Callable, operands: Sequence[Any], out: Any, source: Any) -> list[Any]:
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
