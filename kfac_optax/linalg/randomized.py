"""Randomised eigendecomposition of PSD matrices: quadratic instead of cubic in the dimension."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._validate import check_choice, check_number
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import psd_eigh, symmetrize
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.truncated_eigen import LowRank, largest

VARIANTS = ("svd", "symmetric")


def range_finder(
    matrix: Float[Array, "d d"],
    key: jax.Array,
    *,
    size: int,
    power_iterations: int = 0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d size"]:
    """Orthonormal columns that nearly span the leading eigenvectors: those of
    `X^(1 + power_iterations) Omega`.

    `Omega` is `d x size` and normal. The columns are made orthonormal after every product: without
    that, in float32, all would point to the first eigenvector after a few.

    >>> basis = range_finder(jnp.diag(jnp.array([1.0, 0.0, 0.0])), jax.random.key(0), size=1)
    >>> print(jnp.abs(basis).ravel())
    [1. 0. 0.]
    """
    # Omega [d, size]
    dimension = matrix.shape[0]
    draw = jax.random.normal(key, (dimension, size), matrix.dtype)
    for _ in range(1 + power_iterations):
        image = jnp.matmul(matrix, draw, precision=precision)
        draw, _ = lapack.qr(image)
    return draw


def randomized_eigh(
    matrix: Float[Array, "d d"],
    key: jax.Array,
    *,
    rank: int,
    oversampling: int = 10,
    power_iterations: int = 1,
    variant: str = "svd",
    precision: jax.lax.PrecisionLike = "highest",
) -> LowRank:
    """The `rank` leading eigenpairs of a PSD matrix from a random sketch, in
    `O(d^2 (rank + oversampling))`.

    With `Q` the orthonormal basis of the sketch:

    - `"svd"`: singular values and right singular vectors `V` of `Q^T X`, so `X ~ V D V^T`. The
      right ones have seen `X` once more than the basis.
    - `"symmetric"`: `eigh(Q^T X Q)`; a product less, and a little less accurate.

    Where `rank + oversampling` is not below the dimension it is the whole eigendecomposition, cut
    off.

    Args:
      matrix: symmetric PSD.
      key: a new one for every call.
      rank: how many pairs; at most the dimension is given back.
      oversampling: further columns of the sketch.
      power_iterations: further products with the matrix before the basis is taken.
      variant: `"svd"` or `"symmetric"`.
      precision: matmul precision.

    Raises:
      ValueError: `rank < 1`, a negative number, an unknown variant.

    >>> low = randomized_eigh(jnp.diag(jnp.array([1.0, 5.0, 0.0, 3.0])), jax.random.key(0), rank=2, oversampling=1)
    >>> [f"{value:.3f}" for value in low.values]
    ['5.000', '3.000']

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022); Halko, Martinsson & Tropp, Finding Structure with Randomness (2011).
    """
    where = "randomized_eigh"
    check_number(where, "rank", rank, at_least=1)
    check_number(where, "oversampling", oversampling, at_least=0)
    check_number(where, "power_iterations", power_iterations, at_least=0)
    check_choice(where, "variant", variant, VARIANTS)
    # a sketch as wide as the matrix saves nothing
    size = rank + oversampling
    if size >= matrix.shape[0]:
        eigen = psd_eigh(matrix)
        return largest(eigen.values, eigen.vectors, rank)
    # Q [d, size], then X Q
    basis = range_finder(
        matrix, key, size=size, power_iterations=power_iterations, precision=precision
    )
    image = jnp.matmul(matrix, basis, precision=precision)
    # Q^T X Q = W diag(d) W^T, eigenvectors Q W
    if variant == "symmetric":
        middle = symmetrize(jnp.matmul(basis.T, image, precision=precision))
        values, rotation = lapack.eigh(middle)
        vectors = jnp.matmul(basis, rotation, precision=precision)
        return largest(values, vectors, rank)
    # image = (Q^T X)^T, so its left singular vectors, by those of a triangle
    orthonormal, triangle = lapack.qr(image)
    triangle = after(triangle, orthonormal)
    left, values, _ = lapack.svd(triangle)
    vectors = jnp.matmul(orthonormal, left[:, :rank], precision=precision)
    return LowRank(vectors, values[:rank])
