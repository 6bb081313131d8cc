"""Which axis of a value holds the examples, followed through a program.

`None` is said of constants, `UNKNOWN` of values that depend on the batch in an axis that is no
longer known.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# the examples are in it, but on no axis that is known
UNKNOWN = -1
Axis = int | None


def of_inputs(jaxpr: Any, leaves: int, examples: int | None) -> list[Axis]:
    """Axes of a jaxpr's inputs, of which the first `leaves` are parameters: arguments as long as
    the batch have their examples on axis 0.
    """
    arguments = jaxpr.invars[leaves:]
    axes = [_of_argument(v.aval, examples) for v in arguments]
    return [None] * leaves + axes


def _of_argument(aval: Any, examples: int | None) -> Axis:
    if aval.ndim == 0 or jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        # scalars and keys have no axis
        return None
    # any argument as long as the batch on its first axis
    return 0 if aval.shape[0] == examples else UNKNOWN


def sliced(axis: Axis) -> Axis:
    """Of one step of a scan over a value."""
    if axis is None:
        return None
    # the axis that was scanned over is gone
    return UNKNOWN if axis in (0, UNKNOWN) else axis - 1


def stacked(axis: Axis) -> Axis:
    """Of all steps of a scan together."""
    if axis is None or axis == UNKNOWN:
        return axis
    # the scan's axis is in front
    return axis + 1


def behind(
    eqn: Any,
    axes: Sequence[Axis],
    examples: int | None,
) -> list[Axis]:
    """Axes of an equation's outputs, given those of its operands."""
    if all(axis is None for axis in axes):
        # equations among parameters alone
        return [None] * len(eqn.outvars)
    # as many outputs as operands
    if eqn.primitive.name == "optimization_barrier":
        return list(axes)
    moved = [(v.aval, _moved(eqn, axes, v)) for v in eqn.outvars]
    return [_checked(axis, aval, examples) for aval, axis in moved]


def _checked(axis: int, aval: Any, examples: int | None) -> int:
    """The axis, or the only one that is as long as the batch."""
    # tokens of effects have no shape
    shape = getattr(aval, "shape", ())
    if 0 <= axis < len(shape) and shape[axis] == examples:
        return axis
    # the program is followed no further, but only one axis can be it
    long = [i for i, n in enumerate(shape) if n == examples]
    return long[0] if len(long) == 1 else UNKNOWN


def _moved(eqn: Any, axes: Sequence[Axis], out: Any) -> int:
    """Where the examples' axis of an operand goes; anything, where that is not known."""
    p, name = eqn.params, eqn.primitive.name
    # the first operand whose axis is known
    known = ((i, x) for i, x in enumerate(axes) if x not in (None, UNKNOWN))
    side, axis = next(known, (0, UNKNOWN))
    if axis == UNKNOWN or axis is None:
        return UNKNOWN
    if name == "transpose":
        return list(p["permutation"]).index(axis)
    if name == "broadcast_in_dim":
        return int(p["broadcast_dimensions"][axis])
    if name == "reshape":
        return _reshaped(axis, eqn.invars[0].aval.shape, out.aval.shape)
    if name == "squeeze":
        return _without(axis, p["dimensions"])
    if name == "dot_general":
        in_product = axes_of_product(eqn)[side]
        return in_product.get(axis, UNKNOWN)
    if name == "conv_general_dilated" and side == 0:
        numbers = p["dimension_numbers"]
        # rows stay where the batch is, in whatever order axes are stored
        return numbers.out_spec[0] if axis == numbers.lhs_spec[0] else UNKNOWN
    if name == "gather" and side == 1:
        offset = p["dimension_numbers"].offset_dims
        # axes of the output that are not offsets are those of the indices
        of_indices = [i for i in range(out.aval.ndim) if i not in offset]
        return of_indices[axis]
    if name.startswith(("reduce_", "arg")) and "axes" in p:
        summed = p["axes"]
        return UNKNOWN if axis in summed else _without(axis, summed)
    # elementwise, cumulative, or unknown with as many axes
    same_rank = getattr(out.aval, "ndim", 0) == eqn.invars[side].aval.ndim
    return axis if same_rank else UNKNOWN


def _without(axis: int, gone: Sequence[int]) -> int:
    """An axis, when those in front of it are counted without some that are gone."""
    return axis - sum(d < axis for d in gone)


def _reshaped(
    axis: int,
    before: Sequence[int],
    after: Sequence[int],
) -> int:
    """The axis with as many numbers in front of it as before."""
    # a reshape that keeps an axis keeps how many numbers are in front of it
    front = math.prod(before[:axis])
    for i, n in enumerate(after):
        if n == before[axis] and math.prod(after[:i]) == front:
            return i
    return UNKNOWN


def axes_of_product(eqn: Any) -> tuple[dict[int, int], dict[int, int]]:
    """Where the axes of both operands of a `dot_general` are in its output; not those summed over."""
    summed, batched = eqn.params["dimension_numbers"]
    left: dict[int, int] = {}
    right: dict[int, int] = {}
    # batched axes come first, then the free ones of each side
    position = len(batched[0])
    for side, found in enumerate((left, right)):
        found.update((axis, i) for i, axis in enumerate(batched[side]))
        met = (*summed[side], *batched[side])
        for axis in range(eqn.invars[side].aval.ndim):
            if axis not in met:
                found[axis] = position
                position += 1
    return left, right
