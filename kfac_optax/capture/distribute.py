"""The traced program with kernels that are made of parameters taken apart.

`x @ (w + a @ b)` becomes `x @ w + (x @ a) @ b`, `x @ concatenate([v, w], 1)` two products, and
`x @ (w / 8)` is `(x / 8) @ w`: the same numbers but for rounding, and in each product a parameter
meets data, so that it is a layer's use. So it is with convolutions and tables, and where the kernel
is made outside a scan, or a part that is recomputed, and meets data inside. A token that stands in
every example beside data is added to zeros of the shape that it has there.
"""

import functools
from collections.abc import Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.added_parts import beside_data, meets_by_parts, scaled_after
from kfac_optax.capture.calls import call_body, scan_body
from kfac_optax.capture.kernel_expression import Cut, DoesNotFit, Leaf, leaves_of
from kfac_optax.capture.kernel_uses import PRODUCTS, Multiplied, multiplied, multiplies, ways
from kfac_optax.capture.kernel_values import Known, Outside, Values, slice_of
from kfac_optax.capture.rewriting import renamed, rewritten, scan_with, with_body
from kfac_optax.capture.views import View, parameter_views, passed_on, scan_views, views_behind_scan


def distributed(
    closed: Any,
    leaves: int,
    tapped: Set[int] = frozenset(),
) -> Any:
    """The closed jaxpr with products of data and a kernel that is made of parameters taken apart.

    A kernel that depends on data, or on no parameter, stays. Where nothing changes the jaxpr is
    handed back as it is; what is no longer read is still in it.

    Args:
      closed: its first `leaves` inputs are the parameter leaves.
      leaves: how many.
      tapped: those that a tap sees, whose scales stay as they are.
    """
    views = parameter_views(closed.jaxpr, leaves)
    given = [Known(view, data=view is None, made=view is not None) for view in views]
    new = _Rewriting(closed.jaxpr, given, tapped).run()
    return closed if new is closed.jaxpr else jex.ClosedJaxpr(new, closed.consts)


