"""Values that are a parameter seen through casts, transposes, broadcasts: what each of their axes
is.

The derivative of such a value in the parameter does nothing but move numbers, so where it meets a
row of data in a product, that product is a layer's use.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax._types import Part

# One output per input, values (not shapes) kept or merely rounded: a parameter stays the same
# parameter.
_TRANSPARENT = frozenset(
    [
        "convert_element_type",
        "copy",
        "copy_p",
        "optimization_barrier",
        "sharding_constraint",
        "layout_constraint",
        "mesh_cast",
        "reshard",
        "pvary",
        "pcast",
        "reduce_precision",
        "name",
    ]
)
_RESHAPING = frozenset(["reshape", "squeeze", "expand_dims"])


class View(NamedTuple):
    """Which parameter leaf a value is, and how.

    Attributes:
      leaf: number of the leaf.
      stored: shape of the leaf without the axes already taken by scans; of its part, without the
        axes of which that has one number.
      axes: for each axis of the value the stored axis it is, `None` for one along which the value
        is repeated.
      depth: leading axes already taken by scans.
      known: once sliced or merged the axes are no longer known: not a layer's parameter, but still
        worth naming its consumer.
      part: what has been cut out of the leaf, `None` for all of it.
      own: for each stored axis that of the part.
    """

    leaf: int
    stored: tuple[int, ...]
    axes: tuple[int | None, ...]
    depth: int = 0
    known: bool = True
    part: Part | None = None
    own: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every stored axis is there, and nothing else."""
        given = sorted(axis for axis in self.axes if axis is not None)
        everything = list(range(len(self.stored)))
        as_many = len(self.axes) == len(everything)
        return self.known and given == everything and as_many

    @property
    def complete(self) -> bool:
        """Whether every number of the leaf is there; only axes of length one may be missing."""
        missing = [n for i, n in enumerate(self.stored) if i not in self.axes]
        return self.known and all(n == 1 for n in missing)

    @property
    def permutation(self) -> tuple[int, ...]:
        """Stored axes (from the end) of the trailing axes of a whole view; `()` if none has moved."""
        n = len(self.axes)
        # axes from the end, those that are in place left out
        now = [axis - n for axis in self.axes if axis is not None]
        while now and now[0] == -len(now):
            del now[0]
        return tuple(now)

    def lost(self) -> "View":
        """The same parameter, its axes no longer known."""
        return self._replace(known=False)

    def sliced(self) -> "View":
        """What one step of a scan over it sees; unknown where its first axis is not the first
        stored, but one of others.
        """
        if self.known and self.axes[:1] == (None,):
            # repeated along the scan: every step sees all of it
            return self._replace(axes=self.axes[1:])
        inside = self._replace(stored=self.stored[1:], depth=self.depth + 1)
        first = self.axes[:1] == (0,)
        if not self.known or not first or not self._has_all_of_the_first():
            return inside.lost()
        # the part of one step
        if self.part is not None:
            part = Part(*(sizes[1:] for sizes in self.part))
            own = tuple(axis - 1 for axis in self.own[1:])
            inside = inside._replace(part=part, own=own)
        axes = _moved(self.axes[1:], -1)
        return inside._replace(axes=axes)

    def _has_all_of_the_first(self) -> bool:
        part = self.part
        if part is None:
            return True
        return self.own[0] == 0 and part.sizes[0] == part.shape[0]

    def stacked(self, length: int) -> "View":
        """All steps of a scan, where each hands out what it has seen."""
        outside = self._replace(stored=(length, *self.stored), depth=self.depth - 1)
        # the scan's axis in front
        axes = (0, *_moved(self.axes, 1))
        if self.part is not None:
            shape, starts, sizes = self.part
            part = Part((length, *shape), (0, *starts), (length, *sizes))
            own = (0, *(axis + 1 for axis in self.own))
            outside = outside._replace(part=part, own=own)
        return outside._replace(axes=axes) if self.known else outside.lost()

    def cut(self, starts: Sequence[int], sizes: Sequence[int]) -> "View":
        """A box of the value."""
        # the whole leaf is a part of itself
        part = self.part
        own: Sequence[int] = self.own
        if part is None:
            own = range(len(self.stored))
            part = Part(self.stored, (0,) * len(self.stored), self.stored)
        first = list(part.starts)
        size = list(part.sizes)
        stored = list(self.stored)
        for axis, start, n in zip(self.axes, starts, sizes, strict=True):
            if axis is not None and n != stored[axis]:
                # boxes of boxes are boxes
                first[own[axis]] += start
                size[own[axis]] = stored[axis] = n
        if tuple(stored) == self.stored:
            return self
        part = Part(part.shape, tuple(first), tuple(size))
        return self._replace(stored=tuple(stored), part=part, own=tuple(own))

    def without_single_numbers(self) -> "View":
        """Without stored axes of the part that have one number there and are no axis of the value."""
        if self.part is None or not self.known:
            return self
        # of length one in the leaf itself: it stays an axis
        whole = [self.part.shape[axis] for axis in self.own]
        stays = [n > 1 or whole[i] == 1 for i, n in enumerate(self.stored)]
        kept = [i for i, stay in enumerate(stays) if stay or i in self.axes]
        axes = [None if axis is None else kept.index(axis) for axis in self.axes]
        return self._replace(
            stored=tuple(self.stored[i] for i in kept),
            axes=tuple(axes),
            own=tuple(self.own[i] for i in kept),
        )


