"""A positive semi-definite matrix by some of its rows: interpolative decomposition."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import psd_inverse, symmetrize
from kfac_optax.linalg.in_order import after

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Interpolation(NamedTuple):
    """`K ~ L L^T` with `L = P L_S`, `L_S` the chosen rows of `L`, lower triangular."""

    rows: Int[Array, " r"]
    lower: Float[Array, "n r"]


def interpolate(matrix: Float[Array, "n n"], rank: int) -> Interpolation:
    """Chooses rows by Cholesky decomposition with the largest pivots first.

    With `K = U U^T` these are the rows of `U` that a pivoted QR decomposition of `U^T` takes, and
    `P U_S` is the projection of `U` on them. What is left, `K - L L^T`, is positive semi-definite.
    Pivots that are rounding of the largest give columns of zeros.

    >>> print(interpolate(jnp.diag(jnp.array([1.0, 4.0, 9.0])), 2).rows)
    [2 1]

    Reference: Cheng, Gimbutas, Martinsson & Rokhlin, On the Compression of Low Rank Matrices
      (2005).
    """
    n = len(matrix)
    # what remains of a diagonal entry below this is rounding
    diagonal = jnp.diagonal(matrix)
    tolerance = n * jnp.finfo(matrix.dtype).eps * jnp.max(diagonal)

    def step(
        j: Array,
        state: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
        rows, lower, left = state
        # the row with the largest remainder, `left` being the diagonal of K - L L^T
        pivot = jnp.argmax(left).astype(jnp.int32)
        remainder = left[pivot]
        good = remainder > tolerance
        # columns not made yet are zeros
        known = _product(lower, lower[pivot])
        column = matrix[:, pivot] - known
        # l_j = (K - L L^T) e_pivot / sqrt(remainder)
        length = jnp.sqrt(jnp.where(good, remainder, 1))
        column = jnp.where(good, column / length, 0)
        # the pivot's own remainder is zero exactly, whatever rounding left there
        left = left - column**2
        left = left.at[pivot].set(0)
        rows = rows.at[j].set(pivot)
        lower = lower.at[:, j].set(column)
        return rows, lower, left

    # zeros of the type of the matrix, which may differ between devices
    no_rows = jnp.zeros_like(diagonal, jnp.int32, shape=rank)
    no_columns = jnp.zeros_like(matrix, shape=(n, rank))
    start = no_rows, no_columns, diagonal
    rows, lower, _ = jax.lax.fori_loop(0, rank, step, start)
    return Interpolation(rows, lower)


def middle_of_interpolation(
    matrix: Float[Array, "n n"],
    found: Interpolation,
    shift: Float[Array, ""],
) -> Float[Array, "r r"]:
    """`C` with `(K + shift I)^{-1} ~ C` on the chosen rows: `P^T (L L^T + E + shift I)^{-1} P`.

    With `E = K - L L^T`, `M = P^T (E + shift I)^{-1} P` and `K_S = L_S L_S^T`,

        C = M - M (K_S^{-1} + M)^{-1} M = M - M L_S (I + L_S^T M L_S)^{-1} L_S^T M,

    where `K_S` may be singular.

    >>> k = jnp.diag(jnp.array([1.0, 3.0]))
    >>> middle_of_interpolation(k, interpolate(k, 2), jnp.float32(1.0)).round(3)
    Array([[0.25, 0.  ],
           [0.  , 0.5 ]], dtype=float32)
    """
    lower = found.lower
    # L_S [r, r]
    chosen = jnp.tril(lower[found.rows])
    # a column of zeros belongs to no row: its part of P is zero
    pivots = jnp.diagonal(chosen)
    missing = jnp.where(pivots > 0, 0, 1).astype(lower.dtype)
    regular = chosen + jnp.diag(missing)
    # P^T = L_S^{-T} L^T, [r, n]
    weights = lapack.solve_triangular(regular, lower.T, trans=1, lower=True)
    # (E + shift I)^{-1}
    left_over = matrix - _product(lower, lower.T)
    rest = psd_inverse(after(left_over, weights), shift)
    # M = P^T (E + shift I)^{-1} P, [r, r]
    half = _product(weights, rest)
    m = symmetrize(_product(half, weights.T))
    seen = _product(m, chosen)
    # (I + L_S^T M L_S)^{-1}
    one = jnp.ones((), lower.dtype)
    middle = _product(chosen.T, seen)
    inside = psd_inverse(middle, one)
    correction = _product(_product(seen, inside), seen.T)
    return symmetrize(m - correction)
