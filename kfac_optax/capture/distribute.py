"""The traced program with kernels that are made of parameters taken apart.

`x @ (w + a @ b)` becomes `x @ w + (x @ a) @ b`, `x @ concatenate([v, w], 1)` two products, and
`x @ (w / 8)` is `(x / 8) @ w`: the same numbers but for rounding, and in each product a parameter
meets data, so that it is a layer's use. So it is with convolutions and tables, and where the kernel
is made outside a scan, or a part that is recomputed, and meets data inside. A token that stands in
every example beside data is added to zeros of the shape that it has there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.calls import bodies, call_body, scan_body
from kfac_optax.capture.kernel_expression import DoesNotFit, Expression, Leaf, leaves_of
from kfac_optax.capture.kernel_parts import convolution, product
from kfac_optax.capture.kernel_values import Known, Outside, Values, is_real
from kfac_optax.capture.rewriting import renamed, rewritten, scan_with, with_body
from kfac_optax.capture.table_parts import is_lookup, lookup
from kfac_optax.capture.views import View, parameter_views, passed_on, scan_views, views_behind_scan

# equations in which a kernel meets data
_PRODUCTS = ("dot_general", "conv_general_dilated", "gather")
# (values of the leaves of a kernel) -> what the equation computes with it
Multiplied = Callable[..., jax.Array]


def distributed(closed: Any, leaves: int) -> Any:
    """The closed jaxpr with products of data and a kernel that is made of parameters taken apart.

    A kernel that depends on data, or on no parameter, stays. Where nothing changes the jaxpr is
    handed back as it is; what is no longer read is still in it.

    Args:
      closed: its first `leaves` inputs are the parameter leaves.
      leaves: how many.
    """
    views = parameter_views(closed.jaxpr, leaves)
    given = [Known(view, data=view is None, made=view is not None) for view in views]
    new = _Rewriting(closed.jaxpr, given).run()
    return closed if new is closed.jaxpr else jex.ClosedJaxpr(new, closed.consts)


class _Rewriting:
    """The equations of one jaxpr, gone through once."""

    def __init__(self, jaxpr: Any, given: Sequence[Known], outside: Outside | None = None):
        self.jaxpr = jaxpr
        self.values = Values(dict(zip(jaxpr.invars, given, strict=True)), outside)
        self.names: dict[Any, Any] = {}  # of what a call has handed out that is no more
        self.equations: list[Any] = []
        self.changed = False

    def run(self) -> Any:
        """The jaxpr, new if anything has changed; what has come in from outside is behind its inputs."""
        for eqn in self.jaxpr.eqns:
            self._equation(eqn)
        if not self.changed:
            return self.jaxpr
        # values of calls that are written out have other names
        outs = list(map(self._named, self.jaxpr.outvars))
        ins = [*self.jaxpr.invars, *self.values.imports.values()]
        names = self.jaxpr.debug_info.with_unknown_names()
        return self.jaxpr.replace(eqns=self.equations, invars=ins, outvars=outs, debug_info=names)

    def _named(self, v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else self.names.get(v, v)

    def _equation(self, eqn: Any) -> None:
        # what calls handed out is now written by the equations inside them
        eqn = eqn.replace(invars=list(map(self._named, eqn.invars))) if self.names else eqn
        body, given = call_body(eqn), list(map(self.values.look, eqn.invars))
        if body is not None and self._inlines(eqn, body):
            # its equations stand here instead, and its outputs are theirs
            self.changed = True
            inner, outs = renamed(body.jaxpr, eqn.invars)
            for step in inner:
                self._equation(step)
            self.names |= dict(zip(eqn.outvars, map(self._named, outs), strict=True))
            return
        taken: list[Any] | None = None
        if body is not None:
            taken, views = self._call(eqn, body.jaxpr, given)
        elif eqn.primitive.name == "scan":
            taken, views = self._scan(eqn, given)
        else:
            views = passed_on(eqn, [x.view for x in given])
        self.values.note(eqn, given, views)
        # products with kernels, and parameters that no equation of their own shows
        if eqn.primitive.name in _PRODUCTS:
            taken = self._taken_apart(eqn, given)
        if eqn.primitive.name in ("concatenate", "select_n"):
            taken = self._beside_data(eqn, given)
        self.changed = self.changed or taken is not None
        self.equations += [*self.values.slices, *([eqn] if taken is None else taken)]
        self.values.slices.clear()

    def _inlines(self, eqn: Any, body: Any) -> bool:
        """Whether a call makes a kernel, or one made outside meets data inside."""
        given = list(map(self.values.look, eqn.invars))
        if "prevent_cse" in eqn.params or body.consts or not any(x.made for x in given):
            return False
        met = any(x.is_kernel for x in given) and _multiplies(body.jaxpr)
        return met or not any(x.data for x in given)

    def _call(
        self, eqn: Any, inner: Any, given: Sequence[Known]
    ) -> tuple[list[Any] | None, list[View | None]]:
        """A call that stays one, with another body where that has changed; views of its outputs."""
        outside = None
        if "prevent_cse" in eqn.params:
            # recomputed: its operands are as many as its body asks for
            outside = Outside(self.values, _variables(zip(inner.invars, eqn.invars)), {})
        rewriting = _Rewriting(inner, given, outside)
        new, views = rewriting.run(), rewriting.views()
        if new is inner:
            return None, views
        brought = [outer for outer, _ in rewriting.values.imports]
        return [with_body(eqn.replace(invars=[*eqn.invars, *brought]), new)], views

    def views(self) -> list[View | None]:
        """Of what the jaxpr hands out."""
        return [self.values.look(self._named(v)).view for v in self.jaxpr.outvars]

    def _scan(self, eqn: Any, given: Sequence[Known]) -> tuple[list[Any] | None, list[View | None]]:
        closed, constants, carried = scan_body(eqn)
        views = scan_views(eqn, [x.view for x in given])
        inside = [x._replace(view=view) for x, view in zip(given, views.inside, strict=True)]
        # an earlier step may have written anything into a carry that is not just handed on
        data, made = any(x.data for x in given), any(x.made for x in given)
        for i, keep in enumerate(views.kept, constants):
            inside[i] = inside[i] if keep else Known(None, data, made)
        pairs = list(zip(closed.jaxpr.invars, eqn.invars, strict=True))
        first = constants + carried
        same = pairs[:constants]
        same += [pair for pair, keep in zip(pairs[constants:first], views.kept) if keep]
        outside = Outside(self.values, _variables(same), _variables(pairs[first:]))
        rewriting = _Rewriting(closed.jaxpr, inside, None if closed.consts else outside)
        new, outs = rewriting.run(), views_behind_scan(eqn, views, rewriting.views())
        if new is closed.jaxpr:
            return None, outs
        if not rewriting.values.imports:
            return [with_body(eqn, new)], outs
        equations, names = scan_with(eqn, new, list(rewriting.values.imports))
        self.names |= names
        return equations, outs

    def _taken_apart(self, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
        """What computes a product of data and a kernel; `None` where it stays as it is."""
        for side, multiply in _ways(eqn):
            if not given[1 - side].data or not given[side].is_kernel:
                continue
            self.values.whole.clear()
            # what turns out not to come apart is tried as a whole: fewer values every time
            while True:
                try:
                    return self._with_kernel(eqn, side, multiply)
                except DoesNotFit as problem:
                    self.values.whole.add(problem.args[0])
        return None

    def _with_kernel(self, eqn: Any, side: int, multiply: Multiplied) -> list[Any] | None:
        kernel = self.values.expression(eqn.invars[side])
        # each value once; literals are told apart by what they are in the program too
        leaves = list({id(x.value): x.value for x in leaves_of(kernel)}.values())
        # the operand itself, or no parameter in it: there is nothing to take apart
        itself = isinstance(kernel, Leaf) and kernel.value is eqn.invars[side]
        if itself or not any(self.values.look(v).is_parameter for v in leaves):
            return None
        function = functools.partial(_multiplied, eqn, multiply, kernel, leaves)
        operands = [eqn.invars[1 - side], *leaves]
        return rewritten(function, operands, eqn.outvars[0], eqn.source_info)

    def _beside_data(self, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
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
        view = self.values.look(v).view
        if view is None or not view.complete or not is_real(v):
            return False
        axes = zip(view.axes, v.aval.shape, strict=True)
        # an axis that no axis of the parameter is, of more than one row
        return any(axis is None and n > 1 for axis, n in axes)


def _variables(pairs: Iterator[tuple[Any, Any]] | Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """From inputs of a body to values outside."""
    return {inner: outer for inner, outer in pairs if not isinstance(outer, jex.Literal)}


def _multiplies(jaxpr: Any) -> bool:
    """Whether a kernel may meet data in a jaxpr, or in what it contains."""
    inside = (getattr(body, "jaxpr", body) for eqn in jaxpr.eqns for body in bodies(eqn))
    return any(eqn.primitive.name in _PRODUCTS for eqn in jaxpr.eqns) or any(
        map(_multiplies, inside)
    )


def _ways(eqn: Any) -> Iterator[tuple[int, Multiplied]]:
    """Operands of an equation that may be a kernel, and what computes it with the kernel's parts."""
    name, p = eqn.primitive.name, eqn.params
    # a placement of the output is that of one product; integers and flags are linear in nothing
    if name == "dot_general" and p.get("out_sharding") is None and all(map(is_real, eqn.invars)):
        yield 0, functools.partial(product, eqn, 0)
        yield 1, functools.partial(product, eqn, 1)
    if name == "conv_general_dilated" and p["batch_group_count"] == 1:
        yield 1, functools.partial(convolution, eqn)
    if name == "gather" and is_lookup(eqn) and is_real(eqn.invars[0]):
        yield 0, functools.partial(lookup, eqn)


def _multiplied(
    eqn: Any,
    multiply: Multiplied,
    kernel: Expression,
    leaves: Sequence[Any],
    x: jax.Array,
    *values: jax.Array,
) -> jax.Array:
    out = multiply(kernel, x, dict(zip(map(id, leaves), values, strict=True)))
    return out.astype(eqn.outvars[0].aval.dtype)


def _shifted_zeros(axis: int | None, rows: jax.Array, token: jax.Array) -> jax.Array:
    """The token, added to zeros that have their examples where `rows` have theirs."""
    # along the axis of concatenation one row tells where the examples are
    one = rows if axis is None else jax.lax.slice_in_dim(rows, 0, 1, axis=axis)
    one = jnp.broadcast_to(one, token.shape).astype(token.dtype)
    never = jnp.zeros(token.shape, bool)
    return jax.lax.select(never, one, jnp.zeros_like(token)) + token
