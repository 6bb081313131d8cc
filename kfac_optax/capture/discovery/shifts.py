"""The bias of a product, or the shift of a scale: a parameter that is added directly behind it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from kfac_optax.capture.discovery.uses import Use, places_of
from kfac_optax.capture.geometry import Lookup
from kfac_optax.capture.jaxpr.views import View
from kfac_optax.capture.sites import Origin, origin_of


class Shift(NamedTuple):
    """A bias added in equation `index` of the jaxpr, and the use as it is seen there."""

    index: int
    origin: Origin
    use: Use


def find_shift(
    jaxpr: Any,
    index: int,
    use: Use,
    views: Mapping[Any, View | None],
    readers: Mapping[Any, Sequence[int]],
) -> Shift | None:
    """The bias of a product, where nothing else reads what is between them.

    Args:
      jaxpr: where both are.
      index: of the product.
      use: what it is.
      views: of all values of the jaxpr.
      readers: equations that read each value, -1 where the jaxpr returns it.
    """
    if isinstance(use.geometry, Lookup) or use.other is None:
        return None
    # follows the value through transposes and casts, as long as one equation reads it
    value = jaxpr.eqns[index].outvars[0]
    place = list(range(value.aval.ndim))  # where each axis of the product is now
    while True:
        of_value = readers.get(value, ())
        if len(of_value) != 1 or of_value[0] < 0:
            return None
        (index,) = of_value
        eqn = jaxpr.eqns[index]
        if eqn.primitive.name == "add":
            # the first addition: a bias, or something else that is added
            seen = use.behind_transpose(place)
            bias = _added(eqn, value, views)
            if seen is None or bias is None or not _fits(eqn, value, bias, seen):
                return None
            return Shift(index, origin_of(bias), seen)
        if eqn.primitive.name == "transpose":
            permutation = list(eqn.params["permutation"])
            place = [permutation.index(axis) for axis in place]
        elif eqn.primitive.name not in ("convert_element_type", "copy"):
            return None
        value = eqn.outvars[0]


def _added(
    eqn: Any,
    value: Any,
    views: Mapping[Any, View | None],
) -> View | None:
    """What is added to a value, if it is a parameter and changes no shape."""
    # addition has no order
    first, second = eqn.invars
    other = second if first is value else first
    total = eqn.outvars[0]
    if isinstance(other, jex.Literal) or total.aval.shape != value.aval.shape:
        return None
    return views.get(other)


def _fits(
    eqn: Any,
    value: Any,
    bias: View,
    use: Use,
) -> bool:
    """Whether the parameter has one number for each output of the layer, in its order."""
    shape = value.aval.shape
    first, second = eqn.invars
    mine = (second if first is value else first).aval.shape
    # along which axes of the product its numbers differ
    places = places_of(bias, mine, shape) if bias.complete else None
    outputs = tuple(axis for axis in use.features if shape[axis] > 1)
    return places == outputs and bias.depth == use.origin.depth
