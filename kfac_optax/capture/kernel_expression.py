"""What a kernel that is made of others is made of, and slices of it.

`value` is what a part is in the program, for where it does not come apart.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

Names = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value of the program that is not taken apart."""

    value: Any
    dtype: Any = None  # cast to this, `None` for as it is


@dataclasses.dataclass(frozen=True)
class Sum:
    """`M = first + sign * second`."""

    first: Any
    second: Any
    sign: int


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`M = factor * of`, with the factor a scalar, or its inverse."""

    of: Any
    factor: Leaf
    inverse: bool = False


@dataclasses.dataclass(frozen=True)
class Negative:
    """`M = -of`."""

    of: Any


@dataclasses.dataclass(frozen=True)
class Moved:
    """`M` is a transpose: axis `i` is axis `permutation[i]`."""

    value: Any
    of: Any
    permutation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """`M = first second`, given the names of axes of both and of `M`, as in `einsum`."""

    value: Any
    first: Any
    second: Any
    names: tuple[Names, Names, Names]


@dataclasses.dataclass(frozen=True)
class Joined:
    """`M` is parts one after another along an axis, or stacked on it where `sizes` is empty."""

    value: Any
    parts: tuple[Any, ...]
    axis: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """`M` has other axes, of sizes `after` and not `before`."""

    value: Any
    of: Any
    before: tuple[int, ...]
    after: tuple[int, ...]


Expression = Leaf | Sum | Scaled | Negative | Moved | Product | Joined | Reshaped


class DoesNotFit(Exception):
    """A kernel does not come apart as its product, or its slice, asks for; carries its value."""


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


def leaves_of(kernel: Expression) -> list[Leaf]:
    """All leaves, factors too."""
    match kernel:
        case Leaf():
            return [kernel]
        case Sum() | Product():
            return leaves_of(kernel.first) + leaves_of(kernel.second)
        case Scaled():
            return [*leaves_of(kernel.of), kernel.factor]
        case Joined():
            return list(itertools.chain(*map(leaves_of, kernel.parts)))
        case _:
            return leaves_of(kernel.of)


def joins(kernel: Expression, axis: int) -> bool:
    """Whether parts of a kernel are one after another along that axis, or stacked on it."""
    match kernel:
        case Joined():
            return kernel.axis == axis
        case Sum():
            return joins(kernel.first, axis) or joins(kernel.second, axis)
        case Scaled() | Negative():
            return joins(kernel.of, axis)
        case _:
            return False


def with_leaves(kernel: Expression, new: Callable[[Leaf], Leaf]) -> Expression:
    """The same of other leaves."""
    match kernel:
        case Leaf():
            return new(kernel)
        case Sum() | Product():
            first, second = with_leaves(kernel.first, new), with_leaves(kernel.second, new)
            return dataclasses.replace(kernel, first=first, second=second)
        case Scaled():
            return Scaled(with_leaves(kernel.of, new), new(kernel.factor), kernel.inverse)
        case Joined():
            parts = tuple(with_leaves(part, new) for part in kernel.parts)
            return dataclasses.replace(kernel, parts=parts)
        case _:
            return dataclasses.replace(kernel, of=with_leaves(kernel.of, new))


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


def blocks_of_reshape(before: Sequence[int], after: Sequence[int]) -> list[tuple[Names, Names]]:
    """Which axes of a reshape became which, in the smallest blocks.

    >>> print(blocks_of_reshape((2, 3, 4), (6, 2, 2)))
    [((0, 1), (0,)), ((2,), (1, 2))]
    """
    blocks, i, j = [], 0, 0
    # the shortest stretches of both with as many numbers
    while i < len(before) or j < len(after):
        first, second = i, j
        i, j = i + (i < len(before)), j + (j < len(after))
        while math.prod(before[first:i]) != math.prod(after[second:j]):
            if math.prod(before[first:i]) < math.prod(after[second:j]):
                i += 1
            else:
                j += 1
        blocks.append((tuple(range(first, i)), tuple(range(second, j))))
    return blocks
