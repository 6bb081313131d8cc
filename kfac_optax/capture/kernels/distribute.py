"""The traced program with kernels that are made of parameters taken apart.

`x @ (w + a @ b)` becomes `x @ w + (x @ a) @ b`, `x @ concatenate([v, w], 1)` two products, and
`x @ (w / 8)` is `(x / 8) @ w`: the same numbers but for rounding, and in each product a parameter
meets data, so that it is a layer's use. So it is with convolutions and tables, and where the kernel
is made outside a scan, or a part that is recomputed, and meets data inside. A token that stands in
every example beside data is added to zeros of the shape that it has there.
"""

from collections.abc import Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import call_body, scan_body
from kfac_optax.capture.jaxpr.code_lines import written_out
from kfac_optax.capture.jaxpr.rewriting import renamed, rewritten, scan_with, with_body
from kfac_optax.capture.jaxpr.scan_views import scan_views, views_behind_scan
from kfac_optax.capture.jaxpr.views import View, parameter_views, passed_on
from kfac_optax.capture.kernels.added_parts import (
    added_apart,
    beside_data,
    meets_by_parts,
    scaled_after,
)
from kfac_optax.capture.kernels.equations import slice_of
from kfac_optax.capture.kernels.kept_calls import Written, with_calls
from kfac_optax.capture.kernels.known import Known
from kfac_optax.capture.kernels.slices import Cut
from kfac_optax.capture.kernels.taken_apart import taken_apart
from kfac_optax.capture.kernels.uses import PRODUCTS, multiplies
from kfac_optax.capture.kernels.values import Outside, Values


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
    given = []
    # what is no parameter is data
    for view in parameter_views(closed.jaxpr, leaves):
        data = view is None
        given.append(Known(view, data=data, made=not data))
    new = _Rewriting(closed.jaxpr, given, tapped).run()
    if new is closed.jaxpr:
        return closed
    return jex.ClosedJaxpr(new, closed.consts)


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
        known = dict(zip(jaxpr.invars, given, strict=True))
        self.values = Values(known, outside)
        self.names: dict[Any, Any] = {}  # of what a call has handed out that is no more
        self.equations: list[Any] = []
        self.written: list[Written] = []  # calls that are no more
        self.changes = 0

    def run(self) -> Any:
        """The jaxpr, new if anything has changed; what has come in from outside is behind its inputs."""
        for eqn in self.jaxpr.eqns:
            self._equation(eqn)
        # calls alone, of which nothing came apart, are no change
        if not self.changes:
            return self.jaxpr
        # values of calls that are written out have other names
        outs = list(map(self._named, self.jaxpr.outvars))
        equations = with_calls(self.equations, outs, self.written)
        ins = [*self.jaxpr.invars, *self.values.imports.values()]
        names = self.jaxpr.debug_info.with_unknown_names()
        return self.jaxpr.replace(
            eqns=equations,
            invars=ins,
            outvars=outs,
            debug_info=names,
        )

    def _named(self, v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else self.names.get(v, v)

    def _equation(self, eqn: Any) -> None:
        # what calls handed out is now written by the equations inside them
        if self.names:
            eqn = eqn.replace(invars=list(map(self._named, eqn.invars)))
        given = list(map(self.values.look, eqn.invars))
        name = eqn.primitive.name
        body = call_body(eqn)
        if body is not None and self._inlines(eqn, body):
            self._inlined(eqn, body)
            return
        if name == "scan" and self._goes_over_joined(eqn):
            self._unrolled(eqn)
            return
        taken: list[Any] | None = None
        # what stands in place of the equation, and which parameters its outputs are
        if body is not None:
            taken, views = self._call(eqn, body.jaxpr, given)
        elif name == "scan":
            taken, views = self._scan(eqn, given)
        else:
            views = passed_on(eqn, [x.view for x in given])
        self.values.note(eqn, given, views)
        if body is None and name != "scan":
            taken = self._in_place_of(eqn, given)
        self.changes += taken is not None
        # slices of attempts that came to nothing are nobody's
        if taken is None:
            self.equations.append(eqn)
        else:
            self.equations += [*self.values.slices, *taken]
        self.values.slices.clear()

    def _in_place_of(self, eqn: Any, given: Sequence[Known]) -> list[Any] | None:
        """Equations in place of one that is no call; `None` where it stays."""
        name = eqn.primitive.name
        # products with kernels, and parameters that no equation of their own shows
        if name in PRODUCTS:
            taken = taken_apart(self.values, eqn, given)
            if taken is not None:
                # where a sum's parts are, for a bias that is joined as they are
                self.values.source[eqn.outvars[0]] = taken[-1]
            return taken
        if name in ("concatenate", "select_n"):
            return beside_data(self.values, eqn, given)
        taken = None
        if name in ("add", "sub", "mul", "div"):
            taken = meets_by_parts(self.values, eqn, given)
        if name in ("add", "sub") and taken is None:
            taken = added_apart(self.values, eqn, given)
        if name == "mul" and taken is None:
            taken = scaled_after(self.values, eqn, self.tapped)
        return taken

    def _inlined(self, eqn: Any, body: Any) -> None:
        """The equations of a call stand in its place, and its outputs are theirs."""
        start, changes, calls = len(self.equations), self.changes, len(self.written)
        inner, outs = renamed(body.jaxpr, eqn.invars)
        # they may be calls again, or products that come apart
        self._equations(written_out(inner, eqn, body.jaxpr))
        named = list(map(self._named, outs))
        self.names |= dict(zip(eqn.outvars, named, strict=True))
        # in front of the calls inside it
        apart = self.changes > changes
        self.written.insert(calls, Written(eqn, named, start, len(self.equations), apart))

    def _inlines(self, eqn: Any, body: Any) -> bool:
        """Whether a call makes a kernel, or one made outside meets data inside."""
        given = list(map(self.values.look, eqn.invars))
        # what is recomputed, as the user asked, stays one call
        stays = "prevent_cse" in eqn.params or body.consts
        if stays or not any(x.made for x in given):
            return False
        if not any(x.data for x in given):
            return True
        return any(x.is_kernel for x in given) and multiplies(body.jaxpr)

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
            operands = _variables(zip(inner.invars, eqn.invars))
            outside = Outside(self.values, operands, {})
        rewriting = _Rewriting(inner, given, self.tapped, outside)
        new = rewriting.run()
        views = rewriting.views()
        if new is inner:
            return None, views
        # values from outside that its body asks for
        brought = [outer for outer, _ in rewriting.values.imports]
        call = eqn.replace(invars=[*eqn.invars, *brought])
        return [with_body(call, new)], views

    def views(self) -> list[View | None]:
        """Of what the jaxpr hands out."""
        outs = map(self._named, self.jaxpr.outvars)
        return [self.values.look(v).view for v in outs]

    def _scan(
        self,
        eqn: Any,
        given: Sequence[Known],
    ) -> tuple[list[Any] | None, list[View | None]]:
        closed, constants, _ = scan_body(eqn)
        views = scan_views(eqn, [x.view for x in given])
        seen = zip(given, views.inside, strict=True)
        inside = [x._replace(view=view) for x, view in seen]
        # an earlier step may have written anything into a carry that is not just handed on
        data = any(x.data for x in given)
        made = any(x.made for x in given)
        for i, keep in enumerate(views.kept, constants):
            if not keep:
                inside[i] = Known(None, data, made)
        # a body with constants is left as it is inside
        reached = None if closed.consts else self._around(eqn, views.kept)
        rewriting = _Rewriting(closed.jaxpr, inside, self.tapped, reached)
        new = rewriting.run()
        outs = views_behind_scan(eqn, views, rewriting.views())
        if new is closed.jaxpr:
            return None, outs
        imports = list(rewriting.values.imports)
        if not imports:
            return [with_body(eqn, new)], outs
        equations, names = scan_with(eqn, new, imports)
        self.names |= names
        return equations, outs

    def _around(self, eqn: Any, kept: Sequence[bool]) -> Outside:
        """What the body of a scan can reach outside: values that are the same in every step, and
        those of which it has slices.
        """
        closed, constants, carried = scan_body(eqn)
        first = constants + carried
        pairs = list(zip(closed.jaxpr.invars, eqn.invars, strict=True))
        # of the carry what every step hands on untouched
        carry = zip(pairs[constants:first], kept)
        same = pairs[:constants] + [pair for pair, keep in carry if keep]
        return Outside(self.values, _variables(same), _variables(pairs[first:]))

    def _goes_over_joined(self, eqn: Any) -> bool:
        """Whether the layers of a scan are stored apart, so that every step has other parameters."""
        closed, constants, carried = scan_body(eqn)
        if closed.consts or not eqn.params["length"] or not multiplies(closed.jaxpr):
            return False
        over = eqn.invars[constants + carried :]
        kernels = [v for v in over if self.values.look(v).is_kernel]
        return any(map(self.values.is_joined_of_steps, kernels))

    def _unrolled(self, eqn: Any) -> None:
        """The equations of all steps of a scan, one after another."""
        self.changes += 1
        closed, constants, carried = scan_body(eqn)
        first = constants + carried
        fixed = eqn.invars[:constants]
        carry = eqn.invars[constants:first]
        over = eqn.invars[first:]
        order = range(eqn.params["length"])
        steps: list[list[Any]] = [[] for _ in order]
        for i in reversed(order) if eqn.params["reverse"] else order:
            slices = [self._slice(v, i) for v in over]
            inner, outs = renamed(closed.jaxpr, [*fixed, *carry, *slices])
            self._equations(inner)
            # what one step hands on is what the next starts from
            outs = list(map(self._named, outs))
            carry, steps[i] = outs[:carried], outs[carried:]
        self.names |= dict(zip(eqn.outvars[:carried], carry, strict=True))
        # [steps, ...] of what each hands out
        results = eqn.outvars[carried:]
        for out, parts in zip(results, zip(*steps, strict=True), strict=True):
            if not isinstance(out, jex.DropVar):
                self._equations(rewritten(_stacked, parts, out, eqn.source_info))

    def _slice(self, v: Any, step: int) -> Any:
        """What one step of a scan sees of a value that it goes over."""
        equations, one = slice_of(v, Cut(0, step, None))
        self._equations(equations)
        return one

    def _equations(self, equations: Sequence[Any]) -> None:
        for eqn in equations:
            self._equation(eqn)


def _variables(pairs: Iterator[tuple[Any, Any]] | Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """From inputs of a body to values outside."""
    return {inner: outer for inner, outer in pairs if not isinstance(outer, jex.Literal)}


def _stacked(*parts: jax.Array) -> jax.Array:
    return jnp.stack(parts)
