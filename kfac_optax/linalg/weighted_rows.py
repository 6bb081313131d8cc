"""Rows that count differently."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax.linalg.gram import gram, replicated


def keep_rows(
    x: Float[Array, "*rows d"],
    weights: Float[Array, "*rows"] | None,
) -> Float[Array, "*rows d"]:
    """`x` with zeros in the rows of weight zero, whatever those held: zero times NaN is not zero.

    >>> print(keep_rows(jnp.array([[1.0], [jnp.nan]]), jnp.array([2.0, 0.0])).ravel())
    [1. 0.]
    """
    if weights is None:
        return x
    kept = weights[..., None] != 0
    zero = jnp.zeros((), x.dtype)
    return jnp.where(kept, x, zero)


def count_rows(
    x: Float[Array, "*rows d"],
    weights: Float[Array, "*rows"] | None,
) -> Float[Array, ""] | int:
    """How many rows `x` stands for: its own, or the sum of their weights.

    >>> print(count_rows(jnp.ones((2, 3)), None), count_rows(jnp.ones((2, 3)), jnp.array([1.0, 4.0])))
    2 5.0
    """
    if weights is None:
        return math.prod(x.shape[:-1])
    return jnp.sum(weights)


def finite_padding(
    x: Float[Array, "..."],
    weights: Float[Array, "..."],
) -> Float[Array, "..."]:
    """`x` with zeros in place of what is not finite where the weight is zero; the two broadcast.

    For what carries its weight already: a cotangent of zero that met a NaN on its way back is a
    NaN. Finite numbers stay, since a row without a label of its own can still matter for that of
    another.

    >>> print(finite_padding(jnp.array([jnp.nan, 3.0, jnp.nan]), jnp.array([0.0, 0.0, 1.0])))
    [ 0.  3. nan]
    """
    # finite numbers stay
    padding = (weights == 0) & ~jnp.isfinite(x)
    zero = jnp.zeros((), x.dtype)
    return jnp.where(padding, zero, x)


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
    # the weight goes into one side only: sum_rows (w x) x^T
    weighted = x
    if weights is not None:
        weighted = x * weights[..., None].astype(x.dtype)
    return gram(weighted, x, precision=precision)


def index_counts(
    indices: Int[Array, "*rows"],
    size: int,
    weights: Float[Array, "*rows"] | None,
    dtype: jnp.dtype,
) -> Float[Array, " size"]:
    """`sum_rows w e_index`: how often every index below `size` occurs; larger ones are not counted.

    >>> print(index_counts(jnp.array([0, 2, 2, 5]), 3, None, jnp.float32))
    [1. 0. 2.]
    """
    # a scatter-add: the one-hot matrix [*rows, size] is never formed
    amounts = jnp.ones((), dtype)
    if weights is not None:
        amounts = weights.astype(dtype)
    sharding = replicated(indices)  # None, or for a matrix
    if sharding is not None:
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(None))
    counts = jnp.zeros(size, dtype)
    return counts.at[indices].add(amounts, mode="drop", out_sharding=sharding)
