"""A sum of two Kronecker products nearest to the Fisher block of a layer, by power iterations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.kpsvd_terms import (
    Term,
    TwoTerms,
    identity_term,
    next_directions,
    pencils_of,
    power_step,
    products_of,
    random_directions,
    rest_of,
    start_directions,
)
from kfac_optax.blocks.kronecker.kronecker import Factors, kronecker
from kfac_optax.blocks.refusals import given_outputs
from kfac_optax.linalg.example_moments import example_rows
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.two_term import Pencil

FIRST = ("svd", "kfac")


class TwoTermInverse(NamedTuple):
    """What diagonalises both terms at once, and the directions of the next power steps."""

    inputs: Pencil
    outputs: Pencil
    directions: tuple[Factors, ...]  # of the second term last


def kpsvd_two_block(
    first: str = "svd",
    *,
    floor: float = 0.1,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Two Kronecker products, `F ~ A_1 (x) G_1 + A_2 (x) G_2`.

    The first is that of `kpsvd_block` (`first="svd"`, by deflation the two leading terms of the
    SVD) or that of `kronecker` (`first="kfac"`, which the second corrects). The second is the
    leading term of what is left, `E = M - vec(A_1) vec(G_1)^T` with `M` the rearranged block of
    `kpsvd_block`; each statistic is one power step of both from the directions of before. It has no
    definite sign.

    With the damping shared out to the first, `(A_1 + x I) (x) (G_1 + y I)` as in
    `kronecker("cholesky")`, and `K^T (A_1 + x I) K = I`, `K^T A_2 K = diag(s)`, and `L`, `t` for
    `G`, the solve is `V -> K [(K^T V L) / max(1 + s t^T, floor)] L^T`: exact as long as the sum
    is well above zero, and positive definite always.

    Args:
      first: `"svd"` or `"kfac"`.
      floor: in (0, 1]: how far below the first term the sum may be in any direction.
      precision: matmul precision of statistics and solves.

    Returns:
      A `Block` with `TwoTerms` as statistic.

    Raises:
      ValueError: unknown `first`, `floor` out of range; at the first update, an estimator that
        measures inputs only.

    >>> import kfac_optax as ko
    >>> block, layer = kpsvd_two_block(), ko.testing.dense_layer(2, 1)
    >>> inverse = block.factorize(block.init(layer, jnp.float32), jnp.float32(1.0))
    >>> solved = block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0))
    >>> print([f"{u:.3f}" for u in solved.ravel()])
    ['0.250', '0.250']

    Reference: Koroko et al., Efficient Approximations of the Fisher Matrix in Neural Networks using
      Kronecker Product Singular Value Decomposition (2022), for both forms.
    """
    check_choice("kpsvd_two_block", "first", first, FIRST)
    check_number("kpsvd_two_block", "floor", floor, above=0, at_most=1)
    plain = kronecker("cholesky", precision=precision)

    def init(layer: Layer, dtype: jnp.dtype) -> TwoTerms:
        p, q = layer.shape
        init_first = identity_term if first == "svd" else plain.init
        eyes = init_first(layer, dtype)
        zero = jnp.zeros((), dtype)
        # F = I is one product, and leaves nothing over
        no_inputs, no_outputs = jnp.zeros((p, p), dtype), jnp.zeros((q, q), dtype)
        nothing = Term(no_inputs, no_outputs, zero)
        return TwoTerms(eyes, nothing, zero, zero)

    def measure(
        a: Array, g: Array | None, use: Use, inverse: TwoTermInverse
    ) -> tuple[TwoTerms, tuple]:
        rows = example_rows(a, given_outputs("kpsvd_two_block", g), use)
        # the leading term: a power step of M, or the factors of K-FAC
        if first == "svd":
            leading = power_step(*rows, inverse.directions[0], use.examples, precision)
        else:
            leading = plain.measure(a, g, use)
        last = inverse.directions[-1]
        second = power_step(*rows, last, use.examples, precision)
        # what the first term has along the directions of the second, to be taken off later
        left = jnp.vdot(last.inputs, leading.inputs, precision="highest")
        right = jnp.vdot(last.outputs, leading.outputs, precision="highest")
        return TwoTerms(leading, second, left, right), ()

    def factorize(terms: TwoTerms, damping: Array) -> TwoTermInverse:
        # identities would be near the first term, of which the second has nothing
        last = random_directions(terms.second)
        # K-FAC's factors need no directions
        firsts = (start_directions(terms.first),) if first == "svd" else ()
        return TwoTermInverse(*pencils_of(terms, damping, precision), (*firsts, last))

    def refresh(
        kept: TwoTermInverse, terms: TwoTerms, damping: Array, count: Array
    ) -> TwoTermInverse:
        return TwoTermInverse(*pencils_of(terms, damping, precision), kept.directions)

    def absorb(
        kept: TwoTermInverse, new: tuple, terms: TwoTerms, damping: Array, average: Average
    ) -> TwoTermInverse:
        # the second chain follows what the first leaves over, E = M - A_1 G_1^T
        rest = rest_of(terms)
        last = next_directions(kept.directions[-1], rest)
        # both sides have chains of their own, whose signs have to agree
        sign = jnp.where(rest.scale < 0, -1, 1)
        last = last._replace(outputs=sign * last.outputs)
        others = kept.directions[:-1]
        firsts = tuple(next_directions(x, terms.first) for x in others)
        return kept._replace(directions=(*firsts, last))

    def solve(kept: TwoTermInverse, v: Array, damping: Array) -> Array:
        # K [(K^T V L) / (1 + s t^T)] L^T
        left, right = kept.inputs.vectors, kept.outputs.vectors
        total = 1 + kept.inputs.values[:, None] * kept.outputs.values
        # sums that are next to zero or below are no curvature to divide by
        rotated = sandwich(left.T, v, right, precision=precision)
        scaled = rotated / jnp.maximum(total, floor)
        return sandwich(left, scaled, right.T, precision=precision)

    def multiply(terms: TwoTerms, v: Array) -> Array:
        one, two = products_of(terms)
        added = sandwich(two.inputs, v, two.outputs, precision=precision)
        return sandwich(one.inputs, v, one.outputs, precision=precision) + added

    return Block(
        f"kpsvd (two terms, first by {first})",
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
