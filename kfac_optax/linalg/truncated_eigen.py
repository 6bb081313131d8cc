"""Truncated eigendecompositions of PSD matrices, and solves with them that cost no more than their
vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import damped_logdet, damped_quotient, damped_root


class LowRank(NamedTuple):
    """`vectors @ diag(values) @ vectors.T` with orthonormal columns, the largest of the
    non-negative values first.

    Columns whose value is zero may be zero themselves.
    """

    vectors: Float[Array, "d m"]
    values: Float[Array, " m"]


def zero(
    dimension: int,
    rank: int,
    dtype: Any = jnp.float32,
) -> LowRank:
    """The zero matrix, with the first `min(rank, dimension)` unit vectors; where online updates
    start.

    >>> print(zero(3, 2).vectors.shape, zero(3, 5).values)
    (3, 2) [0. 0. 0.]
    """
    rank = min(rank, dimension)
    vectors = jnp.eye(dimension, rank, dtype=dtype)
    return LowRank(vectors, jnp.zeros(rank, dtype))


def of_diagonal(diagonal: Float[Array, " d"], rank: int) -> LowRank:
    """The `min(rank, d)` largest pairs of a diagonal matrix.

    >>> print(of_diagonal(jnp.array([1.0, 3.0, 2.0]), 2).vectors)
    [[0. 0.]
     [1. 0.]
     [0. 1.]]
    """
    # eigenvectors of a diagonal matrix are unit vectors
    dimension = len(diagonal)
    values, order = jax.lax.top_k(diagonal, min(rank, dimension))
    vectors = jax.nn.one_hot(order, dimension, axis=0, dtype=diagonal.dtype)
    return LowRank(vectors, values)


def largest(
    values: Float[Array, " n"],
    vectors: Float[Array, "d n"],
    rank: int,
) -> LowRank:
    """The `rank` largest of eigenvalues in rising order, as `eigh` gives them; negative ones become
    zero.
    """
    falling_vectors, falling = vectors[:, ::-1], values[::-1]
    kept = jnp.maximum(falling[:rank], 0)
    return LowRank(falling_vectors[:, :rank], kept)


def truncate(low: LowRank, rank: int) -> LowRank:
    """The part with the `rank` largest values.

    >>> print(truncate(LowRank(jnp.eye(3), jnp.array([3.0, 2.0, 1.0])), 1).values)
    [3.]
    """
    return LowRank(low.vectors[:, :rank], low.values[:rank])


def to_dense(
    low: LowRank,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d d"]:
    """`U diag(D) U^T`, for tests and plots."""
    scaled = low.vectors * low.values
    return jnp.matmul(scaled, low.vectors.T, precision=precision)


def low_rank_solve(
    low: LowRank,
    v: Float[Array, "d k"],
    shift: Any,
    *,
    rest: Any = 0.0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d k"]:
    """`(U (D - rest) U^T + (rest + shift) I)^{-1} V` in `O(d m k)`; the `d x d` matrix is never
    formed.

    `= U [(D + shift)^{-1} - (rest + shift)^{-1}] U^T V + V / (rest + shift)`.

    Args:
      low: the decomposition.
      v: right-hand sides.
      shift: damping; where an eigenvalue and it are below rounding of the largest one, the
        pseudo-inverse is meant.
      rest: what eigenvalues that were left out are taken for: 0, or the smallest one kept (spectrum
        continuation).
      precision: matmul precision.

    >>> low = LowRank(jnp.eye(2, 1), jnp.array([3.0]))
    >>> print(low_rank_solve(low, jnp.ones((2, 1)), 1.0).ravel())
    [0.25 1.  ]
    >>> print(low_rank_solve(low, jnp.ones((2, 1)), 1.0, rest=3.0).ravel())
    [0.25 0.25]

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022); spectrum continuation: Puiu, Brand New K-FACs (2022).
    """
    # U^T V, [m, k]
    coordinates = jnp.matmul(low.vectors.T, v, precision=precision)
    if low.values.shape[0] == v.shape[0]:  # nothing is left out
        scaled = damped_quotient(coordinates, low.values[:, None], shift)
        return jnp.matmul(low.vectors, scaled, precision=precision)
    # the eigenvalue of everything left out comes last, so that rounding is judged by the largest of
    # all
    rest = jnp.asarray(rest, low.values.dtype)
    values = jnp.append(low.values, rest)
    inverses = damped_quotient(jnp.ones_like(values), values, shift)
    outside = inverses[-1]
    inside = inverses[:-1] - outside
    scaled = inside[:, None] * coordinates
    # back from coordinates, and everything as if it were outside
    seen = jnp.matmul(low.vectors, scaled, precision=precision)
    return seen + outside * v


def low_rank_root(
    low: LowRank,
    z: Float[Array, "d k"],
    shift: Any,
    *,
    rest: Any = 0.0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d k"]:
    """The symmetric square root of what `low_rank_solve` applies, times `Z`, at the same cost.

    `= U [(D + shift)^{-1/2} - (rest + shift)^{-1/2}] U^T Z + Z / sqrt(rest + shift)`.

    >>> low = LowRank(jnp.eye(2, 1), jnp.array([3.0]))
    >>> print(low_rank_root(low, jnp.ones((2, 1)), 1.0).ravel())
    [0.5 1. ]
    """
    # as `low_rank_solve`, with roots of the quotients
    coordinates = jnp.matmul(low.vectors.T, z, precision=precision)
    if low.values.shape[0] == z.shape[0]:  # nothing is left out
        scaled = damped_root(coordinates, low.values[:, None], shift)
        return jnp.matmul(low.vectors, scaled, precision=precision)
    rest = jnp.asarray(rest, low.values.dtype)
    values = jnp.append(low.values, rest)
    # (D + shift)^{-1/2}, and (rest + shift)^{-1/2} behind it
    roots = damped_root(jnp.ones_like(values), values, shift)
    outside = roots[-1]
    inside = roots[:-1] - outside
    scaled = inside[:, None] * coordinates
    seen = jnp.matmul(low.vectors, scaled, precision=precision)
    return seen + outside * z


def low_rank_logdet(
    low: LowRank,
    shift: Any,
    *,
    rest: Any = 0.0,
) -> Float[Array, ""]:
    """`log det` of the matrix that `low_rank_solve` inverts, `sum log(D + shift)` and
    `log(rest + shift)` for every eigenvalue that is left out.

    >>> low = LowRank(jnp.eye(3, 1), jnp.array([3.0]))
    >>> print(jnp.exp(low_rank_logdet(low, 1.0, rest=1.0)).round(3))
    16.0
    """
    dimension, kept = low.vectors.shape
    # one eigenvalue for every direction that the columns do not span
    others = jnp.full(dimension - kept, rest, low.values.dtype)
    # a column of zeros takes nothing away from what is left out
    lengths = jnp.sum(jnp.square(low.vectors), 0)
    values = low.values
    if dimension > kept:
        values = jnp.where(lengths > 0, values, rest)
    everything = jnp.append(values, others)
    return damped_logdet(everything, shift)


def beyond(low: LowRank, used: Any, value: Any) -> LowRank:
    """The same pairs, with `value` for the eigenvalues behind the first `used`.

    >>> print(beyond(LowRank(jnp.eye(3), jnp.array([3.0, 2.0, 1.0])), 2, 0.5).values)
    [3.  2.  0.5]
    """
    place = jnp.arange(low.values.shape[0])
    values = jnp.where(place < used, low.values, value)
    return low._replace(values=values)


def rank_for(
    low: LowRank,
    trace: Float[Array, ""],
    error: Any,
) -> Int[Array, ""]:
    """The fewest pairs that hold the share `1 - error` of a matrix's trace; all of them where they
    hold less.

    >>> print(rank_for(LowRank(jnp.eye(3), jnp.array([3.0, 0.9, 0.1])), jnp.float32(4.0), 0.05))
    2
    """
    # the trace that the first k pairs hold, for k = 1, 2, ..., against the share that is asked for
    wanted = (1 - error) * trace
    enough = jnp.cumsum(low.values) >= wanted
    fewest = jnp.argmax(enough) + 1
    everything = low.values.shape[0]
    rank = jnp.where(enough.any(), fewest, everything)
    return rank.astype(jnp.int32)


def mean_left_out(
    low: LowRank,
    trace: Float[Array, ""],
    used: Any,
) -> Float[Array, ""]:
    """Mean of the eigenvalues behind the first `used`, `(tr X - sum D) / (d - used)`, between zero
    and the last of those.

    >>> print(mean_left_out(LowRank(jnp.eye(3, 1), jnp.array([3.0])), jnp.float32(4.0), 1))
    0.5
    """
    # rounding can make the difference negative, and nothing left out is above the last one in use
    in_use = beyond(low, used, 0).values
    rest = trace - jnp.sum(in_use)
    left_out = jnp.maximum(low.vectors.shape[0] - used, 1)
    mean = rest / left_out
    return jnp.clip(mean, 0, low.values[used - 1])


def captured_energy(low: LowRank, trace: Float[Array, ""]) -> Float[Array, ""]:
    """The share `sum(D) / tr X` of a matrix's trace that its decomposition holds; one for the zero
    matrix.

    >>> print(captured_energy(LowRank(jnp.eye(2, 1), jnp.array([3.0])), jnp.float32(4.0)))
    0.75
    """
    share = jnp.sum(low.values) / positive_or_one(trace)
    return jnp.where(trace > 0, share, 1)
