"""A sum of two Kronecker products nearest to the Fisher block of a layer, by power iterations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kpsvd import (
    Term,
    identity_term,
    next_directions,
    power_step,
    start_directions,
    unit,
    whole_rows,
)
from kfac_optax.blocks.kronecker import Factors, kronecker
from kfac_optax.linalg.factorize import after, symmetrize
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_term import Pencil, pencil

FIRST = ("svd", "kfac")


class TwoTerms(NamedTuple):
    """Both power steps; all of it linear in the Fisher block, the factors of K-FAC aside."""

    first: Term | Factors
    second: Term
    left: Float[Array, ""]  # <R_2, first.inputs>
    right: Float[Array, ""]  # <first.outputs, S_2>


class TwoTermInverse(NamedTuple):
    """What diagonalises both terms at once, and the directions of the next power steps."""

    inputs: Pencil
    outputs: Pencil
    directions: tuple[Factors, ...]  # of the second term last


def kpsvd_two_block(
    first: str = "svd", *, floor: float = 0.1, precision: jax.lax.PrecisionLike = "highest"
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
      floor: in (0, 1): how far below the first term the sum may be in any direction.
      precision: matmul precision of statistics and solves.

    Returns:
      A `Block` with `TwoTerms` as statistic.

    Raises:
      ValueError: unknown `first`, `floor` out of range; at the first update, an estimator that
        measures inputs only.

    >>> block = kpsvd_two_block()
    >>> inverse = block.factorize(block.init(2, 1, jnp.float32), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel())
    [0.25 0.25]

    Reference: Koroko et al., Efficient Approximations of the Fisher Matrix in Neural Networks using
      Kronecker Product Singular Value Decomposition (2022), for both forms.
    """
    check_choice("kpsvd_two_block", "first", first, FIRST)
    check_number("kpsvd_two_block", "floor", floor, above=0, at_most=1)
    plain = kronecker("cholesky", precision=precision)

    def init(layer: Layer, dtype: jnp.dtype) -> TwoTerms:
        p, q = layer.shape
        eyes = identity_term(layer, dtype) if first == "svd" else plain.init(layer, dtype)
        zero = jnp.zeros((), dtype)
        nothing = Term(jnp.zeros((p, p), dtype), jnp.zeros((q, q), dtype), zero)
        return TwoTerms(eyes, nothing, zero, zero)

    def measure(
        a: Array, g: Array | None, use: Use, inverse: TwoTermInverse
    ) -> tuple[TwoTerms, tuple]:
        rows = whole_rows("kpsvd_two_block", a, g, use)
        if first == "svd":
            leading = power_step(*rows, inverse.directions[0], use.examples, precision)
        else:
            leading = plain.measure(a, g, use)
        last = inverse.directions[-1]
        second = power_step(*rows, last, use.examples, precision)
        left = jnp.vdot(last.inputs, leading.inputs, precision="highest")
        right = jnp.vdot(last.outputs, leading.outputs, precision="highest")
        return TwoTerms(leading, second, left, right), ()

    def factorize(terms: TwoTerms, damping: Array) -> TwoTermInverse:
        last = Factors(*(unit(_random(len(x), x.dtype), 0.0) for x in terms.second[:2]))
        firsts = (start_directions(terms.first),) if first == "svd" else ()
        return TwoTermInverse(*_pencils(terms, damping, precision), (*firsts, last))

    def refresh(
        kept: TwoTermInverse, terms: TwoTerms, damping: Array, count: Array
    ) -> TwoTermInverse:
        return TwoTermInverse(*_pencils(terms, damping, precision), kept.directions)

    def absorb(
        kept: TwoTermInverse, new: tuple, terms: TwoTerms, damping: Array, average: Average
    ) -> TwoTermInverse:
        rest = _rest(terms)
        last = next_directions(kept.directions[-1], rest)
        # both sides have chains of their own, whose signs have to agree
        last = last._replace(outputs=jnp.where(rest.scale < 0, -1, 1) * last.outputs)
        firsts = tuple(next_directions(x, terms.first) for x in kept.directions[:-1])
        return kept._replace(directions=(*firsts, last))

    def solve(kept: TwoTermInverse, v: Array, damping: Array) -> Array:
        left, right = kept.inputs.vectors, kept.outputs.vectors
        total = 1 + kept.inputs.values[:, None] * kept.outputs.values
        rotated = sandwich(left.T, v, right, precision=precision) / jnp.maximum(total, floor)
        return sandwich(left, rotated, right.T, precision=precision)

    def multiply(terms: TwoTerms, v: Array) -> Array:
        one, two = _products(terms)
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


def _rest(terms: TwoTerms) -> Term:
    """The power step of what the first term leaves of the block."""
    first, second = terms.first, terms.second
    scale = _scale(first)
    return Term(
        second.inputs - terms.right / scale * first.inputs,
        second.outputs - terms.left / scale * first.outputs,
        second.scale - terms.left / scale * terms.right,
    )


def _scale(first: Term | Factors) -> Array | float:
    return jnp.where(first.scale > 0, first.scale, 1) if isinstance(first, Term) else 1.0


def _products(terms: TwoTerms) -> tuple[Factors, Factors]:
    """Both Kronecker products."""
    first, rest = terms.first, _rest(terms)
    sizes = [jnp.sqrt(jnp.linalg.norm(x)) for x in (rest.inputs, rest.outputs)]
    # all three are sigma_2 in the end; before, <R, E S> alone may be next to nothing
    size = jnp.maximum(jnp.abs(rest.scale), sizes[0] * sizes[1])
    signed = jnp.where(rest.scale < 0, -1, 1) * jnp.where(size > 0, size, 1)
    second = Factors(rest.inputs, rest.outputs / signed)
    return Factors(first.inputs, first.outputs / _scale(first)), second


def _pencils(
    terms: TwoTerms, damping: Array, precision: jax.lax.PrecisionLike
) -> tuple[Pencil, Pencil]:
    one, two = _products(terms)
    mean_a, mean_g = (jnp.trace(x) / len(x) for x in one)
    shift, output_shift = tikhonov_shifts(mean_a, mean_g, damping)
    inputs = pencil(one.inputs, two.inputs, shift, precision=precision)
    ready = after(one.outputs, inputs.values)
    return inputs, pencil(ready, two.outputs, output_shift, precision=precision)


def _random(n: int, dtype: jnp.dtype) -> Array:
    """A symmetric matrix that is no special one."""
    return symmetrize(jax.random.normal(jax.random.key(0), (n, n), dtype))
