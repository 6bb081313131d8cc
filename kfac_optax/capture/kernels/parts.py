"""Products with a kernel that is made of others, as products with those.

Axes are named by numbers, as in `einsum`: `x` and the kernel `M` have names each, and a product is
`out[names] = sum x[names] M[names]` over names that `out` has not. A convolution is one too, whose
spatial axes have the same names in `x` and in the output, and those of its window, which the kernel
alone has, cannot come apart.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.capture.jaxpr.example_axis import axes_of_product
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

Einsum = Callable[[jax.Array, Names, jax.Array, Names, Names], jax.Array]


@dataclasses.dataclass
class Multiply:
    """`x M` for kernels of the same product.

    Attributes:
      values: of the leaves, by the identity of what they are in the program.
      einsum: `(x, names, M, names, names of the output) -> output`.
      fresh: names that are not in use.
      fixed: names of axes of the kernel that cannot be regrouped.
      part: `(name, before, after)` to what multiplies by the numbers along a fixed axis between
        these many on both sides, `None` where they cannot be cut.
    """

    values: Mapping[int, jax.Array]
    einsum: Einsum
    fresh: itertools.count
    fixed: Names = ()
    part: Callable[[int, int, int], "Multiply | None"] = lambda *_: None

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
            case Stretched():
                return self._stretched(x, of_x, kernel, of_kernel, out)
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
        value = self.values[id(leaf.value)]
        return value if leaf.dtype is None else value.astype(leaf.dtype)

    def _stretched(self, x, of_x, kernel: Stretched, of_kernel, out) -> jax.Array:
        """`x (d M) = (x d) M` for factors of rows, `x (M d) = (x M) d` for those of columns."""
        factor = self.value(kernel.factor)
        along = tuple(of_kernel[axis] for axis in kernel.axes)
        # in groups the channels of the kernel are fewer than those of `x`
        if set(along) <= set(of_x) and _sizes(x, of_x, along) == factor.shape:
            return self(_times(x, of_x, factor, along), of_x, kernel.of, of_kernel, out)
        if set(along) <= set(out):
            made = self(x, of_x, kernel.of, of_kernel, out)
            return _times(made, out, factor, along)
        raise DoesNotFit(kernel.value)

    def _product(self, x, of_x, kernel: Product, of_kernel, out) -> jax.Array:
        """`x (A B)` as `(x A) B`, or `(x B) A` where `x` meets `B` first."""
        first, second, made = kernel.names
        # a window has to be all on one side, with one axis between the sides
        between = set(first) & set(second)
        if self.fixed and (len(between) != 1 or between & set(made)):
            raise DoesNotFit(kernel.value)
        # the axes of the product have the kernel's names, those that it sums over new ones
        rename = dict(zip(made, of_kernel, strict=True))
        for name in (*first, *second):
            if name not in rename:
                rename[name] = next(self.fresh)
        of_first = tuple(rename[name] for name in first)
        of_second = tuple(rename[name] for name in second)
        self._check_sides(kernel, of_first, of_second)
        sides = [(kernel.first, of_first), (kernel.second, of_second)]
        # first the side that `x` is summed with
        met = set(of_x) - set(out)
        if not met & set(of_first):
            sides.reverse()
        (near, near_names), (far, far_names) = sides
        # what the other side or the output still needs
        needed = dict.fromkeys((*of_x, *near_names))
        kept = tuple(n for n in needed if n in out or n in far_names)
        made = self(x, of_x, near, near_names, kept)
        return self(made, kept, far, far_names, out)

    def _check_sides(self, kernel: Product, first: Names, second: Names) -> None:
        """Raises where a window, or channels in groups, would be on both sides of a product."""
        fixed = set(self.fixed)
        held = [len(fixed.intersection(names)) for names in (first, second)]
        if sorted(held) != [0, len(fixed)]:
            raise DoesNotFit(kernel.value)
        # and besides the window each side has one kind of channels and the axis between
        others = [len(first) - held[0], len(second) - held[1]]
        if fixed and others != [2, 2]:
            raise DoesNotFit(kernel.value)

    def _joined(self, x, of_x, kernel: Joined, of_kernel, out) -> jax.Array:
        """Each part meets its own slice of `x`, or makes its own slice of the output."""
        name, stacked = of_kernel[kernel.axis], not kernel.sizes
        if name in self.fixed and not stacked:
            return self._joined_fixed(x, of_x, kernel, of_kernel, out)
        if stacked and self.fixed:
            raise DoesNotFit(kernel.value)
        # a stack is a join of parts of length one
        sizes = kernel.sizes or (1,) * len(kernel.parts)
        starts = [0, *itertools.accumulate(sizes)]
        results = []
        for part, start, size in zip(kernel.parts, starts, sizes, strict=False):
            mine = x
            # summed over, or the same axis in both: the part of `x` that meets it
            if name in of_x:
                mine = jax.lax.slice_in_dim(x, start, start + size, axis=of_x.index(name))
            mine_names, part_names, out_names = of_x, of_kernel, out
            if stacked:
                # the stacked axis is in neither part nor its product
                mine = mine.squeeze(of_x.index(name)) if name in of_x else mine
                mine_names = _without(name, of_x)
                part_names = _without(name, of_kernel)
                out_names = _without(name, out)
            results.append(self(mine, mine_names, part, part_names, out_names))
        if name not in out:
            # x M = sum_i x_i M_i
            return sum(results[1:], results[0])
        join = jnp.stack if stacked else jnp.concatenate
        # x [M_1, M_2] = [x M_1, x M_2]
        return join(results, out.index(name))

    def _joined_fixed(self, x, of_x, kernel: Joined, of_kernel, out) -> jax.Array:
        """Each part of a window meets what that sees, and the results add up."""
        name, before, total = of_kernel[kernel.axis], 0, sum(kernel.sizes)
        results = []
        for part, size in zip(kernel.parts, kernel.sizes, strict=True):
            multiply = self.part(name, before, total - before - size)
            if multiply is None:
                raise DoesNotFit(kernel.value)
            if size:
                results.append(multiply(x, of_x, part, of_kernel, out))
            before += size
        return sum(results[1:], results[0])

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
            if old == new or (not old and not self.fixed):
                continue
            # axes that are merged or split have to go the same way
            if self.fixed or len({(name in of_x, name in out) for name in old}) > 1:
                raise DoesNotFit(kernel.value)
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


def _without(gone: int, names: Names) -> Names:
    return tuple(name for name in names if name != gone)


def _sizes(x: jax.Array, names: Names, along: Names) -> tuple[int, ...]:
    return tuple(x.shape[names.index(name)] for name in along)


def _times(x: jax.Array, names: Names, factor: jax.Array, along: Names) -> jax.Array:
    """Every number along these axes times its factor."""
    # axes of the factor in the order in which x has them
    axes = sorted(names.index(name) for name in along)
    factor = factor.transpose([along.index(names[axis]) for axis in axes])
    return (x * jax.lax.broadcast_in_dim(factor, x.shape, axes)).astype(x.dtype)


def _regrouped(
    x: jax.Array, names: Names, old: Names, new: Names, sizes: Sequence[int]
) -> tuple[jax.Array, Names]:
    """The axes `old` become the axes `new`, behind the others."""
    # [*rest, *old] to [*rest, *new]
    rest = [n for n in names if n not in old]
    x = x.transpose([names.index(n) for n in (*rest, *old)])
    return x.reshape(*x.shape[: len(rest)], *sizes), (*rest, *new)


def product(
    eqn: Any, side: int, kernel: Expression, x: jax.Array, values: Mapping[int, jax.Array]
) -> jax.Array:
    """A `dot_general` with the kernel on that side."""
    names, p = names_of_product(eqn), eqn.params
    options = {key: p[key] for key in ("precision", "preferred_element_type")}

    def einsum(x: jax.Array, of_x: Names, m: jax.Array, of_m: Names, out: Names) -> jax.Array:
        return jnp.einsum(x, of_x, m, of_m, out, **options)

    # new names for what products inside the kernel sum over
    highest = max(itertools.chain(*names), default=0)
    multiply = Multiply(values, einsum, itertools.count(highest + 1))
    return multiply(x, names[1 - side], kernel, names[side], names[2])


def names_of_product(eqn: Any) -> tuple[Names, Names, Names]:
    """Names of the axes of both operands of a `dot_general`, and of its output."""
    summed, _ = eqn.params["dimension_numbers"]
    places = axes_of_product(eqn)
    # names of the output's axes are their numbers; those summed over come behind
    rank = eqn.outvars[0].aval.ndim
    sides = []
    for side in (0, 1):
        names = dict(places[side])
        names |= {axis: rank + i for i, axis in enumerate(summed[side])}
        axes = range(eqn.invars[side].aval.ndim)
        sides.append(tuple(names[axis] for axis in axes))
    return sides[0], sides[1], tuple(range(rank))
