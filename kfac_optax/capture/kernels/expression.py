"""What a kernel that is made of others is made of.

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
class Stretched:
    """`M = of * factor`, with a factor for each number along these axes of `M`: of every column, say.

    The factor has these axes, in that order, and no others.
    """

    value: Any
    of: Any
    factor: Leaf
    axes: tuple[int, ...]


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


Expression = Leaf | Sum | Scaled | Stretched | Negative | Moved | Product | Joined | Reshaped


class DoesNotFit(Exception):
    """A kernel does not come apart as its product, or its slice, asks for; carries its value."""


def leaves_of(kernel: Expression) -> list[Leaf]:
    """All leaves, factors too."""
    match kernel:
        case Leaf():
            return [kernel]
        case Sum() | Product():
            return leaves_of(kernel.first) + leaves_of(kernel.second)
        case Scaled() | Stretched():
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
        case Scaled() | Stretched() | Negative():
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
        case Scaled() | Stretched():
            of, factor = with_leaves(kernel.of, new), new(kernel.factor)
            return dataclasses.replace(kernel, of=of, factor=factor)
        case Joined():
            parts = tuple(with_leaves(part, new) for part in kernel.parts)
            return dataclasses.replace(kernel, parts=parts)
        case _:
            return dataclasses.replace(kernel, of=with_leaves(kernel.of, new))


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
