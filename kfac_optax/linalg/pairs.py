"""Matrices of symmetric functions of two indices."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def symmetric_matrix(
    entry: Callable[[int, int], jax.Array],
    size: int,
) -> Float[Array, "size size"]:
    """`[entry(i, j)]` with `entry(j, i) = entry(i, j)`: every pair is asked for once.

    >>> print(symmetric_matrix(lambda i, j: jnp.float32(i + j), 2))
    [[0. 1.]
     [1. 2.]]
    """
    # the upper triangle, mirrored
    known = {}
    for i, j in itertools.combinations_with_replacement(range(size), 2):
        known[i, j] = known[j, i] = entry(i, j)
    rows = []
    for i in range(size):
        row = [known[i, j] for j in range(size)]
        rows.append(jnp.stack(row))
    return jnp.stack(rows)
