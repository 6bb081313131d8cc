"""Kronecker block of a table that is both embedding and softmax head: a sum of two products."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.embedding.token_moments import (
    INVERSES,
    check_lookup,
    check_no_bias,
    output_moment,
    token_counts,
)
from kfac_optax.linalg import lapack
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_term import Pencil, pencil
from kfac_optax.linalg.weighted_rows import weighted_gram


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

    def measure(a: Array, g: Array | None, use: Use) -> TiedFactors:
        # the same table is used in two ways; integers are tokens to look up
        if jnp.issubdtype(a.dtype, jnp.integer):
            check_lookup("tied_embedding", a, use)
            return _of_lookup(a, g, use, precision)
        _check_head(a, g, use)
        return _of_head(a, g, use, precision)

    def factorize(factors: TiedFactors, damping: Array) -> TiedInverse:
        lookup, outputs, head, inputs = _terms(factors)
        # each of the two terms has half of the damping
        half = damping / 2
        size = len(outputs)
        mean_lookup, mean_output = lookup.mean(), jnp.trace(outputs) / size
        lookup_shift, outputs_shift = tikhonov_shifts(mean_lookup, mean_output, half)
        mean_head, mean_input = head.mean(), jnp.trace(inputs) / size
        head_shift, inputs_shift = tikhonov_shifts(mean_head, mean_input, half)
        # K^T (G1 + shift I) K = I and K^T (H2 + shift I) K = diag(s)
        identity = jnp.eye(size, dtype=inputs.dtype)
        damped = inputs + inputs_shift * identity
        dense = pencil(outputs, damped, outputs_shift, precision=precision)
        return TiedInverse(lookup + lookup_shift, head + head_shift, dense)

    def solve(inverse: TiedInverse, v: Array, damping: Array) -> Array:
        # V -> [(V K) / (d1 + d2 s^T)] K^T
        rotated = jnp.matmul(v, inverse.dense.vectors, precision=precision)
        scaled = rotated / _total(inverse)
        return jnp.matmul(scaled, inverse.dense.vectors.T, precision=precision)

    def multiply(factors: TiedFactors, v: Array) -> Array:
        lookup, outputs, head, inputs = _terms(factors)
        of_lookup = jnp.matmul(v, outputs, precision=precision)
        of_head = jnp.matmul(v, inputs, precision=precision)
        return lookup[:, None] * of_lookup + head[:, None] * of_head

    def root_solve(inverse: TiedInverse, z: Array, damping: Array) -> Array:
        # R Z = (Z / sqrt(d1 + d2 s^T)) K^T, and R R^T is what `solve` applies
        scaled = z / jnp.sqrt(_total(inverse))
        return jnp.matmul(scaled, inverse.dense.vectors.T, precision=precision)

    return Block(
        f"tied embedding ({inverse})",
        _start,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=_logdet,
    )


def _logdet(inverse: TiedInverse, damping: Array, shape: tuple[int, int]) -> Array:
    # K is not orthogonal: det(K)^2 comes in once for each of p rows
    _, of_vectors = lapack.slogdet(inverse.dense.vectors)
    p, _ = shape
    of_total = jnp.sum(jnp.log(_total(inverse)))
    return of_total - 2 * p * of_vectors


def _start(layer: Layer, dtype: jnp.dtype) -> TiedFactors:
    """Two terms that add up to the identity."""
    p, q = layer.shape
    one = jnp.ones((), dtype)
    eye = jnp.eye(q, dtype=dtype)
    halves = jnp.full(p, 0.5, dtype)
    return TiedFactors(halves, eye, one, halves, eye, one)


def _of_lookup(
    tokens: Array,
    g: Array | None,
    use: Use,
    precision: jax.lax.PrecisionLike,
) -> TiedFactors:
    """The first term of one use; zeros for the other, since uses are added up."""
    p, q = use.inputs, use.outputs
    # of the rows of the layer, the part that is of this sort
    share = jnp.asarray(math.prod(tokens.shape) / use.rows, use.dtype)
    return TiedFactors(
        lookup_counts=token_counts(tokens, use),
        lookup_outputs=output_moment(tokens, g, use, precision),
        lookup_share=share,
        head_counts=jnp.zeros(p, use.dtype),
        head_inputs=jnp.zeros((q, q), use.dtype),
        head_share=jnp.zeros((), use.dtype),
    )


def _of_head(
    h: Array,
    g: Array | None,
    use: Use,
    precision: jax.lax.PrecisionLike,
) -> TiedFactors:
    """The second term of one use; zeros for the other."""
    p, q = use.inputs, use.outputs
    rows = math.prod(h.shape[:-1])
    # the head computes h E^T: its inputs h are on the side of q, its output gradients on that of p
    inputs = weighted_gram(h.astype(use.dtype), use.weights, precision=precision)
    if g is None:  # forward only: unit output gradients, summed over rows like D2
        counts = jnp.full(p, rows / use.examples, use.dtype)
    else:
        # the diagonal of sum g g^T, [p]; its off-diagonal [p, p] is never formed
        squares = jnp.square(g.astype(use.dtype))
        counts = jnp.sum(squares, range(g.ndim - 1)) / use.examples
    return TiedFactors(
        lookup_counts=jnp.zeros(p, use.dtype),
        lookup_outputs=jnp.zeros((q, q), use.dtype),
        lookup_share=jnp.zeros((), use.dtype),
        head_counts=counts,
        head_inputs=inputs / use.rows,
        head_share=jnp.asarray(rows / use.rows, use.dtype),
    )


def _total(inverse: TiedInverse) -> Array:
    """`d1 + d2 s^T`, what the sum of both terms is in the pencil's basis, `[p, q]`."""
    # rounding may leave eigenvalues of a singular H2 below zero
    values = jnp.maximum(inverse.dense.values, 0)
    return inverse.lookup[:, None] + inverse.head[:, None] * values


def _terms(factors: TiedFactors) -> tuple[Array, Array, Array, Array]:
    """`D1, G1, D2, H2`; a sort that never occurred is a term of zeros."""

    def mean(total: Array, share: Array) -> Array:
        return total / positive_or_one(share)

    # means over the rows of each sort: totals over all rows, divided by the sort's share of them
    return (
        factors.lookup_counts,
        mean(factors.lookup_outputs, factors.lookup_share),
        factors.head_counts,
        mean(factors.head_inputs, factors.head_share),
    )


def _check_head(a: Array, g: Array | None, use: Use) -> None:
    check_no_bias("tied_embedding", use)
    logits = use.inputs if g is None else g.shape[-1]
    got = a.shape[-1], logits
    if got != (use.outputs, use.inputs):
        raise ValueError(
            f"tied_embedding: measure got head inputs of size {got[0]} and logits of size "
            f"{got[1]}; expected {use.outputs} and {use.inputs} for a table "
            f"{use.inputs}x{use.outputs}. Pass h [*rows, {use.outputs}] and the gradient of h @ "
            "table.T."
        )
