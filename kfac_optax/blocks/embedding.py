"""Kronecker blocks of embedding tables, whose one-hot inputs make one factor diagonal."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.linalg.factorize import (
    Eigen,
    damped_logdet,
    damped_quotient,
    damped_root,
    psd_eigh,
    psd_inverse,
    psd_root,
)
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_term import Pencil, pencil
from kfac_optax.linalg.weighted_rows import index_counts, weighted_gram

INVERSES = ("eigh", "cholesky")


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


class TiedFactors(NamedTuple):
    """The two terms of a table that is both embedding and softmax head.

    `diag(lookup_counts) (x) (lookup_outputs / lookup_share)` and
    `diag(head_counts) (x) (head_inputs / head_share)`. A share is the part of the layer's rows that
    are of this sort; dividing by it turns a mean over all rows into one over the rows that were
    counted.
    """

    lookup_counts: Float[Array, " p"]
    lookup_outputs: Float[Array, "q q"]
    lookup_share: Float[Array, ""]
    head_counts: Float[Array, " p"]
    head_inputs: Float[Array, "q q"]
    head_share: Float[Array, ""]


class TiedInverse(NamedTuple):
    """Damped diagonals of both terms, and the pencil of their damped dense factors."""

    lookup: Float[Array, " p"]
    head: Float[Array, " p"]
    dense: Pencil


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

    def init(layer: Layer, dtype: jnp.dtype) -> TokenFactors:
        p, q = layer.shape
        return TokenFactors(jnp.ones(p, dtype), jnp.eye(q, dtype=dtype))

    def measure(a: Array, g: Array | None, use: Use) -> TokenFactors:
        _check_lookup("embedding", a, use)
        return TokenFactors(_counts(a, use), _output_moment(a, g, use, precision))

    def factorize(factors: TokenFactors, damping: Array) -> TokenEigenInverse | TokenDenseInverse:
        # A = diag(counts), so only G is factorised
        counts, outputs = factors
        if inverse == "eigh":
            return TokenEigenInverse(counts, psd_eigh(outputs))
        # the mean eigenvalue of a diagonal matrix is its mean entry
        shift, output_shift = tikhonov_shifts(
            counts.mean(), jnp.trace(outputs) / len(outputs), damping
        )
        return TokenDenseInverse(1 / (counts + shift), psd_inverse(outputs, output_shift))

    def solve(inverse: TokenEigenInverse | TokenDenseInverse, v: Array, damping: Array) -> Array:
        # [(V U) / (counts s^T + damping)] U^T: A is diagonal already
        if isinstance(inverse, TokenEigenInverse):
            vectors, values = inverse.outputs
            rotated = jnp.matmul(v, vectors, precision=precision)
            scaled = damped_quotient(rotated, inverse.counts[:, None] * values, damping)
            return jnp.matmul(scaled, vectors.T, precision=precision)
        return inverse.rows[:, None] * jnp.matmul(v, inverse.outputs, precision=precision)

    def multiply(factors: TokenFactors, v: Array) -> Array:
        return factors.counts[:, None] * jnp.matmul(v, factors.outputs, precision=precision)

    def root_solve(inverse: TokenEigenInverse | TokenDenseInverse, z: Array, damping: Array):
        if isinstance(inverse, TokenEigenInverse):
            vectors, values = inverse.outputs
            scaled = damped_root(z, inverse.counts[:, None] * values, damping)
            return jnp.matmul(scaled, vectors.T, precision=precision)
        root, _ = psd_root(inverse.outputs)
        # a root of both inverses, `psd_root` having R R^T = (G + shift I)^{-1}
        return jnp.sqrt(inverse.rows)[:, None] * jnp.matmul(z, root.T, precision=precision)

    def logdet(
        inverse: TokenEigenInverse | TokenDenseInverse, damping: Array, shape: tuple[int, int]
    ) -> Array:
        if isinstance(inverse, TokenEigenInverse):
            return damped_logdet(inverse.counts[:, None] * inverse.outputs.values, damping)
        # log det(A (x) G) = q log det A + p log det G, and inverses have the negative of it
        _, of_outputs = psd_root(inverse.outputs)
        p, q = shape
        return -q * jnp.sum(jnp.log(inverse.rows)) - p * of_outputs

    return Block(
        f"embedding ({inverse})",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
    )


def tied_embedding(inverse: str = "eigh", *, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """Sum of two Kronecker products for a table `E [p, q]` that looks tokens up and is also the
    softmax head.

    `F ~ diag(D1) (x) G1 + diag(D2) (x) H2`, curvature between the two sorts of use left out:

    - look-ups (`measure` gets integer `a [*rows]`, `g [*rows, q]`): `D1 = (1/N) sum w e_token`,
      `G1 = mean g g^T`;
    - head, `logits = h E^T` (`a = h [*rows, q]`, `g [*rows, p]`): `D2 = (1/N) sum diag(g g^T)`,
      `H2 = mean w h h^T`, the dense block with the scale of the sum over rows on the output side,
      whose off-diagonal is dropped.

    Means are over the rows of one sort only, in however many uses and next to however many rows of
    the other sort: the statistic holds means over all rows of the layer and each sort's share of
    them, all linear in the data.

    Each term is damped as `(D + pi r) (x) (G + r/pi I)`, `r = sqrt(damping / 2)`, and the sum of
    the two products is inverted exactly: `K^T (G1 + ..) K = I`, `K^T (H2 + ..) K = diag(s)`,
    `V -> [(V K) / (d1 + d2 s^T)] K^T`. No closed form exists for two products plus `damping I`, so
    both values of `inverse` mean this solve, and the damping is the one of the last refresh.

    Args:
      inverse: `"eigh"` or `"cholesky"`, as for `embedding`; no difference here.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` with `TiedFactors` as statistic.

    Raises:
      ValueError: unknown `inverse`; `use.bias` is set; head rows that do not fit the table.

    >>> import kfac_optax as ko
    >>> block, layer = tied_embedding(), ko.testing.dense_layer(3, 2)
    >>> inverse = block.factorize(block.init(layer, jnp.float32), jnp.float32(0.0))
    >>> print(block.solve(inverse, jnp.ones((3, 2)), jnp.float32(0.0)).round(4)[0])
    [1. 1.]

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), appendix B for the inverse of a sum of two Kronecker products.
    """
    check_choice("tied_embedding", "inverse", inverse, INVERSES)

    def init(layer: Layer, dtype: jnp.dtype) -> TiedFactors:
        p, q = layer.shape
        one, eye, halves = jnp.ones((), dtype), jnp.eye(q, dtype=dtype), jnp.full(p, 0.5, dtype)
        # the two terms add up to the identity
        return TiedFactors(halves, eye, one, halves, eye, one)

    def measure(a: Array, g: Array | None, use: Use) -> TiedFactors:
        # the same table is used in two ways; integers are tokens to look up
        lookup = jnp.issubdtype(a.dtype, jnp.integer)
        _check_lookup("tied_embedding", a, use) if lookup else _check_head(a, g, use)
        rows = math.prod(a.shape if lookup else a.shape[:-1])
        q = use.outputs
        # of the rows of the layer, the part that is of this sort
        share = jnp.asarray(rows / use.rows, use.dtype)
        # nothing for the other term: uses are added up
        empty = (
            jnp.zeros(use.inputs, use.dtype),
            jnp.zeros((q, q), use.dtype),
            jnp.zeros((), use.dtype),
        )
        if lookup:
            return TiedFactors(_counts(a, use), _output_moment(a, g, use, precision), share, *empty)
        # the head computes h E^T: its inputs h are on the side of q, its output gradients on that
        # of p
        inputs = weighted_gram(a.astype(use.dtype), use.weights, precision=precision) / use.rows
        if g is None:  # forward only: unit output gradients, summed over rows like D2
            counts = jnp.full(use.inputs, rows / use.examples, use.dtype)
        else:
            # the diagonal of sum g g^T, [p]; its off-diagonal [p, p] is never formed
            counts = jnp.sum(jnp.square(g.astype(use.dtype)), range(g.ndim - 1)) / use.examples
        return TiedFactors(*empty, counts, inputs, share)

    def factorize(factors: TiedFactors, damping: Array) -> TiedInverse:
        lookup, outputs, head, inputs = _terms(factors)
        # each of the two terms has half of the damping
        half = damping / 2
        size = len(outputs)
        lookup_shift, outputs_shift = tikhonov_shifts(
            lookup.mean(), jnp.trace(outputs) / size, half
        )
        head_shift, inputs_shift = tikhonov_shifts(head.mean(), jnp.trace(inputs) / size, half)
        # K^T (G1 + shift I) K = I and K^T (H2 + shift I) K = diag(s)
        damped = inputs + inputs_shift * jnp.eye(size, dtype=inputs.dtype)
        dense = pencil(outputs, damped, outputs_shift, precision=precision)
        return TiedInverse(lookup + lookup_shift, head + head_shift, dense)

    def solve(inverse: TiedInverse, v: Array, damping: Array) -> Array:
        # V -> [(V K) / (d1 + d2 s^T)] K^T
        rotated = jnp.matmul(v, inverse.dense.vectors, precision=precision)
        scaled = rotated / _total(inverse)
        return jnp.matmul(scaled, inverse.dense.vectors.T, precision=precision)

    def multiply(factors: TiedFactors, v: Array) -> Array:
        lookup, outputs, head, inputs = _terms(factors)
        first = lookup[:, None] * jnp.matmul(v, outputs, precision=precision)
        return first + head[:, None] * jnp.matmul(v, inputs, precision=precision)

    def root_solve(inverse: TiedInverse, z: Array, damping: Array) -> Array:
        # R Z = (Z / sqrt(d1 + d2 s^T)) K^T, and R R^T is what `solve` applies
        scaled = z / jnp.sqrt(_total(inverse))
        return jnp.matmul(scaled, inverse.dense.vectors.T, precision=precision)

    def logdet(inverse: TiedInverse, damping: Array, shape: tuple[int, int]) -> Array:
        # K is not orthogonal: det(K)^2 comes in once for each of p rows
        _, of_vectors = jnp.linalg.slogdet(inverse.dense.vectors)
        return jnp.sum(jnp.log(_total(inverse))) - 2 * shape[0] * of_vectors

    return Block(
        f"tied embedding ({inverse})",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
    )


def _total(inverse: TiedInverse) -> Array:
    """`d1 + d2 s^T`, what the sum of both terms is in the pencil's basis, `[p, q]`."""
    # rounding may leave eigenvalues of a singular H2 below zero
    values = jnp.maximum(inverse.dense.values, 0)
    return inverse.lookup[:, None] + inverse.head[:, None] * values


def _counts(tokens: Array, use: Use) -> Array:
    return index_counts(tokens, use.inputs, use.weights, use.dtype) / use.examples


def _output_moment(
    tokens: Array,
    g: Array | None,
    use: Use,
    precision: jax.lax.PrecisionLike,
) -> Array:
    if g is None:  # forward only: G := I, shared out over the uses, which are added up
        return math.prod(tokens.shape) / use.rows * jnp.eye(use.outputs, dtype=use.dtype)
    g = g.astype(use.dtype)
    return gram(g, g, precision=precision) / use.rows


def _terms(factors: TiedFactors) -> tuple[Array, Array, Array, Array]:
    """`D1, G1, D2, H2`; a sort that never occurred is a term of zeros."""

    def mean(total: Array, share: Array) -> Array:
        return total / jnp.where(share > 0, share, 1)

    # means over the rows of each sort: totals over all rows, divided by the sort's share of them
    return (
        factors.lookup_counts,
        mean(factors.lookup_outputs, factors.lookup_share),
        factors.head_counts,
        mean(factors.head_inputs, factors.head_share),
    )


def _check_lookup(where: str, a: Array, use: Use) -> None:
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise ValueError(
            f"{where}: measure got inputs of dtype {a.dtype}; expected integer tokens. Use "
            "kronecker() for a dense layer."
        )
    _check_bias(where, use)


def _check_head(a: Array, g: Array | None, use: Use) -> None:
    _check_bias("tied_embedding", use)
    got = a.shape[-1], use.inputs if g is None else g.shape[-1]
    if got != (use.outputs, use.inputs):
        raise ValueError(
            f"tied_embedding: measure got head inputs of size {got[0]} and logits of size "
            f"{got[1]}; expected {use.outputs} and {use.inputs} for a table "
            f"{use.inputs}x{use.outputs}. Pass h [*rows, {use.outputs}] and the gradient of h @ "
            "table.T."
        )


def _check_bias(where: str, use: Use) -> None:
    if use.bias:
        raise ValueError(
            f"{where}: the layer has a bias; expected a table only. Leave the bias to a block of "
            "its own."
        )
