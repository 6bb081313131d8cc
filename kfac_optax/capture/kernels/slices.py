"""Slices of a kernel that is made of others, as the same sums and products of slices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kfac_optax.capture.kernels.expression import (
    DoesNotFit,
    Expression,
    Joined,
    Leaf,
    Moved,
    Names,
    Negative,
    Product,
    Reshaped,
    Scaled,
    Stretched,
    Sum,
    blocks_of_reshape,
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Numbers `start` to `start + size` along an axis.

    Attributes:
      axis: of the kernel.
      start: `None` for the number of a scan's step.
      size: `None` for one, without the axis.
    """

    axis: int
    start: int | None
    size: int | None

    def along(self, axis: int) -> "Cut":
        """The same of another axis."""
        return dataclasses.replace(self, axis=axis)

    def rest(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Of what there is one for each axis, what is left."""
        gone = self.size is None
        return tuple(x for axis, x in enumerate(items) if not (gone and axis == self.axis))


CutLeaf = Callable[[Leaf, Cut], Leaf]


def sliced(kernel: Expression, cut: Cut, leaf: CutLeaf) -> Expression:
    """The slice of a kernel, as the same sums and products of slices of its leaves.

    Args:
      kernel: what is cut.
      cut: where.
      leaf: the slice of a leaf.

    Raises:
      DoesNotFit: a part of it cannot be cut there.
    """
    match kernel:
        case Leaf():
            return leaf(kernel, cut)
        # linear in the parts: the slice of a sum is the sum of slices
        case Sum():
            first, second = sliced(kernel.first, cut, leaf), sliced(kernel.second, cut, leaf)
            return Sum(first, second, kernel.sign)
        case Scaled():
            return Scaled(sliced(kernel.of, cut, leaf), kernel.factor, kernel.inverse)
        case Stretched():
            return _sliced_stretched(kernel, cut, leaf)
        case Negative():
            return Negative(sliced(kernel.of, cut, leaf))
        case Moved():
            axis = kernel.permutation[cut.axis]
            of = sliced(kernel.of, cut.along(axis), leaf)
            # axes behind the one that is gone are one further in front
            gone = cut.size is None
            order = [i - (gone and i > axis) for i in cut.rest(kernel.permutation)]
            return Moved(kernel.value, of, tuple(order))
        case Product():
            return _sliced_product(kernel, cut, leaf)
        case Joined():
            return _sliced_joined(kernel, cut, leaf)
        case Reshaped():
            return _sliced_reshaped(kernel, cut, leaf)


def _sliced_stretched(kernel: Stretched, cut: Cut, leaf: CutLeaf) -> Expression:
    """Of the factor too, where it has the axis."""
    of, factor, gone = sliced(kernel.of, cut, leaf), kernel.factor, cut.size is None
    if cut.axis in kernel.axes:
        factor = leaf(factor, cut.along(kernel.axes.index(cut.axis)))
    # axes behind the one that is gone are one further in front
    kept = [axis for axis in kernel.axes if not (gone and axis == cut.axis)]
    axes = tuple(axis - (gone and axis > cut.axis) for axis in kept)
    return Stretched(kernel.value, of, factor, axes)


def _sliced_product(kernel: Product, cut: Cut, leaf: CutLeaf) -> Expression:
    """Of each side that has the axis."""
    # (A B)[i] = A[i] B, (A B)[:, k] = A B[:, k]
    name = kernel.names[2][cut.axis]

    def side(of: Expression, names: Names) -> tuple[Expression, Names]:
        if name not in names:
            return of, names
        here = cut.along(names.index(name))
        return sliced(of, here, leaf), here.rest(names)

    first, of_first = side(kernel.first, kernel.names[0])
    second, of_second = side(kernel.second, kernel.names[1])
    return Product(kernel.value, first, second, (of_first, of_second, cut.rest(kernel.names[2])))


def _sliced_joined(kernel: Joined, cut: Cut, leaf: CutLeaf) -> Expression:
    stacked = not kernel.sizes
    if cut.axis != kernel.axis:
        # the axis of a stack is none of its parts'; those behind it are one further in front there
        here = cut.along(cut.axis - (stacked and cut.axis > kernel.axis))
        axis = kernel.axis - (cut.size is None and cut.axis < kernel.axis)
        parts = tuple(sliced(part, here, leaf) for part in kernel.parts)
        return Joined(kernel.value, parts, axis, kernel.sizes)
    if cut.start is None:
        # every step of a scan would have another parameter
        raise DoesNotFit(kernel.value)
    if stacked and cut.size is None:
        return kernel.parts[cut.start]
    if stacked:
        parts = kernel.parts[cut.start : cut.start + (cut.size or 1)]
        return Joined(kernel.value, parts, kernel.axis, ())
    return _sliced_along_join(kernel, cut, leaf)


def _sliced_along_join(kernel: Joined, cut: Cut, leaf: CutLeaf) -> Expression:
    """What is left of each part that the cut meets."""
    # [start, end) of the join; parts are [first, first + size)
    start = cut.start or 0
    end = start + (1 if cut.size is None else cut.size)
    parts, sizes, first = [], [], 0
    for part, size in zip(kernel.parts, kernel.sizes, strict=True):
        low, high = max(start, first), min(end, first + size)
        if low < high and cut.size is None:
            return sliced(part, Cut(cut.axis, low - first, None), leaf)
        if low < high:
            whole = high - low == size
            here = Cut(cut.axis, low - first, high - low)
            parts.append(part if whole else sliced(part, here, leaf))
            sizes.append(high - low)
        first += size
    if not parts:  # no numbers
        raise DoesNotFit(kernel.value)
    if len(parts) == 1:
        return parts[0]
    return Joined(kernel.value, tuple(parts), kernel.axis, tuple(sizes))


def _sliced_reshaped(kernel: Reshaped, cut: Cut, leaf: CutLeaf) -> Expression:
    """Along an axis that the reshape has left alone."""
    # the one axis that the reshape has made this one of
    blocks = blocks_of_reshape(kernel.before, kernel.after)
    (olds,) = [old for old, new in blocks if new == (cut.axis,)] or [()]
    if len(olds) != 1:
        raise DoesNotFit(kernel.value)
    here = cut.along(olds[0])
    of = sliced(kernel.of, here, leaf)
    before, after = list(kernel.before), list(kernel.after)
    before[here.axis] = after[cut.axis] = cut.size or 1
    return Reshaped(kernel.value, of, here.rest(before), cut.rest(after))
