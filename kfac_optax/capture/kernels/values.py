"""What is known of the values of a jaxpr, and what those are made of that a kernel is.

A body knows the values of the jaxpr around it: where a kernel is made outside, its parts come in as
further operands.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.views import View, passed_on
from kfac_optax.capture.kernels.equations import (
    cuts_of,
    filled,
    pads,
    piece,
    regroups,
    scalar_and_other,
    slice_of,
    spread_over,
    squeezed,
)
from kfac_optax.capture.kernels.expression import (
    DoesNotFit,
    Expression,
    Joined,
    Leaf,
    Moved,
    Negative,
    Product,
    Reshaped,
    Scaled,
    Stretched,
    Sum,
    joins,
    leaves_of,
    with_leaves,
)
from kfac_optax.capture.kernels.gains import gain_of
from kfac_optax.capture.kernels.known import Known, is_real
from kfac_optax.capture.kernels.parts import names_of_product
from kfac_optax.capture.kernels.slices import Cut, sliced

# of one kernel: every step of `w <- 1.5 w - 0.5 w w' w` makes them four times as many
_MOST_LEAVES = 1000


class Outside(NamedTuple):
    """The jaxpr around a body: values there, by the input of the body that each is.

    Of those in `riding` a step sees one slice.
    """

    values: "Values"
    names: Mapping[Any, Any]
    riding: Mapping[Any, Any]


class Values:
    """What is known of the values of one jaxpr, of those gone through so far."""

    def __init__(self, known: dict[Any, Known], outside: Outside | None = None):
        self.known = known
        self.source: dict[Any, Any] = {}  # equations that write values, by value
        self.outside = outside
        # values that do not come apart, here and outside
        self.whole: set[Any] = outside.values.whole if outside else set()
        # operands that a body gets besides its own: (value outside, whether by slices) to value
        self.imports: dict[tuple[Any, bool], Any] = {}
        self.slices: list[Any] = []  # equations that cut leaves

    def look(self, v: Any) -> Known:
        """What is known of a value; nothing of literals."""
        return Known() if isinstance(v, jex.Literal) else self.known.get(v, Known())

    def note(self, eqn: Any, given: Sequence[Known], views: Sequence[View | None] | None) -> None:
        """What an equation writes, given what is known of its operands, and views of its outputs."""
        data, made = any(x.data for x in given), any(x.made for x in given)
        # a value that is read twice counts twice; more than the most need no number
        leaves = min(sum(1 if x.is_parameter else x.leaves for x in given), _MOST_LEAVES + 1)
        for v, view in zip(eqn.outvars, views or [None] * len(eqn.outvars), strict=True):
            self.known[v], self.source[v] = Known(view, data, made, leaves), eqn

    def expression(self, v: Any, dtype: Any = None) -> Expression:
        """What a kernel is made of, cast to that dtype.

        Raises:
          DoesNotFit: a value is not made of slices of others as it seemed.
        """
        # a number that is written in the program, in which nothing can be looked up
        if isinstance(v, jex.Literal):
            return Leaf(v, dtype)
        known = self.look(v)
        if known.is_parameter or v in self.whole or known.leaves > _MOST_LEAVES:
            return Leaf(v, dtype)
        # a value that is neither is as it is: a parameter, or what does not come apart
        eqn = self.source.get(v)
        made = self._from_outside(v, dtype) if eqn is None else self._node(v, eqn, dtype)
        return Leaf(v, dtype) if made is None else made

    def is_joined_of_steps(self, v: Any) -> bool:
        """Whether a kernel does not come apart for a step of a scan, but for one that is numbered."""
        self.whole.clear()
        try:
            kernel = self.expression(v)
        except DoesNotFit:
            return False
        some = any(self.look(x.value).is_parameter for x in leaves_of(kernel))
        return some and joins(kernel, 0)

    def before_repeats(self, v: Any) -> tuple[Any, tuple[int, ...]]:
        """What a value repeats along some axes, and where its axes are then; itself where it does not."""
        eqn = None if isinstance(v, jex.Literal) else self.source.get(v)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return v, tuple(range(v.aval.ndim))
        return eqn.invars[0], tuple(eqn.params["broadcast_dimensions"])

    def _node(self, out: Any, eqn: Any, dtype: Any) -> Expression | None:
        p, name, given = eqn.params, eqn.primitive.name, eqn.invars
        shapes = [getattr(v.aval, "shape", ()) for v in given]
        of = functools.partial(self.expression, dtype=dtype)
        # shapes that are broadcast would be another product
        if name in ("add", "add_any", "sub") and shapes[0] == shapes[1]:
            return Sum(of(given[0]), of(given[1]), -1 if name == "sub" else 1)
        # rounding to integers is no cast that passes a sum on
        if name == "convert_element_type" and is_real(given[0]) and is_real(out):
            # (the cast of M) x = the cast of (M x), up to rounding
            return self.expression(given[0], dtype or out.aval.dtype)
        if name == "neg":
            return Negative(of(given[0]))
        if name in ("mul", "div"):
            ways = (self._scaled, self._stretched, self._with_gain)
            found = (way(out, eqn, dtype) for way in ways)
            return next((made for made in found if made is not None), None)
        if name == "transpose":
            return Moved(out, of(given[0]), tuple(p["permutation"]))
        if name == "dot_general":
            return Product(out, of(given[0]), of(given[1]), names_of_product(eqn))
        if name in ("concatenate", "stack"):
            # a stack has an axis more than its parts
            axis = p["dimension"] if name == "concatenate" else p["axis"]
            sizes = tuple(shape[axis] for shape in shapes) if name == "concatenate" else ()
            return Joined(out, tuple(map(of, given)), axis, sizes)
        if name in ("slice", "split", "squeeze"):
            cut = self._cut(out, eqn, of(given[0]))
            if cut is not None or name != "squeeze":
                return cut
        if name == "pad" and pads(eqn) and 0 not in shapes[0]:
            return self._padded(out, of(given[0]), eqn)
        if regroups(eqn, out) and 0 not in shapes[0]:
            return Reshaped(out, of(given[0]), shapes[0], out.aval.shape)
        return None

    def _scaled(self, out: Any, eqn: Any, dtype: Any) -> Expression | None:
        """Where one side is a scalar; for a quotient the divisor."""
        factor, other = scalar_and_other(eqn)
        if factor is None:
            return None
        known = self.look(factor)
        if known.made and not known.is_parameter:
            return None  # such as the norm of the weight itself
        of, number = self.expression(other, dtype), Leaf(factor, out.aval.dtype)
        return Scaled(of, number, eqn.primitive.name == "div")

    def _stretched(self, out: Any, eqn: Any, dtype: Any) -> Expression | None:
        """A product with numbers that are the same along some axes: `w * columns`, `u[:, None] * v`."""
        shape = out.aval.shape
        sides = [self.before_repeats(v) for v in eqn.invars]
        first, second = (spread_over(v, axes, shape) for v, axes in sides)
        if eqn.primitive.name != "mul" or 0 in shape:
            return None
        every = tuple(range(len(shape)))
        # u v^T: no axis is summed over
        if first and second and sorted(first + second) == list(every):
            u, v = (self.expression(self._squeezed(v), dtype) for v, _ in sides)
            return Product(out, u, v, (first, second, every))
        for side, along in enumerate((first, second)):
            factor, of = sides[side][0], eqn.invars[1 - side]
            known = self.look(factor)
            # such as the norms of the weight's own columns
            own = known.made and not known.is_parameter
            whole = math.prod(shape[axis] for axis in along) == out.aval.size
            if not (own or whole) and of.aval.shape == shape:
                value = Leaf(self._squeezed(factor), out.aval.dtype)
                return Stretched(out, self.expression(of, dtype), value, along)
        return None

    def _with_gain(self, out: Any, eqn: Any, dtype: Any) -> Expression | None:
        """A quotient by what is made of the kernel itself, of which a gain of columns is a factor."""
        found = gain_of(eqn, self.source, self.look, self.before_repeats)
        if found is None:
            return None
        self._write(([found.equation], found.rest))
        factor = Leaf(self._squeezed(found.gain), out.aval.dtype)
        return Stretched(out, Leaf(found.rest, dtype), factor, found.along)

    def _padded(self, out: Any, kernel: Expression, eqn: Any) -> Expression:
        """Numbers, the kernel and numbers, one after another along every axis that gets some."""
        shape = list(eqn.invars[0].aval.shape)
        for axis, (low, high, _) in enumerate(eqn.params["padding_config"]):
            parts: list[Expression] = []
            sizes: list[int] = []
            for n, part in ((low, None), (shape[axis], kernel), (high, None)):
                if n == 0:
                    continue
                shape[axis] = n
                if part is None:
                    part = Leaf(self._write(filled(tuple(shape), eqn.invars[1])))
                parts.append(part)
                sizes.append(n)
            if len(parts) > 1:
                kernel = Joined(out, tuple(parts), axis, tuple(sizes))
            shape[axis] = sum(sizes)
        return kernel

    def _squeezed(self, v: Any) -> Any:
        return self._write(squeezed(v))  # without axes of length one

    def _cut(self, out: Any, eqn: Any, kernel: Expression) -> Expression | None:
        if out.aval.shape == eqn.invars[0].aval.shape:
            return kernel  # all of it
        cuts = cuts_of(eqn, out)
        try:
            for cut in cuts:
                kernel = sliced(kernel, cut, self._cut_leaf)
        except DoesNotFit:
            # axes of length one that are dropped are a reshape as well
            if eqn.primitive.name != "squeeze":
                raise
            return None
        return kernel if cuts else None

    def _cut_leaf(self, leaf: Leaf, cut: Cut) -> Leaf:
        piece_of_it = self._write(slice_of(leaf.value, cut))
        return dataclasses.replace(leaf, value=piece_of_it)

    def _write(self, written: tuple[list[Any], Any]) -> Any:
        """Notes new equations, and hands out what they make."""
        made, out = written
        for eqn in made:
            given = list(map(self.look, eqn.invars))
            self.note(eqn, given, passed_on(eqn, [x.view for x in given]))
        self.slices += made
        return out

    def _from_outside(self, v: Any, dtype: Any) -> Expression | None:
        """Where an input of a body is a kernel that is made outside."""
        if self.outside is None:
            return None
        values, names, riding = self.outside
        outer = names.get(v, riding.get(v))
        if outer is None or not values.look(outer).is_kernel:
            return None
        kernel = values.expression(outer, dtype)
        if isinstance(kernel, Leaf) and kernel.value is outer:
            return None
        if v in riding:
            # one step sees a slice of every leaf that has the axis
            kernel = sliced(kernel, Cut(0, None, None), functools.partial(self._ridden, v))
        return with_leaves(kernel, self._imported)

    def _ridden(self, v: Any, leaf: Leaf, cut: Cut) -> Leaf:
        # scans go over the first axis
        if cut.axis != 0:
            raise DoesNotFit(v)
        values, _, riding = self._outside()
        known = values.look(leaf.value)
        view = None if known.view is None else known.view.sliced()
        step = functools.partial(piece, Cut(0, 0, None))
        (aval,) = jax.make_jaxpr(step)(leaf.value.aval).out_avals
        same = [inner for inner, outer in riding.items() if outer is leaf.value]
        return self._import(leaf, True, same, aval, known._replace(view=view))

    def _imported(self, leaf: Leaf) -> Leaf:
        """A leaf outside, as an operand of the body."""
        v = leaf.value
        if isinstance(v, jex.Literal) or v in self.known:
            return leaf
        values, names, _ = self._outside()
        same = [inner for inner, outer in names.items() if outer is v]
        return self._import(leaf, False, same, v.aval, values.look(v))

    def _import(
        self, leaf: Leaf, rides: bool, same: Sequence[Any], aval: Any, known: Known
    ) -> Leaf:
        """The operand that there is, or a new one."""
        if same:
            return dataclasses.replace(leaf, value=same[0])
        key = (leaf.value, rides)
        if key not in self.imports:
            self.imports[key] = new = jex.Var(aval)
            self.known[new] = known
        return dataclasses.replace(leaf, value=self.imports[key])

    def _outside(self) -> Outside:
        assert self.outside is not None
        return self.outside
