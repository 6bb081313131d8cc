"""Online updates of truncated eigendecompositions: new columns under exponential averaging, at linear cost."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._validate import check_number
from kfac_optax.linalg.factorize import symmetrize
from kfac_optax.linalg.low_rank import LowRank, largest, truncate


def brand_update(
    low: LowRank,
    columns: Float[Array, "d n"],
    decay: Any,
    *,
    rank: int,
    precision: jax.lax.PrecisionLike = "highest",
) -> LowRank:
    """The eigendecomposition of `decay X_r + (1 - decay) Y Y^T`, where `X_r` keeps the `rank` largest pairs of `low`.

    Exact but for that truncation, so it never exceeds the dense average. The result has `min(d, rank + n)` pairs; all
    serve the inverse, and the next update truncates. With `W = [U_r, Y]` and `Q R = W`, it is the eigendecomposition of
    `R diag(decay D_r, (1 - decay) I) R^T`, turned by `Q`: `O(d (rank + n)^2)`, and nothing of size `d x d`. Brand's
    factorisation orthogonalises only the new columns; doing so with the old ones too costs as much as turning them, serves
    full and deficient ranks without a case of its own, and keeps the columns orthonormal for good.

    Args:
      low: the decomposition so far, `zero(d, rank)` at first.
      columns: `Y`; for a factor `(1/N) sum a a^T` these are the `a` divided by `sqrt(N)`.
      decay: weight of the past.
      rank: pairs kept of `low`.
      precision: matmul precision.

    Raises:
      ValueError: `rank < 1`.

    >>> from kfac_optax.linalg.low_rank import to_dense, zero
    >>> low = brand_update(zero(3, 2), jnp.array([[2.0], [0.0], [0.0]]), 0.5, rank=2)
    >>> print(low.values)
    [2. 0. 0.]
    >>> low = brand_update(low, jnp.array([[0.0], [2.0], [0.0]]), 0.5, rank=2)
    >>> print(jnp.diag(to_dense(low)))
    [1. 2. 0.]

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022); Brand, Fast
    low-rank modifications of the thin singular value decomposition (2006).
    """
    check_number("brand_update", "rank", rank, at_least=1)
    kept = truncate(low, rank)
    decay = jnp.asarray(decay, low.values.dtype)
    columns = columns.astype(low.vectors.dtype)
    basis, triangle = jnp.linalg.qr(jnp.concatenate([kept.vectors, columns], 1))
    weights = jnp.concatenate([decay * kept.values, jnp.broadcast_to(1 - decay, columns.shape[1:])])
    middle = jnp.matmul(triangle * weights, triangle.T, precision=precision)
    values, rotation = jnp.linalg.eigh(symmetrize(middle))
    return largest(values, jnp.matmul(basis, rotation, precision=precision), values.shape[0])


def correct_directions(
    low: LowRank,
    matrix: Float[Array, "d d"],
    key: jax.Array,
    *,
    count: int,
    precision: jax.lax.PrecisionLike = "highest",
) -> LowRank:
    """Brings `count` random columns up to date with a matrix: `U_c^T X U_c = W L W^T`, `U_c <- U_c W`, `D_c <- L`.

    With all columns `U^T X U` becomes diagonal. Costs `2 d^2 count`.

    Args:
      low: the decomposition.
      matrix: the dense average it approximates.
      key: decides which columns.
      count: how many, at least one, at most all.
      precision: matmul precision.

    Raises:
      ValueError: `count < 1`.

    >>> low = LowRank(jnp.eye(3, 2), jnp.array([1.0, 1.0]))
    >>> print(correct_directions(low, jnp.diag(jnp.array([2.0, 5.0, 1.0])), jax.random.key(0), count=2).values)
    [5. 2.]

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    check_number("correct_directions", "count", count, at_least=1)
    held = low.values.shape[0]
    chosen = jax.random.permutation(key, held)[: min(count, held)]
    part = low.vectors[:, chosen]
    middle = jnp.matmul(part.T, jnp.matmul(matrix, part, precision=precision), precision=precision)
    values, rotation = jnp.linalg.eigh(symmetrize(middle))
    vectors = low.vectors.at[:, chosen].set(jnp.matmul(part, rotation, precision=precision))
    corrected = low.values.at[chosen].set(jnp.maximum(values, 0))
    order = jnp.argsort(-corrected)
    return LowRank(vectors[:, order], corrected[order])
