"""Matrices that are zero outside of blocks on their diagonal, one block for every group of
neighbouring coordinates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.gram import replicated
from kfac_optax.linalg.weighted_rows import keep_rows


def group_sizes(dimension: int, size: int) -> tuple[int, int]:
    """Number and width of the groups of at most `size` coordinates; the last may be padded.

    >>> print(group_sizes(5, 2), group_sizes(5, 128))
    (3, 2) (1, 5)
    """
    # one narrower group where all coordinates fit
    width = min(dimension, size)
    return -(-dimension // width), width


def in_groups(x: Float[Array, "*rows d"], size: int) -> Float[Array, "*rows m s"]:
    """The last axis in groups, zeros behind its end.

    >>> print(in_groups(jnp.arange(3.0), 2))
    [[0. 1.]
     [2. 0.]]
    """
    count, width = group_sizes(x.shape[-1], size)
    # the last group is filled up with zeros: its products with anything vanish
    missing = count * width - x.shape[-1]
    rows = x.shape[:-1]
    behind = [(0, 0)] * len(rows) + [(0, missing)]
    padded = jnp.pad(x, behind)
    return padded.reshape(*rows, count, width)


def group_identity(
    dimension: int,
    size: int,
    dtype: jnp.dtype,
) -> Float[Array, "m s s"]:
    """The blocks of an identity, zero in the padding.

    >>> print(group_identity(3, 2, jnp.float32)[1])
    [[1. 0.]
     [0. 0.]]
    """
    # [m, s] -> [m, s, s]
    diagonal = in_groups(jnp.ones(dimension, dtype), size)
    width = diagonal.shape[-1]
    return diagonal[..., None] * jnp.eye(width, dtype=dtype)


def group_gram(
    x: Float[Array, "*rows d"],
    size: int,
    weights: Float[Array, "*rows"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "m s s"]:
    """The blocks of `sum_rows w x x^T`; rows of weight zero are never read.

    >>> print(group_gram(jnp.ones((2, 3)), 2)[1])
    [[2. 0.]
     [0. 0.]]
    """
    x = keep_rows(x, weights)
    # [*rows, m, s]; the weight of a row goes into one side of the product
    right = in_groups(x, size)
    left = right
    if weights is not None:
        left = right * weights[..., None, None].astype(x.dtype)
    # contracts rows, maps over groups: [m, s, s]
    rows = tuple(range(x.ndim - 1))
    group = (x.ndim - 1,)
    return jax.lax.dot_general(
        left,
        right,
        ((rows, rows), (group, group)),
        precision=precision,
        out_sharding=replicated(right, 3),
    )


def group_product(
    x: Float[Array, "*rows d"],
    blocks: Float[Array, "m s s"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "*rows d"]:
    """`x` times the matrix that has these blocks.

    >>> print(group_product(jnp.ones(3), 2 * group_identity(3, 2, jnp.float32)))
    [2. 2. 2.]
    """
    grouped = in_groups(x, blocks.shape[-1])
    product = jnp.einsum("...ms,mst->...mt", grouped, blocks, precision=precision)
    # [*rows, m, s] -> [*rows, m s], less the padding
    joined = product.reshape(*x.shape[:-1], -1)
    return joined[..., : x.shape[-1]]
