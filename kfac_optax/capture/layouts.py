"""How the weight that a layer uses is stored, and the matrices it becomes."""

import itertools
import math
from collections.abc import Sequence

from kfac_optax._types import Layout
from kfac_optax.capture.geometry import Contraction, Conv, Geometry, ScaleShift


def layout(
    geometry: Geometry,
    kernel: Sequence[int],
    permutation: Sequence[int] = (),
) -> Layout:
    """Layout of the stored weight, given the shape the layer sees and how that was transposed from
    the stored one.

    Args:
      geometry: of the layer.
      kernel: shape of the weight as the layer uses it.
      permutation: stored axes (from the end) of its trailing axes; `()` if used as stored.
    """
    rank = len(kernel)
    parts: list[tuple[int, ...]] = [(n,) for n in kernel]
    match geometry:
        case Contraction():
            order = [rank + axis for axis in geometry.kernel]
        # [*window, C / groups, groups, q / groups], groups in front of the matrix
        case Conv(groups=groups) if groups > 1:
            parts[-1] = (groups, kernel[-1] // groups)
            order = [rank - 1, *range(rank - 1), rank]
        # a transposed convolution: its outputs are the kernel's next to last axis
        case Conv(flipped=True):
            order = [*range(rank - 2), rank - 1, rank - 2]
        case ScaleShift():
            # one row, the channels of which are outputs
            parts.insert(0, (1,))
            order = list(range(rank + 1))
        case _:
            order = list(range(rank))
    flat = list(itertools.chain.from_iterable(parts))
    # stored as it is used
    if not permutation or isinstance(geometry, ScaleShift):
        return Layout(tuple(kernel), tuple(flat), tuple(order))
    front = range(rank - len(permutation))
    source = [*front, *(rank + axis for axis in permutation)]
    # the axis of the used weight that each stored one is
    used = [source.index(axis) for axis in range(rank)]
    stored = _parts_as_stored(parts, used)
    shape = tuple(kernel[axis] for axis in used)
    split = tuple(flat[i] for i in stored)
    return Layout(shape, split, tuple(stored.index(i) for i in order))


def _parts_as_stored(parts: Sequence[Sequence[int]], used: Sequence[int]) -> list[int]:
    """Numbers of the parts of all used axes, in the order in which they are stored."""
    # where each axis begins among the parts
    counts = [len(part) for part in parts]
    starts = [0, *itertools.accumulate(counts)]
    stored: list[int] = []
    for axis in used:
        stored += range(starts[axis], starts[axis + 1])
    return stored


def matrix_shape(geometry: Geometry, kernel: Sequence[int]) -> tuple[int, int, int]:
    """`(groups, inputs, outputs)` of the weight the layer uses."""
    match geometry:
        case Contraction():
            # in the order groups, inputs, outputs
            sizes = [kernel[axis] for axis in geometry.kernel]
            outer = geometry.groups
            inner = outer + geometry.inputs
            return (
                math.prod(sizes[:outer]),
                math.prod(sizes[outer:inner]),
                math.prod(sizes[inner:]),
            )
        case Conv():
            *window, inputs, outputs = kernel
            if geometry.flipped:
                inputs, outputs = outputs, inputs
            # every group has the channels that its part of the kernel has
            groups = geometry.groups
            return groups, math.prod(window) * inputs, outputs // groups
        case ScaleShift():
            return 1, 1, math.prod(kernel)
        case _:
            return 1, kernel[0], kernel[1]
