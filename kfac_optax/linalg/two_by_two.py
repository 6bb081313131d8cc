"""Eigendecompositions of many matrices of one or two rows, without a LAPACK call."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import Eigen


def small_psd_eigh(matrix: Float[Array, "*batch p p"]) -> Eigen:
    """Eigendecompositions of symmetric PSD matrices of size one or two, in closed form.

    The larger eigenvalue comes from the Jacobi rotation, the smaller one as the determinant over
    the larger: its error is then relative to the smaller diagonal entry, and a rank-one matrix
    stays rank one up to that.

    Returns:
      `Eigen(vectors [*batch, p, p], values [*batch, p])`, the order of the values being that of the
      diagonal.

    Raises:
      ValueError: the matrices are larger.

    >>> print(small_psd_eigh(jnp.array([[[1.0, 1.0], [1.0, 1.0]]])).values)
    [[0. 2.]]
    """
    size = matrix.shape[-1]
    if size == 1:
        values = jnp.maximum(matrix[..., 0], 0)
        return Eigen(jnp.ones_like(matrix), values)
    if size != 2:
        raise ValueError(
            f"small_psd_eigh: matrices have {size} rows; expected 1 or 2. Use psd_eigh for larger "
            "matrices."
        )
    # the matrix is [[a, b], [b, c]]
    a = matrix[..., 0, 0]
    c = matrix[..., 1, 1]
    b = (matrix[..., 0, 1] + matrix[..., 1, 0]) / 2
    gap = c - a
    # tan of the Jacobi angle, the smaller one: 2 b / (gap +- sqrt(gap^2 + 4 b^2)) by sign of the
    # gap
    length = jnp.abs(gap) + jnp.hypot(gap, 2 * b)
    signed = jnp.where(gap < 0, -2, 2)
    tangent = signed * b / positive_or_one(length)
    # columns (cos, -sin) and (sin, cos) are the eigenvectors
    secant = jnp.sqrt(1 + tangent * tangent)
    cosine = 1 / secant
    sine = tangent * cosine
    first_row = jnp.stack([cosine, sine], -1)
    second_row = jnp.stack([-sine, cosine], -1)
    vectors = jnp.stack([first_row, second_row], -2)
    # larger = max(a, c) + |t b|; smaller = (a c - b^2) / larger, without overflow of the products
    low = jnp.minimum(a, c)
    high = jnp.maximum(a, c)
    larger = high + jnp.abs(tangent * b)
    divisor = positive_or_one(larger)
    smaller = low * (high / divisor) - b * (b / divisor)
    smaller = jnp.maximum(smaller, 0)
    larger = jnp.maximum(larger, 0)
    # the first eigenvector is near the first unit vector
    first_larger = gap < 0
    first = jnp.where(first_larger, larger, smaller)
    second = jnp.where(first_larger, smaller, larger)
    return Eigen(vectors, jnp.stack([first, second], -1))
