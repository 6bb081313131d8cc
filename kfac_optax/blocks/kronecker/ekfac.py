"""Eigenvalue-corrected K-FAC: the eigenbasis of `A (x) G` with the true second moments of the
gradient in it. George et al. (2018).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Use
from kfac_optax.blocks.kronecker.kronecker import EigenInverse, Factors, kronecker
from kfac_optax.blocks.refusals import given_outputs
from kfac_optax.linalg.example_moments import example_moments, example_rows
from kfac_optax.linalg.factorize import Eigen, damped_logdet, damped_quotient, damped_root
from kfac_optax.linalg.kronecker_products import sandwich


class CorrectedInverse(NamedTuple):
    """The eigenbasis of the last refresh, and the moments measured in it since."""

    inputs: Eigen
    outputs: Eigen
    moments: Float[Array, "p q"]
    measured: Float[Array, ""]  # statistics in the moments; zero: they are the eigenvalues' product


def ekfac_block(*, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """Eigenvalue-corrected Kronecker block `F ~ (U_A (x) U_G) diag(S) (U_A (x) U_G)^T`.

    `U_A` and `U_G` are the eigenvectors of the averaged factors, as in `kronecker("eigh")`. In
    place of the products of their eigenvalues come the second moments of the gradients
    `D_b [p, q]` of single examples in that basis,

        S = (1/N) sum_b (U_A^T D_b U_G)^2        entry by entry,

    the diagonal of the exact Fisher block there, so that no other diagonal in this basis is nearer
    to it in the Frobenius norm. Rows of an example (positions, patches, uses of the layer) are
    added up before squaring. The solve is exactly damped, `V [p, q]`:
    `U_A [(U_A^T V U_G) / (S + damping)] U_G^T`.

    A refresh makes a new basis, and `S` starts again: it is `s_A s_G^T`, that of K-FAC, until the
    next statistic takes its place; later ones are averaged in as
    `S <- e S + (1 - e) S_new`, `e = min(1 - 1/k, decay)` with `k` counting the statistics since the
    refresh. So several statistics should fall between two refreshes.

    `multiply`, and with it `factor_metric`, is the product with `A (x) G`.

    The statistics are taken of whole examples: axis 0 of the layer's rows has to be the examples.
    Where terms of one example have losses of their own, `ggn` and `fisher` measure `S` right on
    average over statistics (see `ggn` for the random signs).

    Args:
      precision: matmul precision of factor products, moments and solves.

    Returns:
      A `Block`.

    >>> block = ekfac_block()
    >>> factors = Factors(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(1))
    >>> inverse = block.factorize(factors, jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel())
    [0.5  0.25]

    Reference: George, Laurent, Bouthillier, Ballas & Vincent, Fast Approximate Natural Gradient
      Descent in a Kronecker-factored Eigenbasis (2018).
    """
    return eigenvalue_corrected(kronecker("eigh", precision=precision), "ekfac", precision)


def eigenvalue_corrected(
    plain: Block,
    name: str,
    precision: jax.lax.PrecisionLike,
) -> Block:
    """`ekfac_block` in the eigenbasis of another block.

    Args:
      plain: whose `factorize` gives an `EigenInverse`, and whose `measure` takes whole examples.
      name: for the coverage table and errors.
      precision: matmul precision of moments and solves.
    """

    def measure(
        a: Array, g: Array | None, use: Use, inverse: CorrectedInverse
    ) -> tuple[Factors, Array]:
        g = given_outputs(name, g)
        factors = plain.measure(a, g, use)
        return factors, moments(a, g, use, inverse)

    def moments(
        a: Array,
        g: Array,
        use: Use,
        inverse: CorrectedInverse,
    ) -> Array:
        # rows in the eigenbasis, U_A^T a and U_G^T g: D_b becomes U_A^T D_b U_G
        a, g = example_rows(a, g, use)
        a = jnp.matmul(a, inverse.inputs.vectors, precision=precision)
        g = jnp.matmul(g, inverse.outputs.vectors, precision=precision)
        return example_moments(a, g, precision=precision) / use.examples

    def factorize(factors: Factors, damping: Array) -> CorrectedInverse:
        # S = s_A s_G^T until a statistic is measured in the new basis
        basis: EigenInverse = plain.factorize(factors, damping)
        product = basis.inputs.values[:, None] * basis.outputs.values
        return CorrectedInverse(*basis, product, jnp.zeros((), product.dtype))

    def absorb(
        inverse: CorrectedInverse, new: Array, factors: Factors, damping: Array, average: Average
    ) -> CorrectedInverse:
        measured = inverse.measured + 1
        # of all statistics there are at least as many: the second is one of this basis, or `decay`
        usual = average.weight.astype(measured.dtype)
        weight = jnp.minimum(1 - 1 / measured, usual)
        new = new.astype(measured.dtype)
        blended = weight * inverse.moments + (1 - weight) * new
        return inverse._replace(moments=blended, measured=measured)

    def solve(inverse: CorrectedInverse, v: Array, damping: Array) -> Array:
        # U_A [(U_A^T V U_G) / (S + damping)] U_G^T
        u_a, u_g = inverse.inputs.vectors, inverse.outputs.vectors
        rotated = sandwich(u_a.T, v, u_g, precision=precision)
        scaled = damped_quotient(rotated, inverse.moments, damping)
        return sandwich(u_a, scaled, u_g.T, precision=precision)

    def root_solve(inverse: CorrectedInverse, z: Array, damping: Array) -> Array:
        # noise is as white in the eigenbasis as it is outside
        scaled = damped_root(z, inverse.moments, damping)
        u_a, u_g = inverse.inputs.vectors, inverse.outputs.vectors
        return sandwich(u_a, scaled, u_g.T, precision=precision)

    def logdet(
        inverse: CorrectedInverse,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        return damped_logdet(inverse.moments, damping)

    return Block(
        name,
        plain.init,
        measure,
        factorize,
        solve,
        plain.multiply,
        absorb=absorb,
        absorbs="means",
        reads_inverse=True,
        per_example=True,
        root_solve=root_solve,
        logdet=logdet,
    )
