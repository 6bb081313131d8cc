"""Layers that only some devices measure, each on its own part of the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._layout import varying_as
from kfac_optax._tree import nothing_of
from kfac_optax._types import PyTree

# `(a, g, weights, inverse) -> statistic`
MeasureRows = Callable[..., PyTree]


class Owners(NamedTuple):
    """Which devices measure a layer."""

    axis: Any  # mapped axis, or several
    devices: np.ndarray  # shape=(W,), dtype=bool


def where_owned(
    owners: Owners | None,
    measure: MeasureRows,
    a: jax.Array,
    g: jax.Array | None,
    weights: jax.Array | None,
    inverse: PyTree,
) -> PyTree:
    """What a layer measures on the devices that own it; the others do none of its work.

    They have one number in all places of the statistic, which nobody keeps. As a statistic would, it
    says whether their part of the batch is finite, and whether it has an example that counts: it is
    the largest size of an output gradient.
    """
    if owners is None or owners.devices.all():
        return measure(a, g, weights, inverse)
    arguments = (a, g, weights, inverse)
    shapes = jax.eval_shape(measure, *arguments)

    def filled(arguments: tuple) -> PyTree:
        of_all = _size(*arguments[1:3])
        made = jax.tree.map(lambda x: jnp.full(x.shape, of_all.astype(x.dtype)), shapes)
        # both branches differ between the same devices
        return varying_as(made, arguments)

    def measured(arguments: tuple) -> PyTree:
        return varying_as(measure(*arguments), arguments)

    mine = jnp.asarray(owners.devices)[jax.lax.axis_index(owners.axis)]
    return jax.lax.cond(mine, measured, filled, arguments)


def _size(g: jax.Array | None, weights: jax.Array | None) -> jax.Array:
    """The largest size of an output gradient, NaN where one is not finite, or without any one where
    an example counts.
    """
    if g is not None:
        return jnp.max(jnp.abs(g)) + nothing_of(g)
    return jnp.ones(()) if weights is None else jnp.any(weights != 0).astype(jnp.float32)
