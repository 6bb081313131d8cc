"""Frequent directions: a PSD sum followed by a few eigenpairs and a bound on what they miss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Numeric
from kfac_optax.linalg.factorize import after, at_least_rounding, psd_eigh
from kfac_optax.linalg.truncated_eigen import LowRank, zero


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
    roots = sketch.low.vectors * jnp.sqrt(held * sketch.low.values)
    both = jnp.concatenate([roots, jnp.sqrt(new) * columns], axis=1)
    # the eigenproblem on the smaller side, with orthonormal columns either way
    basis = None
    if both.shape[1] < dimension:
        basis, triangle = jnp.linalg.qr(both)
        # the basis is formed apart from the triangle; no two factorisations at a time
        both = after(triangle, basis)
    gram = jnp.matmul(both, both.T, precision=jax.lax.Precision.HIGHEST)
    vectors, values = psd_eigh(gram)
    vectors, values = vectors[:, ::-1], values[::-1]
    if basis is not None:
        vectors = jnp.matmul(basis, vectors, precision=jax.lax.Precision.HIGHEST)
    # c = sigma_{k+1}^2 is taken off those kept, and bounds what is left out
    cut = values[rank] if len(values) > rank else jnp.zeros((), values.dtype)
    kept = jnp.maximum(values[:rank] - cut, 0)
    return Sketch(LowRank(vectors[:, :rank], kept), held * sketch.tail + cut)


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
    largest = sketch.low.values[0] + sketch.tail
    outside = sketch.tail + ridge * largest
    totals = jnp.append(sketch.low.values + outside, outside)
    known = totals >= at_least_rounding(jnp.zeros_like(largest), largest)
    powers = jnp.where(known, jnp.where(known, totals, 1) ** (-1 / p), 0)
    powers = jnp.where(largest > 0, powers, 1)
    return powers[:-1], powers[-1]
