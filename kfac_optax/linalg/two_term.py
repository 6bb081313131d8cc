"""Exact inverse of the sum or difference of two Kronecker products, `A (x) B +- C (x) D`.

Whatever diagonalises both matrices of one side at the same time turns the operator into a diagonal
one. `V [p, q]`, with `A, C [p, p]` acting from the left and `B, D [q, q]` from the right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import at_least_rounding, psd_eigh, symmetrize
from kfac_optax.linalg.kronecker_products import sandwich

_LARGEST = 1 - 1e-6  # keeps the difference positive definite where rounding would make it singular


class Pencil(NamedTuple):
    """Diagonalises two symmetric matrices at once: `K^T M K = I`, `K^T N K = diag(s)`."""

    vectors: Float[Array, "n n"]  # K
    values: Float[Array, " n"]  # s


def inverse_root(
    matrix: Float[Array, "n n"],
    shift: Float[Array, ""] | float = 0.0,
    *,
    singular: bool = False,
) -> Float[Array, "n n"]:
    """`W` with `W^T (M + shift I) W = I`: an inverse square root of a PSD matrix, up to a rotation
    from the right.

    Eigenvalues below rounding of the largest one are raised to that, so that a singular `M` has a
    finite answer.

    Args:
      matrix: `M`.
      shift: added to the eigenvalues.
      singular: give directions in which `M + shift I` vanishes to working precision zero columns
        (the pseudo-inverse) instead of infinite ones.

    >>> print(inverse_root(3 * jnp.eye(2), 1.0))
    [[0.5 0. ]
     [0.  0.5]]
    """
    eigen = psd_eigh(matrix)
    values = eigen.values + shift
    if not singular:
        positive = at_least_rounding(values, values[-1])
        return eigen.vectors / jnp.sqrt(positive)
    # below n eps of the largest a direction is singular to working precision
    rounding = values.size * jnp.finfo(values.dtype).eps
    kept = values > values[-1] * rounding
    roots = jnp.sqrt(jnp.where(kept, values, 1))
    return jnp.where(kept, eigen.vectors / roots, 0)


def pencil(
    m: Float[Array, "n n"],
    n: Float[Array, "n n"],
    shift: Float[Array, ""] | float = 0.0,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Pencil:
    """`K = W E` for `W = (M + shift I)^{-1/2}` and `W^T N W = E diag(s) E^T`.

    Two eigendecompositions, the second of which needs the first; `n` need not be positive.
    `M + shift I` must be positive definite.

    >>> print(pencil(4 * jnp.eye(2), jnp.diag(jnp.array([2.0, 8.0]))).values)
    [0.5 2. ]
    """
    # W^T (M + shift I) W = I, so the eigenvectors E of W^T N W diagonalise both
    root = inverse_root(m, shift)
    whitened = sandwich(root.T, n, root, precision=precision)
    values, rotation = lapack.eigh(symmetrize(whitened))
    return Pencil(jnp.matmul(root, rotation, precision=precision), values)


def two_term_solve(
    left: Pencil,
    right: Pencil,
    v: Float[Array, "p q"],
    *,
    minus: bool = False,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "p q"]:
    """`(A (x) B + C (x) D)^{-1} V = K1 [(K1^T V K2) / (1 + s1 s2^T)] K2^T`, or the same with `-`.

    Args:
      left: `pencil(A, C)`.
      right: `pencil(B, D)`.
      v: right-hand side; `A V B + C V D` is the operator.
      minus: `A (x) B - C (x) D`. Both `s` then have to lie in [0, 1] up to rounding, and are
        clipped to `1 - 1e-6`.
      precision: matmul precision.

    >>> eye = jnp.eye(2)
    >>> print(two_term_solve(pencil(eye, eye), pencil(eye, 3 * eye), eye))
    [[0.25 0.  ]
     [0.   0.25]]

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), appendix B.
    """
    # with `-`, 1 - s1 s2^T must stay positive
    upper = _LARGEST if minus else None
    of_left = jnp.clip(left.values, 0, upper)
    of_right = jnp.clip(right.values, 0, upper)
    product = of_left[:, None] * of_right
    # in the common eigenbasis the operator is the diagonal 1 +- s1 s2^T
    rotated = sandwich(left.vectors.T, v, right.vectors, precision=precision)
    diagonal = 1 - product if minus else 1 + product
    scaled = rotated / diagonal
    return sandwich(left.vectors, scaled, right.vectors.T, precision=precision)
