"""Kronecker block of an embedding table, whose one-hot inputs make one factor diagonal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.embedding.token_moments import (
    INVERSES,
    check_lookup,
    output_moment,
    token_counts,
)
from kfac_optax.linalg.factorize import (
    Eigen,
    damped_logdet,
    damped_quotient,
    damped_root,
    psd_eigh,
    psd_inverse,
    psd_root,
)
from kfac_optax.linalg.tikhonov import tikhonov_shifts


class TokenFactors(NamedTuple):
    """The factors of an embedding: `A = diag(counts)`, tokens per example, and `G = E[g g^T]`."""

    counts: Float[Array, " p"]
    outputs: Float[Array, "q q"]


class TokenEigenInverse(NamedTuple):
    """Counts and the eigendecomposition of `G`; the damping enters in every solve, exactly."""

    counts: Float[Array, " p"]
    outputs: Eigen


class TokenDenseInverse(NamedTuple):
    """`1 / (counts + pi sqrt(damping))` and `(G + sqrt(damping)/pi I)^{-1}`."""

    rows: Float[Array, " p"]
    outputs: Float[Array, "q q"]


Inverse = TokenEigenInverse | TokenDenseInverse


def embedding(inverse: str = "eigh", *, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """Kronecker block `F ~ diag(counts) (x) G` of an embedding table `[p, q]`: K-FAC with one-hot
    inputs.

    `counts [p] = (1/N) sum_rows w e_token`, `G = (1/rows) sum_rows g g^T`, the factors that a dense
    layer would have on one-hot inputs, without the `[p, p]` matrix. Solves, with `V [p, q]`:

    - `"eigh"`: exact damping, `[(V U) / (counts s^T + damping)] U^T` with `G = U diag(s) U^T`.
    - `"cholesky"`: factored Tikhonov,
      `(counts + pi sqrt(damping))^{-1} V (G + sqrt(damping)/pi I)^{-1}` with
      `pi = sqrt(mean(counts) / (tr G / q))`; the damping is the one of the last refresh.

    `measure` takes the tokens `[*rows]` as `a` and the vocabulary as `use.inputs`. Tokens beyond
    the vocabulary are not counted.

    Args:
      inverse: `"eigh"` or `"cholesky"`.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` with `TokenFactors` as statistic.

    Raises:
      ValueError: unknown `inverse`; `a` is not integer or `use.bias` is set.

    >>> import kfac_optax as ko
    >>> block = embedding()
    >>> use = Use(ko.testing.dense_layer(3, 1), 4, 4, jnp.float32)
    >>> print(block.measure(jnp.array([0, 2, 2, 2]), jnp.ones((4, 1)), use).counts)
    [0.25 0.   0.75]

    Reference: Eschenhagen et al., Kronecker-Factored Approximate Curvature for Modern Neural
      Network Architectures (2023), section 3, for weight sharing ("expand").
    """
    check_choice("embedding", "inverse", inverse, INVERSES)

    def measure(a: Array, g: Array | None, use: Use) -> TokenFactors:
        check_lookup("embedding", a, use)
        counts = token_counts(a, use)
        return TokenFactors(counts, output_moment(a, g, use, precision))

    def factorize(factors: TokenFactors, damping: Array) -> Inverse:
        # A = diag(counts), so only G is factorised
        counts, outputs = factors
        if inverse == "eigh":
            return TokenEigenInverse(counts, psd_eigh(outputs))
        # the mean eigenvalue of a diagonal matrix is its mean entry
        mean_count = counts.mean()
        mean_output = jnp.trace(outputs) / len(outputs)
        shift, output_shift = tikhonov_shifts(mean_count, mean_output, damping)
        inverse_outputs = psd_inverse(outputs, output_shift)
        return TokenDenseInverse(1 / (counts + shift), inverse_outputs)

    def solve(inverse: Inverse, v: Array, damping: Array) -> Array:
        # [(V U) / (counts s^T + damping)] U^T: A is diagonal already
        if isinstance(inverse, TokenEigenInverse):
            vectors, values = inverse.outputs
            rotated = jnp.matmul(v, vectors, precision=precision)
            products = inverse.counts[:, None] * values
            scaled = damped_quotient(rotated, products, damping)
            return jnp.matmul(scaled, vectors.T, precision=precision)
        solved = jnp.matmul(v, inverse.outputs, precision=precision)
        return inverse.rows[:, None] * solved

    def multiply(factors: TokenFactors, v: Array) -> Array:
        right = jnp.matmul(v, factors.outputs, precision=precision)
        return factors.counts[:, None] * right

    def root_solve(inverse: Inverse, z: Array, damping: Array):
        if isinstance(inverse, TokenEigenInverse):
            vectors, values = inverse.outputs
            products = inverse.counts[:, None] * values
            scaled = damped_root(z, products, damping)
            return jnp.matmul(scaled, vectors.T, precision=precision)
        root, _ = psd_root(inverse.outputs)
        # a root of both inverses, `psd_root` having R R^T = (G + shift I)^{-1}
        right = jnp.matmul(z, root.T, precision=precision)
        return jnp.sqrt(inverse.rows)[:, None] * right

    return Block(
        f"embedding ({inverse})",
        _start,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=_logdet,
    )


def _start(layer: Layer, dtype: jnp.dtype) -> TokenFactors:
    p, q = layer.shape
    counts = jnp.ones(p, dtype)
    return TokenFactors(counts, jnp.eye(q, dtype=dtype))


def _logdet(
    inverse: Inverse,
    damping: Array,
    shape: tuple[int, int],
) -> Array:
    if isinstance(inverse, TokenEigenInverse):
        products = inverse.counts[:, None] * inverse.outputs.values
        return damped_logdet(products, damping)
    # log det(A (x) G) = q log det A + p log det G, and inverses have the negative of it
    _, of_outputs = psd_root(inverse.outputs)
    p, q = shape
    of_rows = jnp.sum(jnp.log(inverse.rows))
    return -q * of_rows - p * of_outputs
