"""Inverses of triangles, and of symmetric matrices from their Cholesky factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg import lapack
from kfac_optax.linalg.in_order import after

_HIGHEST = jax.lax.Precision.HIGHEST
_SPLIT = 256  # wider factors are worth products in place of a part of the triangular solve
_LEAF = 512  # widest triangle that is solved as it is, below the first split


def inverse_from_cholesky(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`M^{-1} = (C^{-1})^T C^{-1}` of `M = C C^T`.

    On a CPU a wide `C` is inverted by halves: a triangular solve there runs on one core and knows
    of no zeros in its right-hand side, where products run on all.

    Args:
      lower: the Cholesky factor `C`; what lies above its diagonal is zero.

    >>> print(inverse_from_cholesky(jnp.array([[2.0, 0.0], [0.0, 0.5]])))
    [[0.25 0.  ]
     [0.   4.  ]]
    """
    if len(lower) <= _SPLIT:
        return _whole(lower)
    return jax.lax.platform_dependent(lower, cpu=_by_halves, default=_whole)


def _whole(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    # symmetric by construction, and the columns of the transpose lie as LAPACK leaves them
    half = inverse_of_lower(lower).T
    columns = ((1,), (1,)), ((), ())
    return jax.lax.dot_general(half, half, columns, precision=_HIGHEST)


def _by_halves(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    # C^{-1} = [[P, 0], [-R, S]]
    p, r, s = _halves(lower)
    # (C^{-1})^T C^{-1} = [[P^T P + R^T R, -R^T S], [-S^T R, S^T S]]
    below = -_product(s.T, r)
    first = _product(p.T, p) + _product(r.T, r)
    return jnp.block([[first, below.T], [below, _product(s.T, s)]])


class _Halves(NamedTuple):
    """`[[first, 0], [-below, last]]`."""

    first: Float[Array, "h h"]
    below: Float[Array, "k h"]
    last: Float[Array, "k k"]


def _halves(lower: Float[Array, "n n"]) -> _Halves:
    """Those of `C^{-1}`: with `C = [[P, 0], [R, S]]` they are `P^{-1}, S^{-1} R P^{-1}, S^{-1}`."""
    h = len(lower) // 2
    first = _inverse(lower[:h, :h])
    last = _inverse(after(lower[h:, h:], first))
    below = _product(_product(last, lower[h:, :h]), first)
    return _Halves(first, below, last)


def _inverse(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    if len(lower) <= _LEAF:
        return inverse_of_lower(lower)
    first, below, last = _halves(lower)
    return jnp.block([[first, jnp.zeros_like(below.T)], [-below, last]])


def inverse_of_lower(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`L^{-1}` of a lower triangle.

    >>> print(inverse_of_lower(jnp.array([[2.0, 0.0], [1.0, 0.5]])))
    [[ 0.5  0. ]
     [-1.   2. ]]
    """
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return lapack.solve_triangular(lower, identity, lower=True)


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=_HIGHEST)
