"""Maps of positions brought to a smaller size, axis by axis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Resample = Callable[[jax.Array, int, int], jax.Array]  # (x, axis, smaller size)


def _nearest(x: Array, axis: int, size: int) -> Array:
    have = x.shape[axis]
    if have == size:
        return x
    # evenly spaced, the first always among them
    index = np.arange(size) * have // size
    return jnp.take(x, index, axis=axis)


def _area(x: Array, axis: int, size: int) -> Array:
    """Means over the cells that each of `size` equal parts touches."""
    have = x.shape[axis]
    if have == size:
        return x
    # column i averages over the cells that overlap the i-th of `size` equal parts
    cells = np.zeros((have, size))
    for i in range(size):
        first = i * have // size
        last = -(-(i + 1) * have // size)
        cells[first:last, i] = 1 / (last - first)
    weights = jnp.asarray(cells, x.dtype)
    # the axis to the end, [..., have] -> [..., size], and back
    last_axis = jnp.moveaxis(x, axis, -1)
    moved = jnp.matmul(last_axis, weights, precision="highest")
    return jnp.moveaxis(moved, -1, axis)


RESAMPLE: dict[str, Resample] = {"nearest": _nearest, "area": _area}
