"""The nearest Kronecker product to the Fisher block of a layer, by power iterations that never form
it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.kronecker import INVERSES, DenseInverse, EigenInverse, Factors, kronecker
from kfac_optax.linalg.example_moments import example_rows
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.rearrangement import contract


class Term(NamedTuple):
    """One power step from directions `R`, `S` of unit norm; all of it linear in the Fisher block."""

    inputs: Float[Array, "p p"]  # M S
    outputs: Float[Array, "q q"]  # M^T R
    scale: Float[Array, ""]  # <R, M S>


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

    def init(layer: Layer, dtype: jnp.dtype) -> Term:
        return identity_term(layer, dtype)

    def measure(a: Array, g: Array | None, use: Use, inverse: PowerInverse) -> tuple[Term, tuple]:
        a, g = whole_rows("kpsvd_block", a, g, use)
        return power_step(a, g, inverse.directions, use.examples, precision), ()

    def factorize(term: Term, damping: Array) -> PowerInverse:
        product = plain.factorize(_factors(term), damping)
        return PowerInverse(product, start_directions(term))

    def refresh(kept: PowerInverse, term: Term, damping: Array, count: Array) -> PowerInverse:
        return kept._replace(product=plain.factorize(_factors(term), damping))

    def absorb(
        kept: PowerInverse, new: tuple, term: Term, damping: Array, average: Average
    ) -> PowerInverse:
        return kept._replace(directions=next_directions(kept.directions, term))

    def solve(kept: PowerInverse, v: Array, damping: Array) -> Array:
        return plain.solve(kept.product, v, damping)

    def multiply(term: Term, v: Array) -> Array:
        factors = _factors(term)
        return sandwich(factors.inputs, v, factors.outputs, precision=precision)

    return Block(
        f"kpsvd ({inverse})",
        init,
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


def identity_term(layer: Layer, dtype: jnp.dtype) -> Term:
    """The step from identities where `F` is one."""
    p, q = layer.shape
    inputs, outputs = (jnp.sqrt(jnp.asarray(n, dtype)) for n in (q, p))
    eye_p, eye_q = jnp.eye(p, dtype=dtype), jnp.eye(q, dtype=dtype)
    return Term(inputs * eye_p, outputs * eye_q, inputs * outputs)


def start_directions(term: Term | Factors) -> Factors:
    """Identities of unit norm."""
    eyes = (jnp.eye(len(x), dtype=x.dtype) for x in (term.inputs, term.outputs))
    return Factors(*(unit(x, 0.0) for x in eyes))


def whole_rows(where: str, a: Array, g: Array | None, use: Use) -> tuple[Array, Array]:
    """`example_rows`, or an error where there are no output gradients."""
    if g is None:
        raise ValueError(
            f"{where}: needs output gradients, but this estimator measures inputs only. Use "
            "fisher, ggn or empirical_fisher, or another block (kronecker)."
        )
    return example_rows(a, g, use)


def power_step(
    a: Array, g: Array, directions: Factors, examples: int, precision: jax.lax.PrecisionLike
) -> Term:
    """Both products with the rearranged block, from rows."""
    inputs = contract(a, g, directions.outputs, precision=precision) / examples
    outputs = contract(g, a, directions.inputs, precision=precision) / examples
    return Term(inputs, outputs, jnp.vdot(directions.inputs, inputs, precision="highest"))


def next_directions(old: Factors, term: Term | Factors) -> Factors:
    """Those of the products, in unit norm."""
    return Factors(unit(term.inputs, old.inputs), unit(term.outputs, old.outputs))


def unit(x: Array, otherwise: Array | float) -> Array:
    """`x` with Frobenius norm one, or something else where it vanishes."""
    size = jnp.linalg.norm(x)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), otherwise)


def _factors(term: Term) -> Factors:
    """Two factors of about the same size with the product `(M S) (x) (M^T R) / <R, M S>`."""
    usable = term.scale > 0
    root = jnp.sqrt(jnp.where(usable, term.scale, 1))
    return Factors(*(jnp.where(usable, x / root, 0) for x in (term.inputs, term.outputs)))
