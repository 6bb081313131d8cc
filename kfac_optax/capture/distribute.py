"""The traced program with kernels that are made of parameters taken apart.

`x @ (w + a @ b)` becomes `x @ w + (x @ a) @ b`, `x @ concatenate([v, w], 1)` two products, and
`x @ (w / 8)` is `(x / 8) @ w`: the same numbers but for rounding, and in each product a parameter
meets data, so that it is a layer's use. A token that stands in every example beside data is added to
zeros of the shape that it has there.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.calls import call_body, scan_body
from kfac_optax.capture.example_axis import axes_of_product
from kfac_optax.capture.kernel_parts import (
    DoesNotFit,
    Expression,
    Joined,
    Leaf,
    Moved,
    Multiply,
    Names,
    Negative,
    Product,
    Reshaped,
    Scaled,
    Sum,
)
from kfac_optax.capture.rewriting import renamed, rewritten, with_body
from kfac_optax.capture.views import View, parameter_views, passed_on, scan_views, views_behind_scan


def distributed(closed: Any, leaves: int) -> Any:
    """The closed jaxpr with products of data and a kernel that is made of parameters taken apart.

    A kernel that depends on data, or on no parameter, stays. Where nothing changes the jaxpr is
    handed back as it is; what is no longer read is still in it.

    Args:
      closed: its first `leaves` inputs are the parameter leaves.
      leaves: how many.
    """
    views = parameter_views(closed.jaxpr, leaves)
    given = [_Known(view, data=view is None, made=view is not None) for view in views]
    new = _Rewriting(closed.jaxpr, given).run()
    return closed if new is closed.jaxpr else jex.ClosedJaxpr(new, closed.consts)


class _Known(NamedTuple):
    """What is known of a value."""

    view: View | None = None
    data: bool = False  # it depends on what is no parameter
    made: bool = False  # it depends on a parameter

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, seen through casts and transposes: a layer's kernel already."""
        return self.view is not None and self.view.complete

    @property
    def is_kernel(self) -> bool:
        """Whether it is made of parameters, and of parameters only, but is none."""
        return self.made and not self.data and not self.is_parameter


