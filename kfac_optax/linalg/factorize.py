"""Factorisations of symmetric positive semi-definite matrices, at full precision."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Eigen(NamedTuple):
    """Eigendecomposition `vectors @ diag(values) @ vectors.T`, eigenvalues clamped at zero."""

    vectors: Float[Array, "n n"]
    values: Float[Array, " n"]


def symmetrize(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`(M + M^T) / 2`."""
    return (matrix + matrix.T) / 2


def psd_eigh(matrix: Float[Array, "n n"]) -> Eigen:
    """Eigendecomposition of a symmetric PSD matrix; rounding below zero is clamped.

    >>> eigen = psd_eigh(jnp.diag(jnp.array([2.0, 0.0])))
    >>> print(eigen.values)
    [0. 2.]
    """
    values, vectors = jnp.linalg.eigh(symmetrize(matrix), symmetrize_input=False)
    return Eigen(vectors, jnp.maximum(values, 0))


def psd_inverse(matrix: Float[Array, "n n"], shift: Float[Array, ""]) -> Float[Array, "n n"]:
    """`(M + shift I)^{-1}` by Cholesky; NaN where the shifted matrix is not positive definite.

    >>> print(psd_inverse(jnp.diag(jnp.array([3.0, 15.0])), jnp.float32(1.0)))
    [[0.25   0.    ]
     [0.     0.0625]]
    """
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    lower = jnp.linalg.cholesky(symmetrize(matrix) + shift * identity, symmetrize_input=False)
    half = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return jnp.matmul(half.T, half, precision=jax.lax.Precision.HIGHEST)
