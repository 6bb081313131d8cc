"""How PSGD fits a matrix of low rank beside the identity, times a diagonal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._tree import all_finite, select
from kfac_optax.linalg import lapack
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.in_order import after

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class LowRank(NamedTuple):
    """`Q = (I + U V^T) diag(d)`; a scale of zero says that nothing is known yet."""

    u: Float[Array, "n r"]
    v: Float[Array, "n r"]
    d: Float[Array, " n"]


def times(q: LowRank, x: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """`Q x`, row by row."""
    scaled = q.d * x
    return scaled + _product(scaled, q.v, q.u)


def transposed_times(q: LowRank, x: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """`Q^T x`, row by row."""
    moved = x + _product(x, q.u, q.v)
    return q.d * moved


def preconditioned(q: LowRank, x: Float[Array, " n"]) -> Float[Array, " n"]:
    """`P x = Q^T Q x`.

    >>> q = LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]]), jnp.array([1.0, 2.0]))
    >>> print(preconditioned(q, jnp.array([1.0, 1.0])))  # Q = [[1, 2], [0, 2]]
    [ 3. 10.]
    """
    (product,) = transposed_times(q, times(q, x[None]))
    return product


def _product(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`right left^T x`, row by row."""
    # left^T x, r numbers of every row
    small = _matmul(x, left)
    return _matmul(small, right.T)


class _Inner(NamedTuple):
    """`I + U^T V` in factors, which every inverse of `Q` needs."""

    lu: Float[Array, "r r"]
    pivots: Array


def _factored(q: LowRank) -> _Inner:
    identity = jnp.eye(q.u.shape[1], dtype=q.u.dtype)
    inner = identity + _matmul(q.u.T, q.v)
    return _Inner(*lapack.lu_factor(inner))


