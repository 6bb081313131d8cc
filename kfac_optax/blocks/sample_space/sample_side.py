"""A Kronecker factor of one batch, inverted in the space of its rows where that is smaller."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.factorize import psd_inverse, shift_for


class RowSide(NamedTuple):
    """`X = U^T U` by its rows `U`: `(X + shift)^{-1} = (I - U^T M U) / shift`."""

    rows: Float[Array, "n d"]
    middle: Float[Array, "n n"]  # (U U^T + shift)^{-1}
    shift: Float[Array, ""]


class DenseSide(NamedTuple):
    """`(X + shift)^{-1}`, of a factor with no more coordinates than rows."""

    inverse: Float[Array, "d d"]


def described(rows: int, dimension: int) -> str:
    """How a factor is held, for the coverage table.

    >>> print(described(5, 40), "and", described(5, 3))
    5 rows of 40 and all 3
    """
    return f"{rows} rows of {dimension}" if rows < dimension else f"all {dimension}"


def side_of_mean(total: Array, dimension: int, rows: int) -> RowSide | DenseSide:
    """The inverse of a multiple of the identity."""
    # the smaller of the two matrices is inverted
    if rows >= dimension:
        return DenseSide(jnp.eye(dimension, dtype=total.dtype) / total)
    # X = total I: no rows, so that the inverse is 1 / shift
    nothing = jnp.zeros((rows, dimension), total.dtype)
    middle = jnp.zeros((rows, rows), total.dtype)
    return RowSide(nothing, middle, total)


def side_of_rows(
    rows: Array, shift: Array, precision: jax.lax.PrecisionLike
) -> RowSide | DenseSide:
    """`(U^T U + shift I)^{-1}`, the shift not below rounding of the trace."""
    # one for both of its places
    shift = shift_for(shift, jnp.sum(rows * rows))
    if rows.shape[0] >= rows.shape[1]:
        moment = jnp.matmul(rows.T, rows, precision=precision)
        return DenseSide(psd_inverse(moment, shift))
    gram = jnp.matmul(rows, rows.T, precision=precision)
    return RowSide(rows, psd_inverse(gram, shift), shift)


def solve_sample_side(
    side: RowSide | DenseSide, v: Array, precision: jax.lax.PrecisionLike
) -> Array:
    """`(X + shift)^{-1} V`, of columns `V [d, k]`."""
    if isinstance(side, DenseSide):
        return jnp.matmul(side.inverse, v, precision=precision)
    # (V - U^T (U U^T + shift I)^{-1} U V) / shift
    seen = jnp.matmul(side.rows, v, precision=precision)
    inside = jnp.matmul(side.middle, seen, precision=precision)
    back = jnp.matmul(side.rows.T, inside, precision=precision)
    return (v - back) / side.shift
