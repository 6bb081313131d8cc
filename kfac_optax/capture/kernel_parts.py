"""Products with a kernel that is made of others, as products with those.

Axes are named by numbers, as in `einsum`: `x` and the kernel `M` have names each, and a product is
`out[names] = sum x[names] M[names]` over names that `out` has not.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Names = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value of the program; `operand` is its number among those of the product."""

    operand: int
    dtype: Any = None  # cast to this, `None` for as it is


@dataclasses.dataclass(frozen=True)
class Sum:
    """`M = first + sign * second`."""

    first: Any
    second: Any
    sign: int


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`M = factor * of`, with the factor a scalar operand, or its inverse."""

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

    of: Any
    permutation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """`M = first second`, given the names of axes of both and of `M`."""

    first: Any
    second: Any
    names: tuple[Names, Names, Names]


@dataclasses.dataclass(frozen=True)
class Joined:
    """`M` is parts one after another along an axis, or stacked on it where `sizes` is empty."""

    parts: tuple[Any, ...]
    axis: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """`M` has other axes, of sizes `after` and not `before`; `value` is it in the program."""

    value: Any
    of: Any
    before: tuple[int, ...]
    after: tuple[int, ...]


Expression = Leaf | Sum | Scaled | Negative | Moved | Product | Joined | Reshaped


class DoesNotFit(Exception):
    """A kernel's axes are merged or split across those of the product; carries the kernel."""


Einsum = Callable[[jax.Array, Names, jax.Array, Names, Names], jax.Array]


@dataclasses.dataclass
class Multiply:
    """`x M` for kernels of the same product.

    Attributes:
      operands: values of the leaves.
      einsum: `(x, names, M, names, names of the output) -> output`.
      fresh: names that are not in use.
    """

    operands: Sequence[jax.Array]
    einsum: Einsum
    fresh: itertools.count

    def __call__(
        self, x: jax.Array, of_x: Names, kernel: Expression, of_kernel: Names, out: Names
    ) -> jax.Array:
        """`x M`, taken apart."""
        match kernel:
            case Leaf():
                return self.einsum(x, of_x, self.value(kernel), of_kernel, out)
            case Sum():
                first = self(x, of_x, kernel.first, of_kernel, out)
                second = self(x, of_x, kernel.second, of_kernel, out)
                return first + second if kernel.sign > 0 else first - second
            case Scaled():
                # a number goes to the input, so that a bias stays right behind the product
                factor = self.value(kernel.factor)
                scaled = (x / factor if kernel.inverse else x * factor).astype(x.dtype)
                return self(scaled, of_x, kernel.of, of_kernel, out)
            case Negative():
                return self(-x, of_x, kernel.of, of_kernel, out)
            case Moved():
                # names[permutation[i]] = of_kernel[i]
                names = [0] * len(of_kernel)
                for name, axis in zip(of_kernel, kernel.permutation, strict=True):
                    names[axis] = name
                return self(x, of_x, kernel.of, tuple(names), out)
            case Product():
                return self._product(x, of_x, kernel, of_kernel, out)
            case Joined():
                return self._joined(x, of_x, kernel, of_kernel, out)
            case Reshaped():
                return self._reshaped(x, of_x, kernel, of_kernel, out)

    def value(self, leaf: Leaf) -> jax.Array:
        # cast as the program casts it
        """Of a leaf."""
        value = self.operands[leaf.operand]
        return value if leaf.dtype is None else value.astype(leaf.dtype)

    def _product(self, x, of_x, kernel: Product, of_kernel, out) -> jax.Array:
        """`x (A B)` as `(x A) B`, or `(x B) A` where `x` meets `B` first."""
        first, second, made = kernel.names
        # the axes of the product have the kernel's names, those that it sums over new ones
        rename = dict(zip(made, of_kernel, strict=True))
        for name in (*first, *second):
            if name not in rename:
                rename[name] = next(self.fresh)
        sides = [
            (kernel.first, tuple(rename[name] for name in first)),
            (kernel.second, tuple(rename[name] for name in second)),
        ]
        # first the side that `x` is summed with
        met = set(of_x) - set(out)
        if not met & set(sides[0][1]):
            sides.reverse()
        (near, near_names), (far, far_names) = sides
        # what the other side or the output still needs
        needed = (*of_x, *near_names)
        between = tuple(n for n in dict.fromkeys(needed) if n in out or n in far_names)
        return self(self(x, of_x, near, near_names, between), between, far, far_names, out)

    def _joined(self, x, of_x, kernel: Joined, of_kernel, out) -> jax.Array:
        """Each part meets its own slice of `x`, or makes its own slice of the output."""
        name, stacked = of_kernel[kernel.axis], not kernel.sizes
        # a stack is a join of parts of length one
        sizes = kernel.sizes or (1,) * len(kernel.parts)
        starts = [0, *itertools.accumulate(sizes)]
        results = []
        for part, start, size in zip(kernel.parts, starts, sizes, strict=False):
            mine, mine_names = x, of_x
            # summed over, or the same axis in both: the part of `x` that meets it
            if name in of_x:
                mine = jax.lax.slice_in_dim(x, start, start + size, axis=of_x.index(name))
            kept = (of_x, of_kernel, out)
            if stacked:
                # the stacked axis is in neither part nor its product
                mine = mine.squeeze(of_x.index(name)) if name in of_x else mine
                kept = tuple(tuple(n for n in names if n != name) for names in kept)
            mine_names, kernel_names, out_names = kept
            results.append(self(mine, mine_names, part, kernel_names, out_names))
        if name not in out:
            # x M = sum_i x_i M_i
            return sum(results[1:], results[0])
        join = jnp.stack if stacked else jnp.concatenate
        # x [M_1, M_2] = [x M_1, x M_2]
        return join(results, out.index(name))

    def _reshaped(self, x, of_x, kernel: Reshaped, of_kernel, out) -> jax.Array:
        """The axes of `x` are regrouped as those of the kernel are, those of the output back."""
        inner: list[int] = []
        back: list[tuple[Names, Names, list[int]]] = []
        names = out
        for before, after in blocks_of_reshape(kernel.before, kernel.after):
            # one name for every axis of M, as it was before the reshape
            old = tuple(of_kernel[axis] for axis in after)
            same = len(before) == len(after) == 1
            new = old if same else tuple(next(self.fresh) for _ in before)
            inner += new
            if old == new or not old:
                continue
            # axes that are merged or split have to go the same way
            if len({(name in of_x, name in out) for name in old}) > 1:
                raise DoesNotFit(kernel)
            if old[0] in of_x:
                x, of_x = _regrouped(x, of_x, old, new, [kernel.before[i] for i in before])
            if old[0] in out:
                names = (*(n for n in names if n not in old), *new)
                back.append((new, old, [kernel.after[i] for i in after]))
        # x M with the axes as they were, then as the equation has them
        made = self(x, of_x, kernel.of, tuple(inner), names)
        for new, old, sizes in back:
            made, names = _regrouped(made, names, new, old, sizes)
        return made.transpose([names.index(n) for n in out])


def _regrouped(
    x: jax.Array, names: Names, old: Names, new: Names, sizes: Sequence[int]
) -> tuple[jax.Array, Names]:
    """The axes `old` become the axes `new`, behind the others."""
    # [*rest, *old] to [*rest, *new]
    rest = [n for n in names if n not in old]
    x = x.transpose([names.index(n) for n in (*rest, *old)])
    return x.reshape(*x.shape[: len(rest)], *sizes), (*rest, *new)


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
