"""The nearest Kronecker product to the Fisher block of a layer, by power iterations that never form
it.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array

from kfac_optax._types import Average, Block, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.kronecker.kpsvd_terms import (
    Term,
    balanced,
    identity_term,
    next_directions,
    power_step,
    start_directions,
)
from kfac_optax.blocks.kronecker.kronecker import DenseInverse, EigenInverse, Factors, kronecker
from kfac_optax.blocks.kronecker.tkfac import INVERSES
from kfac_optax.blocks.refusals import given_outputs
from kfac_optax.linalg.example_moments import example_rows
from kfac_optax.linalg.kronecker_products import sandwich


class PowerInverse(NamedTuple):
    """The factorised product, and the directions of the next power step."""

    product: EigenInverse | DenseInverse
    directions: Factors


def kpsvd_block(inverse: str = "eigh", *, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """Kronecker block `F ~ A (x) G` nearest to the Fisher block in the Frobenius norm.

    With the entries of `F = (1/N) sum_b vec(D_b) vec(D_b)^T`, `D_b [p, q]` the gradient of an
    example, in another order, `M = (1/N) sum_b vec(a_b a_b^T) vec(g_b g_b^T)^T` for one row per
    example, the nearest product is the leading term of the SVD of `M`. Its power iteration takes

        M S = (1/N) sum_b D_b S D_b^T,    M^T R = (1/N) sum_b D_b^T R D_b,

    from the rows of a batch, at about the cost of the factors of `kronecker`. Every statistic is one
    such step from the directions `R`, `S` that the average of those before has, and

        F ~ (M S) (x) (M^T R) / <R, M S>,

    with all three averaged. That is `tkfac_block(sharing="exact")` after the first statistic, which
    starts from identities, and the best product once the directions have settled, at the rate
    `sigma_2 / sigma_1` for each statistic where `decay` is small. Both factors stay positive
    semi-definite. Rows of an example (positions, patches, uses of the layer) are added up first.

    Args:
      inverse: `"eigh"` (exact damping) or `"cholesky"` (factored damping), as in `kronecker`.
      precision: matmul precision of statistics and solves.

    Returns:
      A `Block` with `Term` as statistic.

    Raises:
      ValueError: unknown `inverse`; at the first update, an estimator that measures inputs only.

    >>> import jax.numpy as jnp
    >>> block = kpsvd_block()
    >>> term = Term(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(1), jnp.float32(1.0))
    >>> inverse = block.factorize(term, jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel())
    [0.5  0.25]

    Reference: Koroko et al., Efficient Approximations of the Fisher Matrix in Neural Networks using
      Kronecker Product Singular Value Decomposition (2022).
    """
    check_choice("kpsvd_block", "inverse", inverse, INVERSES)
    plain = kronecker(inverse, precision=precision)

    def measure(
        a: Array,
        g: Array | None,
        use: Use,
        inverse: PowerInverse,
    ) -> tuple[Term, tuple]:
        # linear in F: means over parts of a batch, pullbacks and devices need no care
        a, g = example_rows(a, given_outputs("kpsvd_block", g), use)
        return power_step(a, g, inverse.directions, use.examples, precision), ()

    def factorize(term: Term, damping: Array) -> PowerInverse:
        # first refresh: identities of unit norm as directions
        product = plain.factorize(balanced(term), damping)
        return PowerInverse(product, start_directions(term))

    def refresh(
        kept: PowerInverse,
        term: Term,
        damping: Array,
        count: Array,
    ) -> PowerInverse:
        # directions follow the statistics, not the refreshes
        return kept._replace(product=plain.factorize(balanced(term), damping))

    def absorb(
        kept: PowerInverse, new: tuple, term: Term, damping: Array, average: Average
    ) -> PowerInverse:
        # from the average with this statistic in it, so that noise of one batch has little weight
        return kept._replace(directions=next_directions(kept.directions, term))

    def solve(kept: PowerInverse, v: Array, damping: Array) -> Array:
        return plain.solve(kept.product, v, damping)

    def multiply(term: Term, v: Array) -> Array:
        # (A (x) G) V = A V G
        factors = balanced(term)
        return sandwich(factors.inputs, v, factors.outputs, precision=precision)

    return Block(
        f"kpsvd ({inverse})",
        identity_term,
        measure,
        factorize,
        solve,
        multiply,
        refresh=refresh,
        absorb=absorb,
        absorbs="means",
        reads_inverse=True,
        per_example=True,
    )
