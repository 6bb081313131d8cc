"""Inverses of positive definite matrices by Newton's iteration, from the inverse of a near one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from kfac_optax._tree import select
from kfac_optax.linalg.factorize import cholesky_inverse, damped, symmetrize

_FAILED = 0.05  # a last residual above this is no inverse
_STALLED = 0.7  # a small residual that shrinks by less is rounding
_MOST = 16  # steps; each doubles the digits, or halves the largest eigenvalue that is too small


def newton_inverse(
    matrix: Float[Array, "n n"],
    shift: Float[Array, ""],
    start: Float[Array, "n n"],
) -> Float[Array, "n n"]:
    """`(M + shift I)^{-1}` by the iteration `X <- X (2 I - (M + shift I) X)` from `start`; by
    Cholesky where that does not converge.

    It takes products only, where a factorisation goes column by column. With
    `R = I - (M + shift I) X` the next residual is `R^2`, so that near `start` a few steps are
    enough. The start is divided by `1 + ||R|| / 2`: all eigenvalues of `R` are then below one in
    size, however far a symmetric positive definite `start` is. Batched by `vmap`, the factorisation
    runs only if one of the matrices needs it.

    Args:
      matrix: symmetric positive semi-definite.
      shift: not negative; raised to rounding of the trace as in `psd_inverse`.
      start: a symmetric positive definite matrix, best the inverse of one that is near; with any
        other the answer is that of Cholesky.

    Returns:
      The inverse, symmetric; NaN where `M + shift I` is not positive definite.

    >>> m = jnp.diag(jnp.array([3.0, 15.0]))
    >>> print(newton_inverse(m, jnp.float32(1.0), jnp.diag(jnp.array([0.2, 0.1]))).round(4))
    [[0.25   0.    ]
     [0.     0.0625]]

    Reference: Pan & Schreiber, An Improved Newton Iteration for the Generalized Inverse of a
      Matrix, with Applications (1991).
    """
    return _inverse(damped(matrix, shift), start)


class _Iterate(NamedTuple):
    x: Float[Array, "n n"]
    residual: Float[Array, "n n"]  # I - M X
    size: Float[Array, ""]  # its Frobenius norm
    shrinks: Bool[Array, ""]
    steps: Array


def _iterated(
    matrix: Float[Array, "n n"],
    start: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    """The last iterate, and whether it is an inverse."""

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    def residual(x: Array) -> Array:
        identity = jnp.eye(len(x), dtype=x.dtype)
        return identity - product(matrix, x)

    def better(x: Array, r: Array) -> Array:
        return symmetrize(x + product(x, r))

    # one more step squares it, and its square is rounding
    enough = jnp.finfo(matrix.dtype).eps ** 0.5

    def unfinished(state: _Iterate) -> Array:
        return state.shrinks & (state.size > enough) & (state.steps < _MOST)

    def step(state: _Iterate) -> _Iterate:
        x = better(state.x, state.residual)
        r = residual(x)
        size = jnp.linalg.norm(r)
        far = size > 0.5
        shrinks = (size < _STALLED * state.size) | far
        return _Iterate(x, r, size, shrinks, state.steps + 1)

    # eigenvalues of M X are positive and at most 1 + ||R||: below two after the division
    r = residual(start)
    part = 1 / (1 + jnp.linalg.norm(r) / 2)
    identity = jnp.eye(len(r), dtype=r.dtype)
    r = (1 - part) * identity + part * r  # of `part * start`
    size = jnp.linalg.norm(r)
    first = _Iterate(
        x=part * start,
        residual=r,
        size=size,
        # true, and of the type of the residual, which may differ between devices
        shrinks=size >= 0,
        steps=jnp.int32(0),
    )
    last = jax.lax.while_loop(unfinished, step, first)
    found = better(last.x, last.residual)
    return found, last.size < _FAILED


@custom_vmap
def _inverse(matrix: Array, start: Array) -> Array:
    x, good = _iterated(matrix, start)
    return jax.lax.cond(good, lambda: x, lambda: cholesky_inverse(matrix))


@_inverse.def_vmap
def _inverses(
    count: int,
    batched: list[bool],
    matrix: Array,
    start: Array,
) -> tuple[Array, bool]:
    """One decision for all: `vmap` of a branch would run both sides of it."""

    def with_axis(x: Array, has_axis: bool) -> Array:
        return x if has_axis else jnp.broadcast_to(x, (count, *x.shape))

    matrix, start = map(with_axis, (matrix, start), batched)
    # all matrices iterate together, until the slowest is done
    x, good = jax.vmap(_iterated)(matrix, start)

    def mended() -> Array:
        exact = jax.vmap(cholesky_inverse)(matrix)
        return select(good, x, exact)

    return jax.lax.cond(good.all(), lambda: x, mended), True
