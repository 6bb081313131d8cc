"""Gains of kernels that are normalised: parameters by which every column is multiplied."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.extend import core as jex

from kfac_optax.capture.kernels.equations import spread_over
from kfac_optax.capture.kernels.known import Known


class Gain(NamedTuple):
    """`M = rest * gain`.

    Attributes:
      gain: the parameter.
      along: axes of `M` that it has.
      equation: makes the rest, which is one value.
      rest: that value.
    """

    gain: Any
    along: tuple[int, ...]
    equation: Any
    rest: Any


def gain_of(
    eqn: Any,
    source: Mapping[Any, Any],
    look: Callable[[Any], Known],
    before_repeats: Callable[[Any], tuple[Any, tuple[int, ...]]],
) -> Gain | None:
    """Of `(g * u) / n` and `(g * u) * n`, which are `(u / n) * g` and `(u * n) * g`.

    So weight norm is written, `g * v / |v|`, and weight standardisation: what is not linear in its
    parameters is one value, whose product with data has `g` for its scale.

    Args:
      eqn: the quotient or the product.
      source: equations that write values, by value.
      look: what is known of a value.
      before_repeats: what a value repeats, and where its axes are then.
    """
    out = eqn.outvars[0]
    sides = (0,) if eqn.primitive.name == "div" else (0, 1)
    for side in sides:
        numerator = eqn.invars[side]
        made = None if isinstance(numerator, jex.Literal) else source.get(numerator)
        if made is None or made.primitive.name != "mul" or numerator.aval.shape != out.aval.shape:
            continue
        for factor, u in (made.invars, made.invars[::-1]):
            gain, axes = before_repeats(factor)
            along = spread_over(gain, axes, out.aval.shape)
            # of columns, not a weight for every number
            columns = 0 < len(along) < out.aval.ndim and u.aval.shape == out.aval.shape
            if columns and look(gain).is_parameter:
                rest = jex.Var(out.aval)
                operands = [u if i == side else v for i, v in enumerate(eqn.invars)]
                return Gain(gain, along, eqn.replace(invars=operands, outvars=[rest]), rest)
    return None
