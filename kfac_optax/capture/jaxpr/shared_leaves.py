"""Parameters shared out among several sets, followed until one set's part has been cut out."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kfac_optax._types import Part
from kfac_optax.capture.jaxpr.views import View, passed_on


class Owner(NamedTuple):
    """A set of parameters, and the part of a leaf that it has, `None` for all of it."""

    number: int
    part: Part | None = None


class SharedLeaf(NamedTuple):
    """A value that is a parameter, or a box of it, and whose it is."""

    view: View
    owners: tuple[Owner, ...]

    def sliced(self) -> "SharedLeaf":
        """What one step of a scan over it sees."""
        return self._replace(view=self.view.sliced())

    def having_all(self) -> set[int]:
        """Sets that every entry of the value is of."""
        return {owner.number for owner in self.owners if _within(self.view.part, owner.part)}

    def having_some(self) -> set[int]:
        """Sets that some entries may be of, and others not."""
        touching = {x.number for x in self.owners if _touches(self.view.part, x.part)}
        return touching - self.having_all()


def cut_out(eqn: Any, leaves: Sequence[SharedLeaf | None]) -> list[SharedLeaf] | None:
    """What an equation's outputs are, if it does no more than move a shared parameter's numbers;
    else `None`.
    """
    first = leaves[0]
    if first is None:
        return None
    views = passed_on(eqn, [None if leaf is None else leaf.view for leaf in leaves])
    if views is None or None in views:
        return None
    return [first._replace(view=view) for view in views if view is not None]


def _within(inner: Part | None, outer: Part | None) -> bool:
    """Whether a box is in another; `None` is the whole leaf."""
    if outer is None or inner is None:
        return outer is None
    if len(inner.shape) < len(outer.shape):
        # one step of a scan over axes that the other has a part of
        return False
    return all(start <= a and b <= end for a, b, start, end in _ranges(inner, outer))


def _touches(one: Part | None, other: Part | None) -> bool:
    """Whether two boxes may have an entry in common."""
    if one is None or other is None or len(one.shape) < len(other.shape):
        return True
    return all(a < end and start < b for a, b, start, end in _ranges(one, other))


def _ranges(one: Part, other: Part) -> Iterator[tuple[int, int, int, int]]:
    """Where both begin and end, along each axis; parts of layers have no axes of a stack."""
    axes = len(other.shape)
    starts, sizes = one.starts[-axes:], one.sizes[-axes:]
    for a, n, b, m in zip(starts, sizes, other.starts, other.sizes, strict=True):
        yield a, a + n, b, b + m
