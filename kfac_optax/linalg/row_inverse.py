"""Inverse of a damped sum of products of rows, by one rank-one update for each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._validate import check_number

_EXACT = jax.lax.Precision.HIGHEST


class RowInverse(NamedTuple):
    """`(F + damping I)^{-1}` of `F = (1/m) sum_j g_j g_j^T`, as `I / damping - sum_j v_j v_j^T / q_j`.

    Attributes:
      vectors: `v_j`, the row `g_j` preconditioned with the rows before it.
      divisors: `q_j = m + g_j^T v_j`.
      damping: of the matrix.
    """

    vectors: Float[Array, "m d"]
    divisors: Float[Array, " m"]
    damping: Float[Array, ""]

    def product(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """`(F + damping I)^{-1} x`, in `O(m d)`."""
        # v_j^T x / q_j, [m]
        products = jnp.matmul(self.vectors, x, precision=_EXACT)
        seen = self._sum(products / self.divisors)
        return x / self.damping - seen

    def diagonal(self) -> Float[Array, " d"]:
        """The diagonal of the inverse, in `O(m d)`."""
        squares = jnp.square(self.vectors) / self.divisors[:, None]
        seen = jnp.sum(squares, 0)
        return 1 / self.damping - seen

    def column(self, i: Array | int) -> Float[Array, " d"]:
        """Column `i` of the inverse, in `O(m d)`."""
        # row i of V^T Q^{-1} V, and 1 / damping on the diagonal
        seen = self._sum(self.vectors[:, i] / self.divisors)
        column = -seen
        outside = 1 / self.damping
        return column.at[i].add(outside)

    def _sum(self, weights: Float[Array, " m"]) -> Float[Array, " d"]:
        """`sum_j w_j v_j`."""
        return jnp.matmul(weights, self.vectors, precision=_EXACT)


def inverse_of_rows(
    rows: Float[Array, "m d"],
    damping: Float[Array, ""] | float,
) -> RowInverse:
    """Inverse of the damped empirical Fisher `(1/m) sum_j g_j g_j^T + damping I` of some gradients.

    `v_j = F_{j-1}^{-1} g_j` by the Sherman-Morrison formula, one gradient after the other; `O(m^2 d)`
    once, `O(m d)` for a product, the diagonal or a column. It is the same matrix as that of `mfac`,
    whose products with gradients alone are cheaper by the matrix of their products.

    Args:
      rows: gradients of examples or of small batches, as vectors.
      damping: positive.

    Returns:
      A `RowInverse`: `.product(x)`, `.diagonal()`, `.column(i)`.

    Raises:
      ValueError: a damping that is not positive.

    >>> inverse = inverse_of_rows(jnp.array([[2.0, 0.0], [0.0, 0.0]]), 1.0)
    >>> print(inverse.product(jnp.ones(2)), inverse.diagonal())
    [0.3333333 1.       ] [0.3333333 1.       ]

    Reference: Frantar, Kurtic & Alistarh, M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information (2021), the static algorithm.
    """
    check_number("inverse_of_rows", "damping", damping, above=0)
    m = len(rows)
    damping = jnp.asarray(damping, rows.dtype)

    def one(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        vectors, divisors = found  # zero and one where they are still to be made
        so_far = RowInverse(vectors, divisors, damping)
        row = rows[i]
        # v_i = F_{i-1}^{-1} g_i and q_i = m + g_i^T v_i
        v = so_far.product(row)
        divisor = m + jnp.vdot(row, v)
        return vectors.at[i].set(v), divisors.at[i].set(divisor)

    # of the type of the rows, which may differ between devices
    no_vectors = jnp.zeros_like(rows)
    no_divisors = jnp.ones_like(rows, shape=m)
    start = no_vectors, no_divisors
    vectors, divisors = jax.lax.fori_loop(0, m, one, start)
    return RowInverse(vectors, divisors, damping)
