"""Kronecker factors for each of two equations that a layer serves, such as the inside and the
boundary of a domain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.use_rows import input_rows, share_of_layer
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.tikhonov import factor_shifts
from kfac_optax.linalg.two_term import Pencil, pencil, two_term_solve
from kfac_optax.linalg.weighted_rows import weighted_gram

EQUATIONS = 2


class EquationFactors(NamedTuple):
    """`A_k = inputs[k]` and `G_k = outputs[k] / share[k]`.

    A share is the part of the layer's rows that serve the equation; dividing by it turns a mean
    over all rows into one over those of the equation.
    """

    inputs: Float[Array, "2 p p"]
    outputs: Float[Array, "2 q q"]
    share: Float[Array, " 2"]


class EquationInverse(NamedTuple):
    """The pencils of both damped input factors and of both damped output factors."""

    inputs: Pencil
    outputs: Pencil


def per_equation(
    *,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Sum of two Kronecker products, `F ~ A_0 (x) G_0 + A_1 (x) G_1`, one for each head of the
    prediction: the two equations of a physics-informed network.

    Head 0 and head 1 are those of the tree that `predict` returns, in its order, for example
    `{"boundary": Normal(u - g), "interior": Normal(residual)}`; each may have a batch of its own.
    The network is called once for each of them, with the same parameters. Every use of a layer is
    measured for the equation that depends on it, `A_k = (1/N_k) sum_rows a a^T` and
    `G_k = mean_rows g g^T` over the rows of equation `k`. Damping is that of Tikhonov, half of it
    in each term,

        sum_k (A_k + pi_k sqrt(damping / 2) I) (x) (G_k + sqrt(damping / 2) / pi_k I),

    with `pi_k = sqrt((tr A_k / p) / (tr G_k / q))`, and this sum is inverted exactly. The damping is
    the one of the last refresh.

    Args:
      sharing: rows of an example that share the weight (value, derivatives, Laplacian): `"expand"`
        (a row each) or `"reduce"` (inputs averaged, output gradients added up).
      positions: at most about this many rows of an example are measured; `None` for all.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` with `EquationFactors` as statistic.

    Raises:
      ValueError: unknown `sharing`, `positions < 1`; while measuring, a use of the layer that
        serves both heads at once, or a third one.

    >>> half, eye = 0.5 * jnp.stack([jnp.eye(2)] * 2), jnp.stack([jnp.eye(2)] * 2)
    >>> factors = EquationFactors(half, eye, jnp.ones(2))
    >>> print(per_equation().multiply(factors, jnp.ones((2, 2))))
    [[1. 1.]
     [1. 1.]]

    Reference: Dangel, Mueller & Zeinhofer, Kronecker-Factored Approximate Curvature for
      Physics-Informed Neural Networks (2024); Martens & Grosse, Optimizing Neural Networks with
      Kronecker-factored Approximate Curvature (2015), appendix B for the inverse of a sum of two
      Kronecker products.
    """
    check_choice("per_equation", "sharing", sharing, SHARING)
    if positions is not None:
        check_number("per_equation", "positions", positions, at_least=1)

    def measure(a: Array, g: Array | None, use: Use) -> EquationFactors:
        _check(use)
        neither = jnp.zeros(EQUATIONS, use.dtype)
        mine = neither.at[use.head].set(1)  # nothing for the other one
        # A_k and G_k as in `kronecker`, over the rows of one equation
        a = input_rows(a, use)
        share = share_of_layer(a, use)
        inputs = weighted_gram(a, use.weights, precision=precision) / use.examples
        if g is None:  # forward only: G := I
            outputs = share * jnp.eye(use.outputs, dtype=use.dtype)
        else:
            g = g.astype(use.dtype)
            outputs = gram(g, g, precision=precision) / use.rows
        beside = mine[:, None, None]
        return EquationFactors(beside * inputs, beside * outputs, mine * share)

    def factorize(factors: EquationFactors, damping: Array) -> EquationInverse:
        # [2, p, p] and [2, q, q]
        inputs, outputs = _terms(factors)
        # factored Tikhonov in each of the two terms, [2] shifts of each side
        of_terms = jax.vmap(factor_shifts, (0, 0, None))
        shifts = of_terms(inputs, outputs, damping / EQUATIONS)
        # one basis diagonalises both matrices of a side at the same time
        left = pencil(*_damped(inputs, shifts[0]), precision=precision)
        damped = after(_damped(outputs, shifts[1]), left.values)
        return EquationInverse(left, pencil(*damped, precision=precision))

    def solve(inverse: EquationInverse, v: Array, damping: Array) -> Array:
        # (A_0 (x) G_0 + A_1 (x) G_1)^{-1} V in the basis that both terms share
        return two_term_solve(inverse.inputs, inverse.outputs, v, precision=precision)

    def multiply(factors: EquationFactors, v: Array) -> Array:
        inputs, outputs = _terms(factors)
        # A_0 V G_0 + A_1 V G_1
        first = sandwich(inputs[0], v, outputs[0], precision=precision)
        second = sandwich(inputs[1], v, outputs[1], precision=precision)
        return first + second

    words = "" if sharing == "expand" else f" ({sharing})"
    return Block(
        f"per equation{words}",
        _start,
        measure,
        factorize,
        solve,
        multiply,
        sharing=sharing,
        positions=positions,
    )


def _start(layer: Layer, dtype: jnp.dtype) -> EquationFactors:
    """Terms that add up to the identity."""
    p, q = layer.shape
    of_inputs = jnp.eye(p, dtype=dtype) / EQUATIONS
    of_outputs = jnp.eye(q, dtype=dtype)
    # [2, p, p] and [2, q, q]
    inputs = jnp.stack([of_inputs] * EQUATIONS)
    outputs = jnp.stack([of_outputs] * EQUATIONS)
    return EquationFactors(inputs, outputs, jnp.ones(EQUATIONS, dtype))


def _terms(factors: EquationFactors) -> tuple[Array, Array]:
    """`A [2, p, p]` and `G [2, q, q]`; an equation that was never measured is a term of zeros."""
    inputs, outputs, share = factors
    divisor = positive_or_one(share)[:, None, None]
    return inputs, outputs / divisor


def _damped(matrices: Array, shifts: Array) -> Array:
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices + shifts[:, None, None] * identity


def _check(use: Use) -> None:
    if use.head is None or use.head >= EQUATIONS:
        got = "several heads" if use.head is None else f"head {use.head} (counted from 0)"
        path = use.layer.path or "(root)"
        raise ValueError(
            f"per_equation: a use of layer {path} serves {got}; expected one of two heads. Return "
            "two likelihoods from predict, and call the network once for each of them, or use "
            "kronecker(), which adds all uses up."
        )
