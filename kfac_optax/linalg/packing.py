"""Symmetric matrices without their double entries, for what travels between devices."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def pack(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch rows columns"]:
    """The lower and upper triangles of both diagonal blocks in one square, above the block that is
    left.

    With `h = ceil(n / 2)` and `M = [[P, R^T], [R, S]]`, the upper triangle of `P [h, h]` and the
    lower one of `S`, a row further down, fill `[n - h + 1, h]`: `n (n + 1) / 2` numbers with `R`.
    Only slices and sums: no index arrays, which would be as large as the matrix.

    >>> print(pack(jnp.array([[1.0, 2.0], [2.0, 3.0]])))
    [[1.]
     [3.]
     [2.]]
    """
    n = matrix.shape[-1]
    half, rest = _halves(n)
    upper = jnp.triu(matrix[..., :half, :half])
    lower = jnp.tril(matrix[..., half:, half:])
    left = matrix[..., half:, :half]
    # both triangles in zeros [n - h + 1, h], the lower one a row further down
    batch = [(0, 0)] * (matrix.ndim - 2)
    below = (0, rest + 1 - half)
    above = (1, 0)
    behind = (0, half - rest)
    upper = jnp.pad(upper, [*batch, below, (0, 0)])
    lower = jnp.pad(lower, [*batch, above, behind])
    return jnp.concatenate([upper + lower, left], -2)


def unpack(
    packed: Float[Array, "*batch rows columns"],
    n: int,
) -> Float[Array, "*batch n n"]:
    """The symmetric matrix that was packed.

    >>> print(unpack(pack(jnp.array([[1.0, 2.0], [2.0, 3.0]])), 2))
    [[1. 2.]
     [2. 3.]]
    """
    half, rest = _halves(n)
    upper = jnp.triu(packed[..., :half, :half])
    lower = jnp.tril(packed[..., 1 : rest + 1, :rest])
    left = packed[..., rest + 1 :, :]
    # each triangle with what mirrors it, without the diagonal once more
    first = upper + jnp.triu(upper, 1).mT
    last = lower + jnp.tril(lower, -1).mT
    # [[P, R^T], [R, S]]
    top = jnp.concatenate([first, left.mT], -1)
    bottom = jnp.concatenate([left, last], -1)
    return jnp.concatenate([top, bottom], -2)


def _halves(n: int) -> tuple[int, int]:
    """Rows of the first diagonal block, and of the last."""
    half = (n + 1) // 2
    return half, n - half