class _Rewriting:
    """The equations of one jaxpr, gone through once."""

    def __init__(
        self,
        jaxpr: Any,
        given: Sequence[Known],
        tapped: Set[int],
        outside: Outside | None = None,
    ):
        self.jaxpr = jaxpr
        self.tapped = tapped
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
        if eqn.primitive.name == "scan" and self._goes_over_joined(eqn):
            self.changed = True
            self._unrolled(eqn)
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
        if eqn.primitive.name in PRODUCTS:
            taken = self._taken_apart(eqn, given)
        if eqn.primitive.name in ("concatenate", "select_n"):
            taken = beside_data(self.values, eqn, given)
        if eqn.primitive.name in ("add", "sub", "mul", "div"):
            taken = meets_by_parts(self.values, eqn, given)
        if eqn.primitive.name == "mul" and taken is None:
            taken = scaled_after(self.values, eqn, self.tapped)
        # where a sum's parts are, for a bias that is joined as they are
        if eqn.primitive.name in PRODUCTS and taken is not None:
            self.values.source[eqn.outvars[0]] = taken[-1]
        self.changed = self.changed or taken is not None
        # slices of attempts that came to nothing are nobody's
        self.equations += [eqn] if taken is None else [*self.values.slices, *taken]
        self.values.slices.clear()

    def _inlines(self, eqn: Any, body: Any) -> bool:
        """Whether a call makes a kernel, or one made outside meets data inside."""
        given = list(map(self.values.look, eqn.invars))
        if "prevent_cse" in eqn.params or body.consts or not any(x.made for x in given):
            return False
        met = any(x.is_kernel for x in given) and multiplies(body.jaxpr)
        return met or not any(x.data for x in given)

    def _call(
        self,
        eqn: Any,
        inner: Any,
        given: Sequence[Known],
    ) -> tuple[list[Any] | None, list[View | None]]:
        """A call that stays one, with another body where that has changed; views of its outputs."""
        outside = None
        if "prevent_cse" in eqn.params:
            # recomputed: its operands are as many as its body asks for
            outside = Outside(self.values, _variables(zip(inner.invars, eqn.invars)), {})
        rewriting = _Rewriting(inner, given, self.tapped, outside)
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
        # inputs of the body that are values outside in every step, and those that are slices of them
        pairs = list(zip(closed.jaxpr.invars, eqn.invars, strict=True))
        first = constants + carried
        same = pairs[:constants]
        same += [pair for pair, keep in zip(pairs[constants:first], views.kept) if keep]
        outside = Outside(self.values, _variables(same), _variables(pairs[first:]))
        reached = None if closed.consts else outside
        rewriting = _Rewriting(closed.jaxpr, inside, self.tapped, reached)
        new, outs = rewriting.run(), views_behind_scan(eqn, views, rewriting.views())
        if new is closed.jaxpr:
            return None, outs
        if not rewriting.values.imports:
            return [with_body(eqn, new)], outs
        equations, names = scan_with(eqn, new, list(rewriting.values.imports))
        self.names |= names
        return equations, outs

    def _goes_over_joined(self, eqn: Any) -> bool:
        """Whether the layers of a scan are stored apart, so that every step has other parameters."""
        closed, constants, carried = scan_body(eqn)
        if closed.consts or not eqn.params["length"] or not multiplies(closed.jaxpr):
            return False
        for v in eqn.invars[constants + carried :]:
            if self.values.look(v).is_kernel and self.values.is_joined_of_steps(v):
                return True
        return False

    def _unrolled(self, eqn: Any) -> None:
        """The equations of all steps of a scan, one after another."""
        closed, constants, carried = scan_body(eqn)
        length, first = eqn.params["length"], constants + carried
        fixed, carry, over = eqn.invars[:constants], eqn.invars[constants:first], eqn.invars[first:]
        steps: list[list[Any]] = [[] for _ in range(length)]
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            slices = []
            for v in over:
                equations, one = slice_of(v, Cut(0, i, None))
                slices.append(one)
                for made in equations:
                    self._equation(made)
            inner, outs = renamed(closed.jaxpr, [*fixed, *carry, *slices])
            for made in inner:
                self._equation(made)
            # what one step hands on is what the next starts from
            outs = list(map(self._named, outs))
            carry, steps[i] = outs[:carried], outs[carried:]
        self.names |= dict(zip(eqn.outvars[:carried], carry, strict=True))
        # [steps, ...] of what each hands out
        for out, parts in zip(eqn.outvars[carried:], zip(*steps, strict=True), strict=True):
            if not isinstance(out, jex.DropVar):
                for made in rewritten(_stacked, parts, out, eqn.source_info):
                    self._equation(made)

    def _taken_apart(self, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
        """What computes a product of data and a kernel; `None` where it stays as it is."""
        for side, multiply in ways(eqn):
            if not given[1 - side].data or not given[side].is_kernel:
                continue
            self.values.whole.clear()
            # what turns out not to come apart is tried as a whole: fewer values every time
            while True:
                self.values.slices.clear()  # of an attempt that has failed
                try:
                    return self._with_kernel(eqn, side, multiply)
                except DoesNotFit as problem:
                    self.values.whole.add(problem.args[0])
        return None

    def _with_kernel(
        self,
        eqn: Any,
        side: int,
        multiply: Multiplied,
    ) -> list[Any] | None:
        kernel = self.values.expression(eqn.invars[side])
        # each value once; literals are told apart by what they are in the program too
        leaves = list({id(x.value): x.value for x in leaves_of(kernel)}.values())
        # the operand itself, or no parameter in it: there is nothing to take apart
        itself = isinstance(kernel, Leaf) and kernel.value is eqn.invars[side]
        if itself or not any(self.values.look(v).is_parameter for v in leaves):
            return None
        function = functools.partial(multiplied, eqn, multiply, kernel, leaves)
        operands = [eqn.invars[1 - side], *leaves]
        return rewritten(function, operands, eqn.outvars[0], eqn.source_info)


def _variables(pairs: Iterator[tuple[Any, Any]] | Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """From inputs of a body to values outside."""
    return {inner: outer for inner, outer in pairs if not isinstance(outer, jex.Literal)}


def _stacked(*parts: jax.Array) -> jax.Array:
    return jnp.stack(parts)
