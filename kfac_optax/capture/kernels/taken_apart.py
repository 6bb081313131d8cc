"""A product of data and a kernel that is made of parameters, as products with each of them."""

import functools
from collections.abc import Sequence
from typing import Any

from kfac_optax.capture.jaxpr.rewriting import rewritten
from kfac_optax.capture.kernels.expression import DoesNotFit, Leaf, leaves_of
from kfac_optax.capture.kernels.known import Known
from kfac_optax.capture.kernels.uses import Multiplied, multiplied, ways
from kfac_optax.capture.kernels.values import Values


def taken_apart(values: Values, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
    """What computes a product of data and a kernel; `None` where it stays as it is."""
    for side, multiply in ways(eqn):
        other = 1 - side
        if not given[other].data or not given[side].is_kernel:
            continue
        values.whole.clear()
        # what turns out not to come apart is tried as a whole: fewer values every time
        while True:
            values.slices.clear()  # of an attempt that has failed
            try:
                return _with_kernel(values, eqn, side, multiply)
            except DoesNotFit as problem:
                values.whole.add(problem.args[0])
    return None


def _with_kernel(
    values: Values,
    eqn: Any,
    side: int,
    multiply: Multiplied,
) -> list[Any] | None:
    operand = eqn.invars[side]
    kernel = values.expression(operand)
    # each value once; literals are told apart by what they are in the program too
    by_id = {id(x.value): x.value for x in leaves_of(kernel)}
    leaves = list(by_id.values())
    # the operand itself, or no parameter in it: there is nothing to take apart
    itself = isinstance(kernel, Leaf) and kernel.value is operand
    if itself or not any(values.look(v).is_parameter for v in leaves):
        return None
    function = functools.partial(multiplied, eqn, multiply, kernel, leaves)
    operands = [eqn.invars[1 - side], *leaves]
    return rewritten(function, operands, eqn.outvars[0], eqn.source_info)
