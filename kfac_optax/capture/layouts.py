"""How the weight that a layer uses is stored, and the matrices it becomes."""

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
    # stored as it is used
    if not permutation or isinstance(geometry, ScaleShift):
        return Layout(tuple(kernel), tuple(n for part in parts for n in part), tuple(order))
    # parts in the order in which they are stored, and where each part of the used weight is found
    # there
    source = [*range(rank - len(permutation)), *(rank + axis for axis in permutation)]
    # where each part begins among all parts of the used weight
    starts = [sum(len(p) for p in parts[:i]) for i in range(rank)]
    stored: list[int] = []
    for axis in range(rank):
        used = source.index(axis)
        stored += range(starts[used], starts[used] + len(parts[used]))
    flat = [n for part in parts for n in part]
    shape = tuple(kernel[source.index(axis)] for axis in range(rank))
    split = tuple(flat[i] for i in stored)
    return Layout(shape, split, tuple(stored.index(i) for i in order))


def matrix_shape(geometry: Geometry, kernel: Sequence[int]) -> tuple[int, int, int]:
    """`(groups, inputs, outputs)` of the weight the layer uses."""
    match geometry:
        case Contraction():
            # in the order groups, inputs, outputs
            sizes = [kernel[axis] for axis in geometry.kernel]
            inner = geometry.groups + geometry.inputs
            return (
                math.prod(sizes[: geometry.groups]),
                math.prod(sizes[geometry.groups : inner]),
                math.prod(sizes[inner:]),
            )
        case Conv():
            inputs, outputs = kernel[-2], kernel[-1]
            if geometry.flipped:
                inputs, outputs = outputs, inputs
            return geometry.groups, math.prod(kernel[:-2]) * inputs, outputs // geometry.groups
        case ScaleShift():
            return 1, 1, math.prod(kernel)
        case _:
            return 1, kernel[0], kernel[1]
