"""Frequent directions: a PSD sum followed by a few eigenpairs and a bound on what they miss."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Numeric
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import at_least_rounding, psd_eigh
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.truncated_eigen import LowRank, zero

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Sketch(NamedTuple):
    """`U diag(D) U^T <= C <= U diag(D) U^T + tail I` for the matrix `C` that is followed."""

    low: LowRank
    tail: Float[Array, ""]  # the mass that escaped, as the shift that bounds it


def no_sketch(
    dimension: int,
    rank: int,
    dtype: Any = jnp.float32,
) -> Sketch:
    """The sketch of the zero matrix, with `min(rank, dimension)` directions.

    >>> print(no_sketch(3, 2).low.values, no_sketch(3, 2).tail)
    [0. 0.] 0.0
    """
    return Sketch(zero(dimension, rank, dtype), jnp.zeros((), dtype))


def absorb_columns(
    sketch: Sketch,
    columns: Float[Array, "n m"],
    held: Numeric,
    new: Numeric,
) -> Sketch:
    """The sketch of `held C + new G G^T`, from that of `C`.

    With `sigma` the singular values of `[sqrt(held D) U, sqrt(new) G]` and `c = sigma_{k+1}^2`:
    the first `k` directions with `D = sigma^2 - c`, and `tail <- held tail + c`. Where `k = n`
    nothing is cut off, and the sketch is `C` itself.

    Args:
      sketch: of `C [n, n]`, `k` directions.
      columns: `G`.
      held: weight of what the sketch has seen.
      new: weight of the columns.

    >>> sketch = absorb_columns(no_sketch(3, 1), jnp.diag(jnp.array([2.0, 1.0, 0.0])), 1.0, 1.0)
    >>> print(sketch.low.values, sketch.tail)
    [3.] 1.0

    References: Ghashami, Liberty, Phillips & Woodruff, Frequent Directions: Simple and
      Deterministic Matrix Sketching (2016); Feinberg, Chen, Sun, Anil & Hazan, Sketchy:
      Memory-efficient Adaptive Regularization with Frequent Directions (2023), algorithm 1.
    """
    dimension, rank = sketch.low.vectors.shape
    # B = [sqrt(held D) U, sqrt(new) G], whose product B B^T is the sum
    low = sketch.low
    past = low.vectors * jnp.sqrt(held * low.values)
    news = jnp.sqrt(new) * columns
    both = jnp.concatenate([past, news], axis=1)
    # the eigenproblem on the smaller side, with orthonormal columns either way
    basis = None
    if both.shape[1] < dimension:
        basis, triangle = lapack.qr(both)
        # the basis is formed apart from the triangle; no two factorisations at a time
        both = after(triangle, basis)
    gram = _product(both, both.T)
    vectors, values = psd_eigh(gram)
    # the largest first
    vectors = vectors[:, ::-1]
    values = values[::-1]
    if basis is not None:
        vectors = _product(basis, vectors)
    # c = sigma_{k+1}^2 is taken off those kept, and bounds what is left out
    cut = jnp.zeros((), values.dtype)
    if len(values) > rank:
        cut = values[rank]
    kept = jnp.maximum(values[:rank] - cut, 0)
    low = LowRank(vectors[:, :rank], kept)
    return Sketch(low, held * sketch.tail + cut)


def root_weights(
    sketch: Sketch,
    p: int,
    ridge: Numeric,
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """`(D + tail + shift)^(-1/p)` on the directions of a sketch, and `(tail + shift)^(-1/p)` on all
    others, `shift = ridge (D_1 + tail)`.

    Zero where that is below rounding of the largest value; ones for the sketch of nothing.

    >>> inside, outside = root_weights(Sketch(LowRank(jnp.eye(2, 1), 12 * jnp.ones(1)), 4.0), 2, 0.0)
    >>> print(inside, outside)
    [0.25] 0.5
    """
    values = sketch.low.values
    largest = values[0] + sketch.tail
    # tail + shift, and behind the directions what all others have
    outside = sketch.tail + ridge * largest
    totals = jnp.append(values + outside, outside)
    rounding = at_least_rounding(jnp.zeros_like(largest), largest)
    known = totals >= rounding
    # a base that is safe where the power is not used
    base = jnp.where(known, totals, 1)
    powers = jnp.where(known, base ** (-1 / p), 0)
    powers = jnp.where(largest > 0, powers, 1)
    return powers[:-1], powers[-1]
