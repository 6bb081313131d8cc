"""Equations that are a layer's use: what meets the parameter, and in which geometry."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax.capture.discovery.products import (
    contraction_of,
    examples_first,
    from_end,
    roles_in_product,
)
from kfac_optax.capture.geometry import Contraction, Conv, Geometry, Lookup, ScaleShift
from kfac_optax.capture.jaxpr.views import View
from kfac_optax.capture.patches import Window
from kfac_optax.capture.sites import Origin, origin_of


class Use(NamedTuple):
    """One equation that is linear in a parameter.

    Attributes:
      operand: which operand of the equation the parameter is.
      origin, kernel, geometry: of the tap.
      other: operand that is the layer's input, `None` where there is none.
      features: axes of the equation's output that are the layer's groups and outputs.
      arrange: `(s, a) -> (s, a)` as the geometry wants them, or `None` if they are so.
      restore: `s -> s` as the equation makes it.
    """

    operand: int
    origin: Origin
    kernel: tuple[int, ...]
    geometry: Geometry
    other: int | None
    features: tuple[int, ...] = ()
    arrange: Callable | None = None
    restore: Callable[[jax.Array], jax.Array] = lambda s: s

    def behind_transpose(self, place: Sequence[int]) -> "Use | None":
        """The same use seen where the axes of its output have moved to `place`."""
        # nothing has moved
        if list(place) == sorted(place):
            return self
        # other geometries have axes that cannot move
        if not isinstance(self.geometry, Contraction):
            return None
        rank = len(place)
        s = tuple(place[axis] - rank for axis in self.geometry.s)
        features = tuple(place[axis] for axis in self.features)
        return self._replace(geometry=dataclasses.replace(self.geometry, s=s), features=features)


def find_use(eqn: Any, views: Sequence[View | None], examples: Sequence[int]) -> Use | None:
    """The use that an equation is of the one operand that is a parameter, or `None`.

    Args:
      eqn: the equation.
      views: of its operands.
      examples: axes of its output that may be that of the examples, the likeliest first.
    """
    given = [(i, view) for i, view in enumerate(views) if view is not None]
    handler = _HANDLERS.get(eqn.primitive.name)
    if handler is None or len(given) != 1:
        return None
    operand, view = given[0]
    out = eqn.outvars[0].aval
    # a scalar parameter, or one among integers, is no layer
    array = out.ndim > 0 and jnp.issubdtype(out.dtype, jnp.inexact)
    if not view.complete or not array:
        return None
    if 0 in view.stored:  # nothing to measure
        return None
    return handler(eqn, operand, view, examples)


def _product(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """`dot_general` of a parameter and anything else."""
    roles = roles_in_product(eqn, operand, view)
    if roles is None:
        return None
    geometry = contraction_of(eqn, operand, view, roles, examples)
    origin = origin_of(view)
    return Use(operand, origin, view.stored, geometry, 1 - operand, roles.features)


def _scale(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """`x * scale` or `scale / x`, repeated over rows."""
    divided = eqn.primitive.name == "div"
    # x / scale is not linear in the parameter
    if divided and operand != 0:
        return None
    other = 1 - operand

    def values(s: jax.Array, x: jax.Array) -> jax.Array:
        factor = 1 / x if divided else x
        return jnp.broadcast_to(factor, s.shape).astype(s.dtype)

    x = eqn.invars[other].aval
    # x as it is: no equation has to be written
    plain = not divided and x.shape == eqn.outvars[0].aval.shape
    return _elementwise(eqn, operand, view, examples, other, None if plain else values)


def _shift(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """`x + shift`, repeated over rows."""
    # x - shift has the derivative -1
    sign = -1 if eqn.primitive.name == "sub" and operand == 1 else 1

    def ones(s: jax.Array, _: Any) -> jax.Array:
        return jnp.full_like(s, sign)

    return _elementwise(eqn, operand, view, examples, None, ones)


def _elementwise(
    eqn: Any, operand: int, view: View, examples: Sequence[int], other: int | None, values: Any
) -> Use | None:
    out, mine = eqn.outvars[0].aval.shape, eqn.invars[operand].aval.shape
    places = places_of(view, mine, out)
    # axes of the output that the parameter does not have
    rows = [] if places is None else [i for i in range(len(out)) if i not in places]
    if places is None or not rows:
        return None
    order = examples_first(rows, examples)
    # rows that belong to no example are the positions of one
    apart = order[0] not in examples
    # [*rows, *channels], and back
    order += [i for i in range(len(out)) if i not in rows]
    back = [order.index(i) for i in range(len(out))]
    channels = [back[i] for i in places]
    geometry = ScaleShift(from_end(channels, len(out)))

    def laid_out(x: jax.Array) -> jax.Array:
        moved = x.transpose(order)
        return jax.lax.expand_dims(moved, [0]) if apart else moved

    def arrange(s: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = x if values is None else values(s, x)
        return laid_out(s), laid_out(a)

    def restore(s: jax.Array) -> jax.Array:
        moved = jax.lax.squeeze(s, [0]) if apart else s
        return moved.transpose(back)

    plain = values is None and not apart and order == sorted(order)
    origin = origin_of(view)
    return Use(
        operand,
        origin,
        view.stored,
        geometry,
        other,
        places,
        None if plain else arrange,
        restore,
    )


def places_of(view: View, shape: Sequence[int], out: Sequence[int]) -> tuple[int, ...] | None:
    """Where the stored axes are in the output of an elementwise equation with that operand.

    Those of length one are nowhere; `None` where an axis is missing.
    """
    as_many = len(shape) == len(out)
    axes = view.axes if as_many else (None,) * len(out)
    # a scalar, or as many axes as the output has
    if shape and not as_many:
        return None
    found = {}
    for i, axis in enumerate(axes):
        if axis is not None and view.stored[axis] == out[i] > 1:
            found[axis] = i
    # axes of length one have no place of their own
    wanted = [axis for axis, n in enumerate(view.stored) if n > 1]
    if set(found) != set(wanted):
        return None
    return tuple(found[axis] for axis in wanted)


def _rows_of_table(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """`table[:n]`: rows that all examples share."""
    p = eqn.params
    first, last = p["start_indices"][0], p["limit_indices"][0]
    width = view.stored[1:]
    if view.axes != (0, 1) or view.part is not None or p["strides"] is not None:
        return None
    if (p["start_indices"][1], p["limit_indices"][1]) != (0, *width):
        # whole rows, from the first on
        return None

    def arrange(s: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        return s, jnp.arange(first, last)

    origin = origin_of(view)
    return Use(operand, origin, view.stored, Lookup(view.stored[0]), None, (), arrange)


def _lookup(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """`table[tokens]`: whole rows of a table."""
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    # offsets are the last axis of the output, one index names a row
    whole_rows = (
        operand == 0
        and view.axes == (0, 1)
        and tuple(numbers.offset_dims) == (out.ndim - 1,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, view.stored[1])
    )
    if not whole_rows or out.ndim < 2:
        return None
    rows = list(range(out.ndim - 1))
    first = examples_first(rows, examples)[0]

    def arrange(s: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jax.lax.squeeze(indices, [indices.ndim - 1])
        match eqn.params["mode"]:
            case jax.lax.GatherScatterMode.CLIP:
                # as JAX reads indices that are out of range
                tokens = jnp.clip(tokens, 0, view.stored[0] - 1)
            case jax.lax.GatherScatterMode.FILL_OR_DROP:
                # those that still are negative are dropped, as beyond the end; an index would wrap
                tokens = jnp.where(tokens < 0, view.stored[0], tokens)
        return jnp.moveaxis(s, first, 0), jnp.moveaxis(tokens, first, 0)

    return Use(
        operand,
        origin_of(view),
        view.stored,
        Lookup(view.stored[0]),
        1,
        (),
        arrange,
        lambda s: jnp.moveaxis(s, 0, first),
    )


def _convolution(eqn: Any, operand: int, view: View, examples: Sequence[int]) -> Use | None:
    """A convolution with a parameter as stored, in any order of axes."""
    p = eqn.params
    if operand != 1 or not view.whole or p["batch_group_count"] != 1:
        return None
    numbers = p["dimension_numbers"]
    # (spatial axes, channels) of input, kernel and output
    specs = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    lhs, rhs, out = ((*spec[2:], spec[1]) for spec in specs)
    used = (*rhs, numbers.rhs_spec[0])  # window, inputs, outputs
    shape = eqn.invars[1].aval.shape
    window = Window(
        tuple(shape[i] for i in used[:-2]),
        tuple(p["window_strides"]),
        tuple((int(low), int(high)) for low, high in p["padding"]),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
    )
    # [N, *spatial, C] for both
    to_a, to_s = (numbers.lhs_spec[0], *lhs), (numbers.out_spec[0], *out)
    back = [to_s.index(i) for i in range(len(to_s))]
    seen = view._replace(axes=tuple(view.axes[i] for i in used))
    # in that order already
    plain = to_a == to_s == tuple(range(len(to_s)))

    def arrange(s: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        return s.transpose(to_s), a.transpose(to_a)

    return Use(
        operand,
        origin_of(view, seen.permutation),
        tuple(shape[i] for i in used),
        Conv(window, p["feature_group_count"]),
        0,
        (numbers.out_spec[1],),
        None if plain else arrange,
        lambda s: s.transpose(back),
    )


_HANDLERS: dict[str, Callable[[Any, int, View, Sequence[int]], Use | None]] = {
    "dot_general": _product,
    "mul": _scale,
    "div": _scale,
    "add": _shift,
    "add_any": _shift,
    "sub": _shift,
    "gather": _lookup,
    "slice": _rows_of_table,
    "conv_general_dilated": _convolution,
}
