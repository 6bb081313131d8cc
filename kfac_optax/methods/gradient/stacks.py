"""Leading axes of leaves: those that only count equal parameters, as of scanned layers, and others."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def stacked_axes(
    where: str,
    name: str,
    shape: tuple[int, ...],
    stacked: Callable[[str], int] | None,
) -> int:
    """The number of leading axes of a leaf that count equal parameters.

    Raises:
      ValueError: `stacked` gives no integer, or more axes than the leaf has.

    >>> print(stacked_axes("here", "blocks/kernel", (6, 3, 4), lambda name: 1))
    1
    """
    if stacked is None:
        return 0
    given = stacked(name)
    return leading_axes(f"{where}: stacked({name!r})", given, shape, "count equal parameters")


def leading_axes(
    what: str,
    given: Any,
    shape: tuple[int, ...],
    purpose: str,
) -> int:
    """A number of leading axes of a leaf, as it is.

    Raises:
      ValueError: it is no integer, or more than the leaf has.

    >>> leading_axes("here: spatial('kernel')", 2, (3,), "are averaged over")
    Traceback (most recent call last):
    ValueError: here: spatial('kernel') is 2 for a leaf of shape (3,); expected ... from 0 to 1.
    """
    try:
        number = operator.index(given)
    except TypeError:
        number = -1
    if not 0 <= number <= len(shape):
        raise ValueError(
            f"{what} is {given!r} for a leaf of shape {shape}; expected the number of leading axes "
            f"that {purpose}, an integer from 0 to {len(shape)}."
        )
    return number


def averaged_together(h: jax.Array, axes: int, block: int) -> jax.Array:
    """Entries that belong together, all with their mean: those along the first axes, or `block`
    neighbours on the last one.
    """
    if axes:
        mean = jnp.mean(h, tuple(range(axes)), keepdims=True)
        return jnp.broadcast_to(mean, h.shape)
    # neighbours that do not fill the axis stay alone
    if block == 1 or h.ndim == 0 or h.shape[-1] % block:
        return h
    parts = h.reshape(*h.shape[:-1], -1, block)
    mean = jnp.mean(parts, -1, keepdims=True)
    return jnp.broadcast_to(mean, parts.shape).reshape(h.shape)
