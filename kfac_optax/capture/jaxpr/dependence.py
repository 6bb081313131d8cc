"""Which values of a traced function depend on the data: by data flow, through calls and scans."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import call_body, scan_body
from kfac_optax.capture.tap import tap_p


def may_hold_examples(aval: Any) -> bool:
    """Whether an argument may have examples on axis 0: arrays, but no keys."""
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return aval.ndim > 0 and not is_key


def only_stopped(jaxpr: Any, stop: str) -> set[int]:
    """Numbers of the equations all of whose outputs end in equations of that name, or in integers and
    flags, if read at all.

    Nothing before a stopped gradient has a derivative in what it reads, nor a choice of the largest.
    """
    # values that something else reads, or the jaxpr hands out
    live = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    stopped = set()
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if eqn.primitive.name == stop:
            continue
        outs = [v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
        read = any(v in live for v in outs)
        if not eqn.effects and not read:
            stopped.add(i)
            continue
        live |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
    return stopped


def dependence(
    jaxpr: Any,
    inputs: Sequence[bool],
    taps: list[bool],
) -> list[bool]:
    """Which outputs depend on the inputs marked; appends to `taps` whether each tap does, in order."""
    # one pass forward: an output depends on what any input of its equation depends on
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def mark(v: Any) -> bool:
        return False if isinstance(v, jex.Literal) else known.get(v, False)

    for eqn in jaxpr.eqns:
        marks = list(map(mark, eqn.invars))
        # of anything else an output depends on all inputs
        outputs = [any(marks)] * len(eqn.outvars)
        if eqn.primitive is tap_p:
            taps.append(marks[0] or marks[1])  # a shift has no input
        elif (body := call_body(eqn)) is not None:
            outputs = dependence(body.jaxpr, marks, taps)
        elif eqn.primitive.name == "scan":
            outputs = _dependence_of_scan(eqn, marks, taps)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(mark, jaxpr.outvars))


def _dependence_of_scan(
    eqn: Any,
    marks: list[bool],
    taps: list[bool],
) -> list[bool]:
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    while True:  # what one step writes into the carry, the next one reads
        inside: list[bool] = []
        outputs = dependence(closed.jaxpr, marks, inside)
        before = marks[constants:first]
        pairs = zip(before, outputs[:carried], strict=True)
        carry = [old or new for old, new in pairs]
        if carry == before:
            taps.extend(inside)
            return [*carry, *outputs[carried:]]
        marks = [*marks[:constants], *carry, *marks[first:]]
