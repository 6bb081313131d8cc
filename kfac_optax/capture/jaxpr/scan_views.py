"""Parameters that a scan goes over, or has in every step: what one step sees, and all together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kfac_optax.capture.jaxpr.calls import scan_body
from kfac_optax.capture.jaxpr.views import View


class ScanViews(NamedTuple):
    """What one step of a scan sees, and which of its carries every step hands on untouched."""

    inside: list[View | None]
    kept: list[bool]
    spent: list[View | None]  # parameters that the carry starts from and then changes
    riding: set[int]  # leaves that the scan goes over


def scan_views(eqn: Any, inputs: Sequence[View | None]) -> ScanViews:
    """Views of the inputs of a scan's body."""
    closed, constants, carried = scan_body(eqn)
    body, first = closed.jaxpr, constants + carried
    # a carry that every step hands on untouched is a constant of the scan
    kept = [body.outvars[i] is body.invars[constants + i] for i in range(carried)]
    starts = list(zip(inputs[constants:first], kept, strict=True))
    carry = [view if keep else None for view, keep in starts]
    spent = [view for view, keep in starts if not keep]
    slices: list[View | None] = []
    riding = set()
    for view in inputs[first:]:
        one = None if view is None else view.sliced()
        slices.append(one)
        # of what is repeated along the scan every step has all
        if view and one and one.depth > view.depth:
            riding.add(one.leaf)
    inside = [*inputs[:constants], *carry, *slices]
    return ScanViews(inside, kept, spent, riding)


def views_behind_scan(
    eqn: Any,
    given: ScanViews,
    outs: Sequence[View | None],
) -> list[View | None]:
    """Views of the outputs of a scan: of a parameter that is scanned over, all slices are the
    parameter again (a residual of an inner derivative, say).
    """
    _, constants, carried = scan_body(eqn)
    # a carry that is handed on is what it was at the start
    carried_in = given.inside[constants : constants + carried]
    pairs = zip(carried_in, given.kept, strict=True)
    carry = [view if keep else None for view, keep in pairs]
    length = eqn.params["length"]

    def stacked(view: View | None) -> View | None:
        if view is None:
            return None
        if view.leaf in given.riding:
            return view.stacked(length)
        return view._replace(axes=(None, *view.axes))

    return [*carry, *map(stacked, outs[carried:])]
