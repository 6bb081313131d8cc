"""Factorisations of symmetric positive semi-definite matrices, at full precision."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg import lapack
from kfac_optax.linalg.triangular import inverse_from_cholesky


class Eigen(NamedTuple):
    """Eigendecomposition `vectors @ diag(values) @ vectors.T`, eigenvalues clamped at zero."""

    vectors: Float[Array, "n n"]
    values: Float[Array, " n"]


_ROUNDING = 4  # what lies below so many units of rounding of the largest eigenvalue is noise


def damped_quotient(
    v: Array,
    values: Array,
    damping: Array,
    *,
    exact: bool = False,
) -> Array:
    """`V / (values + damping)`, entry by entry, and zero where the divisor is below rounding of the
    largest eigenvalue.

    The pseudo-inverse of what is singular to working precision:
    `values + damping <= 4 eps max(values)` says nothing about its direction, and dividing by it
    would only blow rounding up. Larger dampings are exact.

    Args:
      v: right-hand side in the eigenbasis.
      values: eigenvalues, not negative, of a shape that fits.
      damping: added to them, not negative.
      exact: the values are no sums with rounding of the largest in them (diagonals): only below
        `eps^2` nothing is known.

    >>> print(damped_quotient(jnp.ones(3), jnp.array([2.0, 1e-9, 0.0]), jnp.float32(0.0)))
    [0.5 0.  0. ]
    """
    total, known = _damped(values, damping, exact)
    quotient = v / total
    return jnp.where(known, quotient, 0)


def damped_root(
    v: Array,
    values: Array,
    damping: Array,
    *,
    exact: bool = False,
) -> Array:
    """`V / sqrt(values + damping)`: what has to be applied twice to be `damped_quotient`, with its
    zeros.

    >>> print(damped_root(jnp.ones(3), jnp.array([4.0, 1.0, 0.0]), jnp.float32(0.0)))
    [0.5 1.  0. ]
    """
    total, known = _damped(values, damping, exact)
    quotient = v / jnp.sqrt(total)
    return jnp.where(known, quotient, 0)


def damped_logdet(
    values: Array,
    damping: Array,
    *,
    exact: bool = False,
) -> Array:
    """`sum log(values + damping)` without the entries that `damped_quotient` leaves out.

    >>> print(damped_logdet(jnp.array([1.0, 1e-9, 0.0]), jnp.float32(0.0)))
    0.0
    """
    total, _ = _damped(values, damping, exact)
    return jnp.sum(jnp.log(total))


def _damped(
    values: Array,
    damping: Array,
    exact: bool,
) -> tuple[Array, Array]:
    """`values + damping`, one where rounding hides it, and whether it is known."""
    total = values + damping
    largest = jnp.max(values, initial=0)
    eps = jnp.finfo(values.dtype).eps
    # sums over rows carry rounding of their largest entry; diagonals measured entry by entry do not
    relative = eps * eps if exact else _ROUNDING * eps
    noise = relative * largest
    known = total > noise
    return jnp.where(known, total, 1), known


def at_least_rounding(shift: Array, scale: Array) -> Array:
    """A divisor no smaller than rounding of the eigenvalues, whose size `scale` is: what is
    singular stays invertible.

    >>> print(at_least_rounding(jnp.float32(0.5), jnp.float32(1.0)))
    0.5
    """
    eps = jnp.finfo(shift.dtype).eps
    rounding = _ROUNDING * eps * scale
    return jnp.maximum(shift, rounding)


def symmetrize(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`(M + M^T) / 2`."""
    twice = matrix + matrix.T
    return twice / 2


def psd_eigh(matrix: Float[Array, "n n"]) -> Eigen:
    """Eigendecomposition of a symmetric PSD matrix; rounding below zero is clamped.

    >>> eigen = psd_eigh(jnp.diag(jnp.array([2.0, 0.0])))
    >>> print(eigen.values)
    [0. 2.]
    """
    # eigenvalues in rising order
    values, vectors = lapack.eigh(symmetrize(matrix), symmetrize_input=False)
    return Eigen(vectors, jnp.maximum(values, 0))


def psd_root(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """`R` with `R R^T = M`, and `log det M`, of a positive definite matrix.

    In the determinant eigenvalues are at least rounding of the largest one. A Cholesky factor
    would be cheaper, and NaN where rounding makes one of them negative.

    >>> root, logdet = psd_root(jnp.diag(jnp.array([4.0, 0.25])))
    >>> print(root @ root.T, logdet)
    [[4.   0.  ]
     [0.   0.25]] 0.0
    """
    vectors, values = psd_eigh(matrix)
    # R = U diag(sqrt(d)), log det M = sum_i log d_i
    root = vectors * jnp.sqrt(values)
    known = at_least_rounding(values, values[-1])
    return root, jnp.sum(jnp.log(known))


def psd_inverse(
    matrix: Float[Array, "n n"],
    shift: Float[Array, ""],
) -> Float[Array, "n n"]:
    """`(M + shift I)^{-1}` by Cholesky; NaN where the shifted matrix is not positive definite.

    The shift is at least rounding of the trace, `2 eps tr M`, so that a singular `M` has a finite
    inverse.

    >>> print(psd_inverse(jnp.diag(jnp.array([3.0, 15.0])), jnp.float32(1.0)))
    [[0.25   0.    ]
     [0.     0.0625]]
    """
    return cholesky_inverse(damped(matrix, shift))


def shift_for(shift: Float[Array, ""], trace: Float[Array, ""]) -> Float[Array, ""]:
    """A shift of at least `2 eps tr M`, with which `M` has a Cholesky factor.

    >>> print(shift_for(jnp.float32(0.5), jnp.float32(1.0)))
    0.5
    """
    eps = jnp.finfo(trace.dtype).eps
    return jnp.maximum(shift, 2 * eps * trace)


def damped(
    matrix: Float[Array, "n n"],
    shift: Float[Array, ""],
) -> Float[Array, "n n"]:
    """`M + shift I`, made symmetric, with a shift as in `shift_for`.

    >>> print(damped(jnp.zeros((1, 1)), jnp.float32(0.5)))
    [[0.5]]
    """
    shift = shift_for(shift, jnp.trace(matrix))
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return symmetrize(matrix) + shift * identity


def cholesky_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`M^{-1}` of a symmetric matrix; NaN where it is not positive definite.

    >>> print(cholesky_inverse(4 * jnp.eye(1)))
    [[0.25]]
    """
    # LAPACK wants columns one after another: of the transpose, which is the same, they are
    lower = lapack.cholesky(matrix.T, symmetrize_input=False)
    return inverse_from_cholesky(lower)
