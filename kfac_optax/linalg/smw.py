"""Damped solves in the space of samples: `(J^T J + damping I) x = g` by the kernel `J J^T`, of which
there are as few rows as samples.

Everything is asked of two functions, `forward: v -> J v` and its transpose `adjoint: u -> J^T u`,
with `u [n]` and `v` any tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import PyTree
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import symmetrize

Forward = Callable[[PyTree], Array]
Adjoint = Callable[[Array], PyTree]


class KernelInverse(NamedTuple):
    """`(J J^T + damping I)^{-1}` as a factor, or a smooth pseudo-inverse by eigenvectors."""

    factor: Float[Array, "n n"]  # lower Cholesky factor, or eigenvectors
    values: Float[Array, " n"] | None  # eigenvalues
    damping: Float[Array, ""]
    cutoff: Any = None


def kernel_of(
    forward: Forward,
    adjoint: Adjoint,
    n: int,
    dtype: Any,
    *,
    chunk: int = 8,
) -> Float[Array, "n n"]:
    """`J J^T`, one product in both directions for each of its `n` columns.

    Args:
      forward: `v -> J v`.
      adjoint: `u -> J^T u`.
      n: rows of `J`.
      dtype: of `u`.
      chunk: columns that are made at the same time; so many trees like `v` exist.

    >>> J = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> print(kernel_of(lambda v: J @ v, lambda u: J.T @ u, 2, jnp.float32))
    [[5. 2.]
     [2. 1.]]
    """

    def column(i: jax.Array) -> jax.Array:
        # J J^T e_i
        unit = (jnp.arange(n) == i).astype(dtype)
        return forward(adjoint(unit))

    kernel = jax.lax.map(column, jnp.arange(n), batch_size=min(chunk, n))
    return symmetrize(kernel)


def factor_kernel(
    kernel: Float[Array, "n n"],
    damping: Any,
    *,
    cutoff: Any = None,
) -> KernelInverse:
    """Factors what `kernel_solve` needs.

    Args:
      kernel: `K = J J^T`.
      damping: added to its eigenvalues.
      cutoff: `None` for the Cholesky factor of `K + damping I`; nothing else is added, so it is NaN
        where that is not positive definite in floating point. A number makes it a pseudo-inverse:
        an eigenvalue `s` counts by `r^6 / (r^6 + cutoff^6)`, `r = s / max(s)`.

    Reference: Chen & Heyl, Empowering deep neural quantum states through efficient optimization
      (2024), for the smooth cutoff.
    """
    damping = jnp.asarray(damping, kernel.dtype)
    # K + damping I = L L^T
    if cutoff is None:
        identity = jnp.eye(len(kernel), dtype=kernel.dtype)
        damped = kernel + damping * identity
        lower = lapack.cholesky(damped, symmetrize_input=False)
        return KernelInverse(lower, None, damping)
    # K = U diag(s) U^T
    values, vectors = lapack.eigh(kernel, symmetrize_input=False)
    return KernelInverse(vectors, jnp.maximum(values, 0), damping, cutoff)


def kernel_solve(inverse: KernelInverse, b: Float[Array, " n"]) -> Float[Array, " n"]:
    """`(K + damping I)^{-1} b`, or the pseudo-inverse.

    >>> K = jnp.diag(jnp.array([3.0, 0.0]))
    >>> print(kernel_solve(factor_kernel(K, 1.0), jnp.ones(2)))
    [0.25 1.  ]
    >>> print(kernel_solve(factor_kernel(K, 0.0, cutoff=1e-3), 3 * jnp.ones(2)))
    [1. 0.]
    """
    if inverse.values is None:
        return lapack.cho_solve(inverse.factor, b)
    return _along_eigenvectors(inverse, b, _shares(inverse))


def solve_in_samples(
    inverse: KernelInverse,
    adjoint: Adjoint,
    b: Float[Array, " n"],
) -> PyTree:
    """`J^T (J J^T + damping I)^{-1} b`, which is `(J^T J + damping I)^{-1} J^T b`.

    >>> J = jnp.array([[2.0, 0.0]])
    >>> print(solve_in_samples(factor_kernel(J @ J.T, 1.0), lambda u: J.T @ u, jnp.array([5.0])))
    [2. 0.]
    """
    return adjoint(kernel_solve(inverse, b))


def solve_in_parameters(
    inverse: KernelInverse,
    forward: Forward,
    adjoint: Adjoint,
    g: PyTree,
    *,
    refine: int = 1,
) -> PyTree:
    """`(J^T J + damping I)^{-1} g` for any `g`, by the Sherman-Morrison-Woodbury formula.

    `(g - J^T (J J^T + damping I)^{-1} J g) / damping` is a difference of numbers that may be much
    larger than itself; `refine` steps of iterative refinement take most of that error away. With a
    cutoff it is `J^T (K + damping I)^+ K^+ J g`: what `g` has outside of the rows of `J` is left
    out.

    Args:
      inverse: of the kernel.
      forward: `v -> J v`.
      adjoint: `u -> J^T u`.
      g: right-hand side, a tree.
      refine: number of refinements, each a product in both directions.

    >>> J = jnp.array([[2.0, 0.0]])
    >>> products = lambda v: J @ v, lambda u: J.T @ u
    >>> print(solve_in_parameters(factor_kernel(J @ J.T, 1.0), *products, jnp.array([5.0, 1.0])))
    [1. 1.]

    Reference: Ren & Goldfarb, Efficient Subsampled Gauss-Newton and Natural Gradient Methods for
      Training Neural Networks (2019).
    """
    # with K = U diag(s) U^T, J^T K^+ (K + damping I)^+ J g: one more division by s
    if inverse.values is not None:
        some = inverse.values > 0
        divisor = jnp.where(some, inverse.values, 1)
        shares = _shares(inverse) / divisor
        once_more = jnp.where(some, shares, 0)
        return adjoint(_along_eigenvectors(inverse, forward(g), once_more))

    def once(g: PyTree) -> PyTree:
        # (g - J^T (J J^T + damping I)^{-1} J g) / damping
        back = adjoint(kernel_solve(inverse, forward(g)))
        return jax.tree.map(lambda x, y: (x - y) / inverse.damping, g, back)

    x = once(g)
    # x <- x + (J^T J + damping I)^{-1} residual
    for _ in range(refine):
        left = residual_of(forward, adjoint, inverse.damping, x, g)
        x = jax.tree.map(jnp.add, x, once(left))
    return x


def residual_of(
    forward: Forward,
    adjoint: Adjoint,
    damping: jax.Array,
    x: PyTree,
    g: PyTree,
) -> PyTree:
    """`g - (J^T J + damping I) x`."""

    def left(g: Array, product: Array, x: Array) -> Array:
        return g - product - damping * x

    return jax.tree.map(left, g, adjoint(forward(x)), x)


def _along_eigenvectors(
    inverse: KernelInverse,
    b: jax.Array,
    factors: jax.Array,
) -> jax.Array:
    # U diag(factors) U^T b
    rotated = jnp.matmul(inverse.factor.T, b, precision="highest")
    return jnp.matmul(inverse.factor, factors * rotated, precision="highest")


def _shares(inverse: KernelInverse) -> jax.Array:
    """Inverse eigenvalues, damped, with the share of small ones going to zero."""
    values = inverse.values
    assert values is not None
    tiny = jnp.finfo(values.dtype).tiny
    # r = s / max(s)
    largest = jnp.max(values, initial=0)
    relative = values / jnp.maximum(largest, tiny)
    cutoff = jnp.asarray(inverse.cutoff, values.dtype)
    # r^6 / (r^6 + c^6) by logarithms: sixth powers of small numbers are zero in single precision
    log_relative = jnp.log(jnp.maximum(relative, tiny))
    distance = log_relative - jnp.log(jnp.maximum(cutoff, tiny))
    total = jnp.where(values > 0, values + inverse.damping, 1)
    share = jax.nn.sigmoid(6 * distance)
    return jnp.where(values > 0, share / total, 0)
