"""Online updates of truncated eigendecompositions: new columns under exponential averaging, at
linear cost.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._validate import check_number
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import symmetrize
from kfac_optax.linalg.truncated_eigen import LowRank, largest, truncate

_ROUNDING = 4  # eigenvalues below so many units of rounding of the largest are noise


def brand_update(
    low: LowRank,
    columns: Float[Array, "d n"],
    decay: Any,
    *,
    rank: int,
    keep: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> LowRank:
    """The eigendecomposition of `decay X_r + (1 - decay) Y Y^T`, where `X_r` keeps the `rank`
    largest pairs of `low`.

    Exact but for that truncation, so it never exceeds the dense average. With
    `Z = [sqrt(decay D_r) U_r, sqrt(1 - decay) Y]`, it is `Z Z^T`, and the small matrix
    `Z^T Z = V L V^T` gives its pairs `(Z V L^{-1/2}, L)`: products of `O(d (rank + n)^2)`, nothing
    of size `d x d`. Brand's factorisation orthogonalises the new columns against the old ones; here
    a step of Newton and Schulz makes the columns orthonormal to rounding, whatever those before it
    were. Eigenvalues below rounding of the largest one are zero, and so are their columns.

    Args:
      low: the decomposition so far, `zero(d, rank)` at first.
      columns: `Y`; for a factor `(1/N) sum a a^T` these are the `a` divided by `sqrt(N)`.
      decay: weight of the past.
      rank: pairs kept of `low`.
      keep: pairs of the result, the largest; `None` for all `min(d, rank + n)`.
      precision: matmul precision.

    Raises:
      ValueError: `rank < 1` or `keep < 1`.

    >>> from kfac_optax.linalg.truncated_eigen import to_dense, zero
    >>> low = brand_update(zero(3, 2), jnp.array([[2.0], [0.0], [0.0]]), 0.5, rank=2)
    >>> [f"{value:.3f}" for value in low.values]
    ['2.000', '0.000', '0.000']
    >>> low = brand_update(low, jnp.array([[0.0], [2.0], [0.0]]), 0.5, rank=2)
    >>> print(jnp.allclose(to_dense(low), jnp.diag(jnp.array([1.0, 2.0, 0.0])), atol=1e-6))
    True

    Reference: Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022);
      Brand, Fast low-rank modifications of the thin singular value decomposition (2006).
    """
    check_number("brand_update", "rank", rank, at_least=1)
    if keep is not None:
        check_number("brand_update", "keep", keep, at_least=1)
    # Z = [sqrt(decay D_r) U_r, sqrt(1 - decay) Y], [d, rank + n]
    kept = truncate(low, rank)
    decay = jnp.asarray(decay, low.values.dtype)
    old = kept.vectors * jnp.sqrt(decay * kept.values)
    columns = columns.astype(low.vectors.dtype)
    new = columns * jnp.sqrt(1 - decay)
    z = jnp.concatenate([old, new], 1)
    pairs = min(z.shape)
    if keep is not None:
        pairs = min(pairs, keep)
    # Z^T Z = V L V^T, no larger than [rank + n, rank + n]
    inner = jnp.matmul(z.T, z, precision=precision)
    values, rotation = lapack.eigh(symmetrize(inner))
    top = largest(values, rotation, pairs)
    # U = Z V L^{-1/2}; where L is rounding its column becomes zero
    eps = jnp.finfo(values.dtype).eps
    rounding = _ROUNDING * eps * top.values[0]
    certain = top.values > rounding
    values = jnp.where(certain, top.values, 0)
    # a divisor that is safe where it is not used
    roots = jnp.sqrt(jnp.where(certain, values, 1))
    scale = jnp.where(certain, 1 / roots, 0)
    vectors = jnp.matmul(z, top.vectors * scale, precision=precision)
    # Newton and Schulz: U <- U (3 I - U^T U) / 2
    inner = jnp.matmul(vectors.T, vectors, precision=precision)
    product = jnp.matmul(vectors, inner, precision=precision)
    return LowRank(1.5 * vectors - 0.5 * product, values)


def correct_directions(
    low: LowRank,
    matrix: Float[Array, "d d"],
    key: jax.Array,
    *,
    count: int,
    precision: jax.lax.PrecisionLike = "highest",
) -> LowRank:
    """Brings `count` random columns up to date with a matrix: `U_c^T X U_c = W L W^T`,
    `U_c <- U_c W`, `D_c <- L`.

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
    # without replacement
    count = min(count, held)
    order = jax.random.permutation(key, held)
    chosen = order[:count]
    part = low.vectors[:, chosen]
    # U_c^T X U_c = W L W^T
    image = jnp.matmul(matrix, part, precision=precision)
    middle = jnp.matmul(part.T, image, precision=precision)
    values, rotation = lapack.eigh(symmetrize(middle))
    rotated = jnp.matmul(part, rotation, precision=precision)
    vectors = low.vectors.at[:, chosen].set(rotated)
    # rounding below zero is none
    positive = jnp.maximum(values, 0)
    corrected = low.values.at[chosen].set(positive)
    # the largest first again
    order = jnp.argsort(-corrected)
    return LowRank(vectors[:, order], corrected[order])
