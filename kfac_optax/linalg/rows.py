"""Rows that count differently."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.gram import gram


def keep_rows(x: Float[Array, "*rows d"], weights: Float[Array, "*rows"] | None) -> Float[Array, "*rows d"]:
    """`x` with zeros in the rows of weight zero, whatever those held: zero times NaN is not zero.

    >>> print(keep_rows(jnp.array([[1.0], [jnp.nan]]), jnp.array([2.0, 0.0])).ravel())
    [1. 0.]
    """
    return x if weights is None else jnp.where(weights[..., None] != 0, x, jnp.zeros((), x.dtype))


def weighted_gram(
    x: Float[Array, "*rows d"],
    weights: Float[Array, "*rows"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d d"]:
    """`sum_rows w x x^T`; rows of weight zero are never read.

    >>> print(weighted_gram(jnp.array([[1.0], [jnp.nan]]), jnp.array([2.0, 0.0])))
    [[2.]]
    """
    x = keep_rows(x, weights)
    return gram(x if weights is None else x * weights[..., None].astype(x.dtype), x, precision=precision)