def _moved(axes: Sequence[int | None], by: int) -> tuple[int | None, ...]:
    """The same axes of what has some more in front, or less."""
    return tuple(None if axis is None else axis + by for axis in axes)


def of_parameter(leaf: int, shape: Sequence[int]) -> View:
    """The leaf as stored."""
    return View(leaf, tuple(shape), tuple(range(len(shape))))


def passed_on(eqn: Any, views: Sequence[View | None]) -> list[View | None] | None:
    """The views that an equation's outputs are, if it does no more than move a parameter's numbers;
    else `None`.

    `1 + scale` is one: its derivative in the parameter is the same.
    """
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    if not any(views):
        return None
    if name in _TRANSPARENT:
        kept = jnp.issubdtype(out.dtype, jnp.inexact)
        return list(views[: len(eqn.outvars)]) if kept else None
    if name in ("add", "add_any", "sub"):
        view = _shifted(eqn, views)
    # several operands, or a parameter behind another
    elif views[0] is None or any(views[1:]):
        return None
    elif name == "transpose":
        order = eqn.params["permutation"]
        axes = tuple(views[0].axes[i] for i in order)
        view = views[0]._replace(axes=axes)
    elif name == "broadcast_in_dim":
        view = _broadcast(views[0], eqn)
    elif name == "slice":
        view = _sliced(views[0], eqn.params)
    elif name == "split":
        return _split(views[0], eqn)
    elif name in _RESHAPING or _sums_nothing(eqn):
        before = eqn.invars[0].aval.shape
        view = _reshaped(views[0], before, out.shape)
    else:
        return None
    return None if view is None else [view]


def _sums_nothing(eqn: Any) -> bool:
    """Whether a sum is over axes of length one, as an einsum makes of an axis that nothing else has."""
    if eqn.primitive.name != "reduce_sum":
        return False
    shape = eqn.invars[0].aval.shape
    return all(shape[axis] == 1 for axis in eqn.params["axes"])


def _shifted(eqn: Any, views: Sequence[View | None]) -> View | None:
    """A parameter plus or minus a number; with data it would be the shift of a layer."""
    first, second = views
    view = first if eqn.primitive.name == "sub" else first or second
    number = any(isinstance(v, jex.Literal) for v in eqn.invars)
    return view if number else None


def _broadcast(view: View, eqn: Any) -> View:
    before = eqn.invars[0].aval.shape
    shape = eqn.outvars[0].aval.shape
    axes: list[int | None] = [None] * len(shape)
    for old, new in enumerate(eqn.params["broadcast_dimensions"]):
        # of length one, repeated: no axis of the parameter any more
        if before[old] == shape[new]:
            axes[new] = view.axes[old]
    return view._replace(axes=tuple(axes))


def _sliced(view: View, params: dict[str, Any]) -> View:
    starts, ends = params["start_indices"], params["limit_indices"]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    strides = params["strides"]
    # strides are no box
    dense = strides is None or set(strides) == {1}
    if not view.known or not dense:
        return view._replace(axes=(None,) * len(sizes)).lost()
    return view.cut(starts, sizes)


def _split(view: View, eqn: Any) -> list[View | None]:
    if not view.known:
        return [view] * len(eqn.outvars)
    axis = eqn.params["axis"]
    starts = [0] * len(view.axes)
    views: list[View | None] = []
    for v in eqn.outvars:
        sizes = v.aval.shape
        views.append(view.cut(starts, sizes))
        # one piece behind another
        starts[axis] += sizes[axis]
    return views


def _reshaped(
    view: View,
    before: Sequence[int],
    after: Sequence[int],
) -> View:
    """Axes of length one come and go; merged or split, the others are lost."""
    # axes of length one apart, nothing may change
    kept = [i for i, n in enumerate(before) if n != 1]
    wanted = [n for n in after if n != 1]
    if [before[i] for i in kept] != wanted:
        return view._replace(axes=(None,) * len(after)).lost()
    source = iter(kept)
    axes = tuple(None if n == 1 else view.axes[next(source)] for n in after)
    return view._replace(axes=axes).without_single_numbers()


def parameter_views(jaxpr: Any, leaves: int) -> list[View | None]:
    """Views of the inputs of a jaxpr whose first `leaves` are the parameter leaves."""
    # data has no view
    data = [None] * (len(jaxpr.invars) - leaves)
    shapes = [v.aval.shape for v in jaxpr.invars[:leaves]]
    return [*map(of_parameter, range(leaves), shapes), *data]