class _Rewriting:
    """What is known of the values of one jaxpr while its equations are gone through."""

    def __init__(self, jaxpr: Any, given: Sequence[_Known]):
        self.jaxpr = jaxpr
        self.known = dict(zip(jaxpr.invars, given, strict=True))
        self.source: dict[Any, Any] = {}  # equations that write values, by value
        self.names: dict[Any, Any] = {}  # of what a call has handed out that is no more
        self.equations: list[Any] = []
        self.changed = False
        self.whole: set[Any] = set()  # values that do not come apart in a product

    def run(self) -> Any:
        """The jaxpr, new if anything has changed."""
        for eqn in self.jaxpr.eqns:
            self._equation(eqn)
        if not self.changed:
            return self.jaxpr
        # values of calls that are written out have other names
        outs = list(map(self._named, self.jaxpr.outvars))
        return self.jaxpr.replace(eqns=self.equations, outvars=outs)

    def _named(self, v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else self.names.get(v, v)

    def _look(self, v: Any) -> _Known:
        return _Known() if isinstance(v, jex.Literal) else self.known.get(v, _Known())

    def _equation(self, eqn: Any) -> None:
        # what calls handed out is now written by the equations inside them
        eqn = eqn.replace(invars=list(map(self._named, eqn.invars))) if self.names else eqn
        body = call_body(eqn)
        if body is not None and self._inlines(eqn, body):
            # its equations stand here instead, and its outputs are theirs
            self.changed = True
            inner, outs = renamed(body.jaxpr, eqn.invars)
            for step in inner:
                self._equation(step)
            self.names |= dict(zip(eqn.outvars, map(self._named, outs), strict=True))
            return
        given = list(map(self._look, eqn.invars))
        if body is not None:
            eqn, views = self._entered(eqn, body.jaxpr, given)
        elif eqn.primitive.name == "scan":
            eqn, views = self._scan(eqn, given)
        else:
            views = passed_on(eqn, [x.view for x in given]) or [None] * len(eqn.outvars)
        data, made = any(x.data for x in given), any(x.made for x in given)
        for v, view in zip(eqn.outvars, views, strict=True):
            self.known[v], self.source[v] = _Known(view, data, made), eqn
        # products with kernels, and parameters that no equation of their own shows
        taken = self._taken_apart(eqn, given) if eqn.primitive.name == "dot_general" else None
        if eqn.primitive.name in ("concatenate", "select_n"):
            taken = self._beside_data(eqn, given)
        self.changed = self.changed or taken is not None
        self.equations += [eqn] if taken is None else taken

    def _inlines(self, eqn: Any, body: Any) -> bool:
        """Whether a call makes a kernel, or one made outside meets data inside."""
        given = list(map(self._look, eqn.invars))
        if "prevent_cse" in eqn.params or body.consts or not any(x.made for x in given):
            return False
        names = {inner.primitive.name for inner in body.jaxpr.eqns}
        met = "dot_general" in names and any(x.is_kernel for x in given)
        return met or not any(x.data for x in given)

    def _entered(self, eqn: Any, inner: Any, given: Sequence[_Known]) -> tuple[Any, list[Any]]:
        """The call or scan with its body rewritten, and the views of what that hands out."""
        rewriting = _Rewriting(inner, given)
        new = rewriting.run()
        views = [rewriting._look(rewriting._named(v)).view for v in inner.outvars]
        self.changed = self.changed or new is not inner
        return (eqn if new is inner else with_body(eqn, new)), views

    def _scan(self, eqn: Any, given: Sequence[_Known]) -> tuple[Any, list[Any]]:
        closed, constants, _ = scan_body(eqn)
        views = scan_views(eqn, [x.view for x in given])
        inside = [x._replace(view=view) for x, view in zip(given, views.inside, strict=True)]
        # an earlier step may have written anything into a carry that is not just handed on
        data, made = any(x.data for x in given), any(x.made for x in given)
        for i, keep in enumerate(views.kept, constants):
            inside[i] = inside[i] if keep else _Known(None, data, made)
        eqn, outs = self._entered(eqn, closed.jaxpr, inside)
        return eqn, views_behind_scan(eqn, views, outs)

    def _taken_apart(self, eqn: Any, given: Sequence[_Known]) -> list[Any] | None:
        """What computes a product of data and a kernel; `None` where it stays as it is."""
        # a placement of the output is that of one product; integers and flags are linear in nothing
        if eqn.params.get("out_sharding") is not None or not all(map(is_real, eqn.invars)):
            return None
        for side in (0, 1):
            v = eqn.invars[side]
            if not given[1 - side].data or not given[side].is_kernel:
                continue
            self.whole = set()
            # what turns out not to come apart is tried as a whole: fewer values every time
            while True:
                operands: list[Any] = []
                kernel = self._expression(v, operands)
                # one value, or no parameter in it: there is nothing to take apart
                parameters = any(self._look(x).is_parameter for x in operands)
                if isinstance(kernel, Leaf) or not parameters:
                    break
                function = functools.partial(_product_of, eqn, side, kernel)
                values = [eqn.invars[1 - side], *operands]
                try:
                    return rewritten(function, values, eqn.outvars[0], eqn.source_info)
                except DoesNotFit as problem:
                    self.whole.add(problem.args[0].value)
        return None

    def _beside_data(self, eqn: Any, given: Sequence[_Known]) -> list[Any] | None:
        """Parameters repeated along rows and put beside data, or in its place, as shifts of zeros."""
        # without data beside it there is nobody's example axis to take over
        beside = zip(eqn.invars, given, strict=True)
        rows = [v for v, x in beside if x.data and is_real(v) and 0 not in v.aval.shape]
        # a token, or a position, that all examples share
        tokens = [v for v in eqn.invars if rows and self._is_repeated(v)]
        new: dict[Any, Any] = {}
        equations: list[Any] = []
        for v in tokens:
            new[v] = jex.Var(v.aval)
            shift = functools.partial(_shifted_zeros, eqn.params.get("dimension"))
            equations += rewritten(shift, [rows[0], v], new[v], eqn.source_info)
        if not tokens:
            return None
        values = [v if isinstance(v, jex.Literal) else new.get(v, v) for v in eqn.invars]
        return [*equations, eqn.replace(invars=values)]

    def _is_repeated(self, v: Any) -> bool:
        view = self._look(v).view
        if view is None or not view.complete or not is_real(v):
            return False
        axes = zip(view.axes, v.aval.shape, strict=True)
        # an axis that no axis of the parameter is, of more than one row
        return any(axis is None and n > 1 for axis, n in axes)

    def _expression(self, v: Any, operands: list[Any], dtype: Any = None) -> Expression:
        """What a kernel is made of; values that are not taken apart are appended to `operands`."""
        eqn = None if isinstance(v, jex.Literal) else self.source.get(v)
        if eqn is not None and not self._look(v).is_parameter and v not in self.whole:
            made = self._node(eqn, operands, dtype)
            if made is not None:
                return made
        # a value as it is: a parameter, or what does not come apart
        return _leaf(v, operands, dtype)

    def _node(self, eqn: Any, operands: list[Any], dtype: Any) -> Expression | None:
        p, name, given, out = eqn.params, eqn.primitive.name, eqn.invars, eqn.outvars[0]
        shapes = [v.aval.shape for v in given]
        of = functools.partial(self._expression, operands=operands, dtype=dtype)
        # shapes that are broadcast would be another product
        if name in ("add", "add_any", "sub") and shapes[0] == shapes[1]:
            return Sum(of(given[0]), of(given[1]), -1 if name == "sub" else 1)
        # rounding to integers is no cast that passes a sum on
        if name == "convert_element_type" and is_real(given[0]) and is_real(out):
            # (the cast of M) x = the cast of (M x), up to rounding
            return self._expression(given[0], operands, dtype or out.aval.dtype)
        if name == "neg":
            return Negative(of(given[0]))
        # one side is a scalar, for a quotient the divisor
        if name in ("mul", "div") and () in (shapes[1], shapes[0] if name == "mul" else None):
            scalar = 1 if shapes[1] == () else 0
            known = self._look(given[scalar])
            if known.made and not known.is_parameter:
                return None  # such as the norm of the weight itself
            factor = _leaf(given[scalar], operands, out.aval.dtype)
            return Scaled(of(given[1 - scalar]), factor, name == "div")
        if name == "transpose":
            return Moved(of(given[0]), tuple(p["permutation"]))
        if name == "dot_general":
            return Product(of(given[0]), of(given[1]), _names_of_product(eqn))
        if name in ("concatenate", "stack"):
            # a stack has an axis more than its parts
            axis = p["dimension"] if name == "concatenate" else p["axis"]
            sizes = tuple(shape[axis] for shape in shapes) if name == "concatenate" else ()
            return Joined(tuple(map(of, given)), axis, sizes)
        if name in ("reshape", "squeeze", "expand_dims") and 0 not in shapes[0]:
            return Reshaped(out, of(given[0]), shapes[0], out.aval.shape)
        return None


def _leaf(v: Any, operands: list[Any], dtype: Any) -> Leaf:
    """A value as one more operand."""
    operands.append(v)
    return Leaf(len(operands) - 1, dtype)


def is_real(v: Any) -> bool:
    """Whether a value is of floating point."""
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _shifted_zeros(axis: int | None, rows: jax.Array, token: jax.Array) -> jax.Array:
    """The token, added to zeros that have their examples where `rows` have theirs."""
    # along the axis of concatenation one row tells where the examples are
    one = rows if axis is None else jax.lax.slice_in_dim(rows, 0, 1, axis=axis)
    one = jnp.broadcast_to(one, token.shape).astype(token.dtype)
    never = jnp.zeros(token.shape, bool)
    return jax.lax.select(never, one, jnp.zeros_like(token)) + token


def _names_of_product(eqn: Any) -> tuple[Names, Names, Names]:
    """Names of the axes of both operands of a `dot_general`, and of its output."""
    (summed, _), places = eqn.params["dimension_numbers"], axes_of_product(eqn)
    # names of the output's axes are their numbers; those summed over come behind
    rank = eqn.outvars[0].aval.ndim
    sides = []
    for side in (0, 1):
        axes = range(eqn.invars[side].aval.ndim)
        between = {axis: rank + i for i, axis in enumerate(summed[side])}
        sides.append(tuple(places[side].get(axis, between.get(axis, -1)) for axis in axes))
    return sides[0], sides[1], tuple(range(rank))


def _product_of(eqn: Any, side: int, kernel: Expression, x: Any, *operands: Any) -> jax.Array:
    """The product with the kernel on that side of the equation."""
    names, p = _names_of_product(eqn), eqn.params
    options = {key: p[key] for key in ("precision", "preferred_element_type")}

    def einsum(x: jax.Array, of_x: Names, m: jax.Array, of_m: Names, out: Names) -> jax.Array:
        return jnp.einsum(x, of_x, m, of_m, out, **options)

    # new names for what products inside the kernel sum over
    highest = max(itertools.chain(*names), default=0)
    multiply = Multiply(operands, einsum, itertools.count(highest + 1))
    out = multiply(x, names[1 - side], kernel, names[side], names[2])
    return out.astype(eqn.outvars[0].aval.dtype)
