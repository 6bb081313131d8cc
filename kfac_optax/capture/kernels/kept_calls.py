"""Calls that were written out for nothing stand where they stood.

The compiler merges what a step computes twice only where both programs are the same when it comes
to that: a call and its equations, written out, are simplified at different times.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex


class Written(NamedTuple):
    """A call whose equations stand in its place.

    Attributes:
      call: the equation.
      outs: what its equations hand out.
      start: number of the first one.
      end: number of the one behind the last.
      apart: whether any of them has been taken apart.
    """

    call: Any
    outs: Sequence[Any]
    start: int
    end: int
    apart: bool


def with_calls(
    equations: Sequence[Any],
    outs: Sequence[Any],
    written: Sequence[Written],
) -> list[Any]:
    """The equations with the calls back of whose values nobody has come to read more than they hand
    out.

    Args:
      equations: of a jaxpr.
      outs: what it hands out.
      written: calls whose equations are among them; one inside another behind that.
    """
    last = {v: i for i, eqn in enumerate(equations) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(outs), len(equations))
    # of those that start at the same equation the outermost
    calls: dict[int, Written] = {}
    for one in written:
        if _is_whole(one, equations, last):
            calls.setdefault(one.start, one)
    kept: list[Any] = []
    i = 0
    while i < len(equations):
        if i in calls:
            kept.append(calls[i].call.replace(outvars=list(calls[i].outs)))
            i = calls[i].end
        else:
            kept.append(equations[i])
            i += 1
    return kept


def _is_whole(one: Written, equations: Sequence[Any], last: dict[Any, int]) -> bool:
    """Whether a call may stand in place of its equations: they are as they were, and of what they
    write others read no more than it hands out.
    """
    if one.apart or one.start == one.end:
        return False
    made: set[Any] = set()
    for eqn in equations[one.start : one.end]:
        made.update(eqn.outvars)
    # an input handed on, or one value twice, has a name that is no output's
    outs = set(_variables(one.outs))
    if len(outs) < len(one.outs) or not outs <= made:
        return False
    return all(last.get(v, -1) < one.end for v in made - outs)


def _variables(values: Sequence[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, jex.Literal)]