def _against(q: LowRank, inner: _Inner, x: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """`(I + V U^T)^{-1} x = x - V (I + U^T V)^{-1} U^T x`, row by row."""
    small = _matmul(q.u.T, x.T)
    solved = lapack.lu_solve(*inner, small)
    return x - _matmul(q.v, solved).T


def _against_transposed(
    q: LowRank,
    inner: _Inner,
    x: Float[Array, "k n"],
) -> Float[Array, "k n"]:
    """`(I + U V^T)^{-1} x = x - U (I + U^T V)^{-T} V^T x`, row by row."""
    small = _matmul(q.v.T, x.T)
    solved = lapack.lu_solve(*inner, small, trans=1)
    return x - _matmul(q.u, solved).T


def _inverse_of(q: LowRank, inner: _Inner) -> Float[Array, "n r"]:
    """`V (I + U^T V)^{-1}`: `Q^{-T} = (I - V (I + U^T V)^{-1} U^T) diag(d)^{-1}`."""
    return lapack.lu_solve(*inner, q.v.T, trans=1).T


def _largest(
    rows: jax.Array,
    left: jax.Array,
    right: jax.Array,
) -> jax.Array:
    """Bound of the squared norm of `(I + left right^T) diag(x)`, mean over rows `x`.

    It bounds the second derivative of the criterion by the scales, while the first, a sum over
    their interactions, may be near zero.
    """
    # |diag(x)| + |left| |right^T diag(x)|, spectral and Frobenius norms
    each = jnp.max(jnp.abs(rows), axis=1, initial=0)
    of_right = jnp.sum(jnp.square(right), axis=1)
    beside = jnp.sqrt(jnp.square(rows) @ of_right)
    bound = each + jnp.linalg.norm(left) * beside
    return jnp.mean(jnp.square(bound))


class Bounds(NamedTuple):
    """How large the derivatives of late were, by what they are of; each `shape=()`.

    They fall slowly and are never below that of the step: divided by its own bound alone, a large
    gradient would count as little as a small one, and the mean step would vanish elsewhere.
    """

    d: jax.Array
    u: jax.Array
    v: jax.Array


_KEPT = 0.95  # of a bound, from fit to fit


def fitted(
    q: LowRank,
    bounds: Bounds,
    h: Float[Array, "k n"],
    v: Float[Array, "k n"],
    rate: Float[Array, ""],
    of_u: Any,
) -> tuple[LowRank, Bounds]:
    """One step of the scales and of `U` or `V` on `k` pairs `(h, v)`.

    The criterion is the mean of `|a|^2 + |b|^2` with `a = Q h` and `b = Q^{-T} v`. For
    `Q (I + diag(e))` its derivative by `e` is twice `h * P h - v * P^{-1} v`; for
    `(I + X V^T) Q`, which is `U <- U + X (I + V^T U)`, that by `X` is twice
    `a (V^T a)^T - b (V^T b)^T`; for `(I + U Y^T) Q`, which is `V <- V + (I + V U^T) Y`, that by `Y`
    the same with `U`. All move by `rate` over a bound of their change, means of the `k` pairs.

    Args:
      q: as it was.
      bounds: as they were, zero at first.
      h: gradients.
      v: standard normal numbers.
      rate: at most 1.
      of_u: whether `U` moves, and not `V`.

    Returns:
      The new `Q`, its `U` and `V` made equally large, and the bounds; both as they were where the
      step is not finite.
    """
    inner = _factored(q)
    divisor = positive_or_one(q.d)
    a = times(q, h)
    b = _against(q, inner, v / divisor)
    # h * P h - v * P^{-1} v, half the derivative by e
    of_h = jnp.mean(h * transposed_times(q, a), axis=0)
    of_v = jnp.mean(v * _against_transposed(q, inner, b) / divisor, axis=0)
    difference = of_h - of_v
    # of two sets of triangular solves at a time each may wait for the other
    inverse = _inverse_of(q, after(inner, of_v))
    own = _largest(q.d * h, q.u, q.v)
    own = own + _largest(v / divisor, inverse, q.u)
    # no scale may change its sign
    own = jnp.maximum(own, jnp.max(jnp.abs(difference), initial=0))
    of_d = _followed(bounds.d, own)
    d = q.d * (1 - rate * difference / positive_or_one(of_d))

    def move_u(q: LowRank) -> tuple[LowRank, Bounds]:
        change, own = _relative(a, b, q.v)
        bound = _followed(bounds.u, own)
        x = -rate * change / positive_or_one(bound)
        # U + X (I + V^T U)
        u = q.u + x + x @ (q.v.T @ q.u)
        return q._replace(u=u), Bounds(of_d, bound, bounds.v)

    def move_v(q: LowRank) -> tuple[LowRank, Bounds]:
        change, own = _relative(a, b, q.u)
        bound = _followed(bounds.v, own)
        y = -rate * change / positive_or_one(bound)
        # V + (I + V U^T) Y
        v = q.v + y + q.v @ (q.u.T @ y)
        return q._replace(v=v), Bounds(of_d, bounds.u, bound)

    with jax.default_matmul_precision("highest"):
        moved, new_bounds = jax.lax.cond(of_u, move_u, move_v, q._replace(d=d))
    new = _balanced(moved), new_bounds
    return select(all_finite(new), new, (q, bounds))


def _followed(bound: jax.Array, own: jax.Array) -> jax.Array:
    # never below that of this step
    average = _KEPT * bound + (1 - _KEPT) * own
    return jnp.maximum(average, own)


def _relative(
    a: jax.Array,
    b: jax.Array,
    side: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`a (S^T a)^T - b (S^T b)^T`, means of rows, and a bound of the norm of it times `S^T`."""
    small_a = a @ side
    small_b = b @ side
    bound = _lengths(a, small_a @ side.T) + _lengths(b, small_b @ side.T)
    change = a.T @ small_a - b.T @ small_b
    return change / len(a), bound


def _lengths(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over rows of `|x| |y|`."""
    of_x = jnp.linalg.norm(x, axis=1)
    of_y = jnp.linalg.norm(y, axis=1)
    return jnp.mean(of_x * of_y)


def _balanced(q: LowRank) -> LowRank:
    """`U` and `V` of one size, the product as it was; a side that is zero stays."""
    of_u = jnp.linalg.norm(q.u)
    of_v = jnp.linalg.norm(q.v)
    ratio = jnp.sqrt(positive_or_one(of_v) / positive_or_one(of_u))
    both = (of_u > 0) & (of_v > 0)
    ratio = jnp.where(both, ratio, 1)
    return q._replace(u=q.u * ratio, v=q.v / ratio)
