"""Uses of one parameter brought to the roles that its axes have in the layer."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from kfac_optax._types import Layout
from kfac_optax.capture.geometry import Contraction, Dense, Lookup
from kfac_optax.capture.layouts import layout, matrix_shape
from kfac_optax.capture.sites import Site


class _Roles(NamedTuple):
    """Stored axes that batch the layer, are summed over, and are its outputs."""

    groups: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def at_least_two(self, stored: Sequence[int]) -> "_Roles":
        """Without axes of length one, which have no role."""

        def long(axes: Sequence[int]) -> tuple[int, ...]:
            return tuple(i for i in axes if stored[i] > 1)

        return _Roles(*map(long, self))


def layout_of(site: Site) -> Layout:
    """Layout of the kernel of a site, which is a parameter."""
    origin = site.params[0]
    assert origin is not None
    return layout(site.geometry, site.kernel, origin.permutation)


def aligned(site: Site, lead: Site) -> Site | None:
    """A use found in the program as a use of the layer that `lead` is one of, `None` if it is none.

    The matrix of a product may be there the other way round: `g W^T` beside `x W`. Its rows are
    swapped then: the gradient in `W` is the outer product of the product's cotangent and `g`.
    """
    # a mask leaves out what another use may have
    if getattr(lead.geometry, "mask", None) is not None:
        return None
    # a table may also be the head, h E^T
    if isinstance(lead.geometry, Lookup) and not isinstance(site.geometry, Lookup):
        return site if _is_head(site, lead) else None
    products = (Contraction, Dense)
    here = isinstance(site.geometry, Contraction)
    if not here or not isinstance(lead.geometry, products):
        return site if same_matrix(site, lead) else None
    # stored axes by role, in this use and in the layer
    mine = _roles(site)
    wanted = _roles(lead)
    if len(mine.groups) != len(wanted.groups):
        return None
    stored = site.kernel  # a use that was found names the stored axes themselves
    # the same axes in each role, or inputs and outputs exchanged
    here = [set(axes) for axes in mine.at_least_two(stored)]
    groups, inputs, outputs = map(set, wanted.at_least_two(stored))
    if here == [groups, inputs, outputs]:
        return _reordered(site, mine, wanted)
    if here == [groups, outputs, inputs]:
        other_way = _Roles(wanted.groups, wanted.outputs, wanted.inputs)
        return _reordered(site, mine, other_way)._replace(swapped=True)
    return None


def same_matrix(site: Site, lead: Site) -> bool:
    """Whether two uses of a kernel see the same matrix in it, stored the same way."""
    if site.geometry.kind != lead.geometry.kind:
        return False
    if getattr(site.geometry, "mask", None) != getattr(lead.geometry, "mask", None):
        return False
    mine = matrix_shape(site.geometry, site.kernel)
    wanted = matrix_shape(lead.geometry, lead.kernel)
    return mine == wanted and layout_of(site) == layout_of(lead)


def _is_head(site: Site, table: Site) -> bool:
    """Whether a product is `h @ table.T`."""
    transposed = _Roles(groups=(), inputs=(1,), outputs=(0,))
    return site.geometry.kind == "dense" and _roles(site) == transposed


def _roles(site: Site) -> _Roles:
    origin = site.params[0]
    rank = len(site.kernel)
    permutation = () if origin is None else origin.permutation
    # which stored axis each axis of the operand is
    front = range(rank - len(permutation))
    stored = [*front, *(rank + axis for axis in permutation)]
    if isinstance(site.geometry, Dense):
        inputs, outputs = stored[:2]
        return _Roles((), (inputs,), (outputs,))
    assert isinstance(site.geometry, Contraction)
    # axes of the kernel in the order groups, inputs, outputs
    axes = [stored[rank + axis] for axis in site.geometry.kernel]
    first_input = site.geometry.groups
    first_output = first_input + site.geometry.inputs
    return _Roles(
        groups=tuple(axes[:first_input]),
        inputs=tuple(axes[first_input:first_output]),
        outputs=tuple(axes[first_output:]),
    )


def _reordered(site: Site, mine: _Roles, wanted: _Roles) -> Site:
    geometry = site.geometry
    assert isinstance(geometry, Contraction)
    rank = len(site.kernel)
    rows = geometry.rows
    first = rows + geometry.groups
    # as stored, in the order of roles of the layer
    kernel = (*wanted.groups, *wanted.inputs, *wanted.outputs)

    def arranged(
        axes: Sequence[int],
        own: Sequence[int],
        of_layer: Sequence[int],
    ) -> tuple[int, ...]:
        # rows stay; groups and features in the order of the layer
        batch = _sorted_by(axes[rows:first], mine.groups, wanted.groups)
        features = _sorted_by(axes[first:], own, of_layer)
        return (*axes[:rows], *batch, *features)

    geometry = dataclasses.replace(
        geometry,
        a=arranged(geometry.a, mine.inputs, wanted.inputs),
        s=arranged(geometry.s, mine.outputs, wanted.outputs),
        kernel=tuple(axis - rank for axis in kernel),
        inputs=len(wanted.inputs),
        outputs=len(wanted.outputs),
    )
    return site._replace(geometry=geometry)


def _sorted_by(
    axes: Sequence[int],
    mine: Sequence[int],
    wanted: Sequence[int],
) -> list[int]:
    """Axes of an array, given which stored axes the first of them are, in the order wanted.

    What is left over has length one.
    """
    place = dict(zip(mine, axes, strict=False))
    first = [place[axis] for axis in wanted if axis in place]
    return first + [axis for axis in axes if axis not in first]
