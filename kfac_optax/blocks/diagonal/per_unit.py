"""Blocks that give every output unit of a layer a metric of its own: whole, or quasi-diagonal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.division import quotient_or_zero
from kfac_optax.linalg.factorize import (
    Eigen,
    at_least_rounding,
    damped_logdet,
    damped_quotient,
    damped_root,
    psd_eigh,
)
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.weighted_rows import keep_rows


class UnitMoments(NamedTuple):
    """Entries of `M_k = E[g_k^2 a a^T]` that the quasi-diagonal metric keeps."""

    squares: Float[Array, "p q"]  # the diagonal, the bias last
    cross: Float[Array, "p-1 q"] | None  # of each input with the bias; None where there is none


class QuasiDiagonal(NamedTuple):
    """The metric `diag(rest, 0) + bias u u^T` of every unit, `u = (slopes, 1)`."""

    rest: Float[Array, "p-1 q"]  # what the bias does not explain of the diagonal
    slopes: Float[Array, "p-1 q"]  # of an input's entry in the bias's
    bias: Float[Array, " q"]


def unit_block(*, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """One metric for the weights and the bias of every output unit, `M_k = E[g_k^2 a a^T]`.

    `V [p, q] -> (M_k + damping I)^{-1} V_k` for each column, exactly; units do not see each other.
    With the output gradients of `ggn` it is the unitwise natural gradient, with those of
    `empirical_fisher` the unitwise outer-product metric, and `backpropagated_metric` has moduli of
    its own in place of `g_k^2`. Without damping a step does not depend on how activations are
    scaled and shifted. The state has `q p^2` numbers and a refresh takes `O(q p^3)`: for few
    inputs.

    Uses of a weight, positions among them, count as independent.

    Args:
      precision: matmul precision of moments and solves.

    Returns:
      A `Block`; its statistic is `[q, p, p]`.

    >>> import kfac_optax as ko
    >>> block, layer = unit_block(), ko.testing.dense_layer(1, 1)
    >>> statistic = block.measure(jnp.array([[2.0]]), jnp.array([[3.0]]), Use(layer, 1, 1, jnp.float32))
    >>> print(statistic.ravel())
    [36.]

    Reference: Ollivier, Riemannian Metrics for Neural Networks I: Feedforward Networks (2015).
    """

    def init(layer: Layer, dtype: jnp.dtype) -> Array:
        p, q = layer.shape
        return jnp.broadcast_to(jnp.eye(p, dtype=dtype), (q, p, p))

    def measure(a: Array, g: Array | None, use: Use) -> Array:
        a, moduli = _rows("unit_block", a, g, use)
        # M_k = (1/N) sum_rows g_k^2 a a^T: one product, with units and inputs on one axis
        scaled = moduli[:, :, None] * a[:, None, :]
        moments = gram(scaled.reshape(len(a), -1), a, precision=precision)
        p = a.shape[-1]
        return moments.reshape(-1, p, p) / use.examples

    def factorize(statistic: Array, damping: Array) -> Eigen:
        return jax.vmap(psd_eigh)(statistic)

    def solve(inverse: Eigen, v: Array, damping: Array) -> Array:
        rotated = jnp.einsum("kij,ik->kj", inverse.vectors, v, precision=precision)
        parts = jax.vmap(damped_quotient, (0, 0, None))(rotated, inverse.values, damping)
        return jnp.einsum("kij,kj->ik", inverse.vectors, parts, precision=precision)

    def multiply(statistic: Array, v: Array) -> Array:
        return jnp.einsum("kij,jk->ik", statistic, v, precision=precision)

    def root_solve(inverse: Eigen, z: Array, damping: Array) -> Array:
        # noise is as white in the eigenbasis as it is outside
        parts = jax.vmap(damped_root, (0, 0, None))(z.T, inverse.values, damping)
        return jnp.einsum("kij,kj->ik", inverse.vectors, parts, precision=precision)

    def logdet(inverse: Eigen, damping: Array, shape: tuple[int, int]) -> Array:
        return jax.vmap(damped_logdet, (0, None))(inverse.values, damping).sum()

    return Block(
        "unit-wise (weights)",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
        per_unit=True,
    )


def quasi_diagonal_block() -> Block:
    """The quasi-diagonal metric of every output unit: of `M_k = E[g_k^2 a a^T]` only the diagonal
    and the row of the bias, `M_ii` and `M_i0`.

    The metric that has these entries and lets inputs depend on each other through the bias alone is
    `diag(M_ii - M_i0^2 / M_00, 0) + M_00 u u^T`, `u = (M_i0 / M_00, 1)`. Its inverse takes a few
    sums: without damping, with gradients `v_i` and `v_0` of a unit's weights and bias,
    `w_i = (v_i M_00 - v_0 M_i0) / (M_ii M_00 - M_i0^2)` and
    `w_0 = v_0 / M_00 - sum_i (M_i0 / M_00) w_i`. The damping is added to the whole matrix, exactly.

    Without damping a step is the same whatever each input is multiplied with and shifted by; that
    of the plain diagonal is not for shifts. A layer without a bias has the diagonal alone. Where
    the output gradients come from is said at `unit_block`.

    Returns:
      A `Block`, of state and cost in proportion to the weights.

    >>> block = quasi_diagonal_block()
    >>> moments = UnitMoments(jnp.array([[2.0], [1.0]]), jnp.array([[1.0]]))
    >>> inverse = block.factorize(moments, 0.0)
    >>> print(block.solve(inverse, jnp.array([[1.0], [0.0]]), 0.0).ravel())  # of [[2, 1], [1, 1]]
    [ 1. -1.]

    Reference: Ollivier, Riemannian Metrics for Neural Networks I: Feedforward Networks (2015).
    """

    def init(layer: Layer, dtype: jnp.dtype) -> UnitMoments:
        p, q = layer.shape
        cross = None if layer.bias is None else jnp.zeros((p - 1, q), dtype)
        return UnitMoments(jnp.ones((p, q), dtype), cross)

    def measure(a: Array, g: Array | None, use: Use) -> UnitMoments:
        a, moduli = _rows("quasi_diagonal_block", a, g, use)
        # M_ii and M_i0 of every unit, [p, q] and [p - 1, q]
        squares = gram(jnp.square(a), moduli) / use.examples
        return UnitMoments(squares, gram(a[:, :-1], moduli) / use.examples if use.bias else None)

    def factorize(moments: UnitMoments, damping: Array) -> QuasiDiagonal | Array:
        squares = jnp.maximum(moments.squares, 0)
        if moments.cross is None:
            return squares
        bias = squares[-1]
        slopes = quotient_or_zero(moments.cross, bias)
        # a variance, not negative but for rounding, which is in proportion to the square
        rest = at_least_rounding(squares[:-1] - slopes * moments.cross, squares[:-1])
        return QuasiDiagonal(rest, slopes, bias)

    def solve(inverse: QuasiDiagonal | Array, v: Array, damping: Array) -> Array:
        if not isinstance(inverse, QuasiDiagonal):
            return damped_quotient(v, inverse, damping, exact=True)
        rest, slopes, bias = inverse
        weights, of_bias = v[:-1], v[-1]

        def over_rest(x: Array) -> Array:
            return damped_quotient(x, rest, damping, exact=True)

        # the weights eliminated: one equation for the bias, with positive terms on its left
        left = bias + damping * (1 + bias * jnp.sum(slopes * over_rest(slopes), 0))
        right = of_bias - bias * jnp.sum(slopes * over_rest(weights - slopes * of_bias), 0)
        new_bias = damped_quotient(right, left, jnp.zeros_like(damping), exact=True)
        new_weights = over_rest(weights - slopes * (of_bias - damping * new_bias))
        return jnp.concatenate([new_weights, new_bias[None]])

    def multiply(moments: UnitMoments, v: Array) -> Array:
        made = factorize(moments, jnp.zeros(()))
        if not isinstance(made, QuasiDiagonal):
            return made * v
        through_bias = made.bias * (v[-1] + jnp.sum(made.slopes * v[:-1], 0))
        weights = made.rest * v[:-1] + made.slopes * through_bias
        return jnp.concatenate([weights, through_bias[None]])

    return Block("quasi-diagonal", init, measure, factorize, solve, multiply, per_unit=True)


def _rows(
    where: str, a: Array, g: Array | None, use: Use
) -> tuple[Float[Array, "R p"], Float[Array, "R q"]]:
    """Inputs with the bias coordinate, and squared output gradients; weights are in these."""
    if g is None:
        raise ValueError(
            f"{where}: measure got no output gradients, since this estimator measures inputs only. "
            "Use ggn, fisher, empirical_fisher or backpropagated_metric."
        )
    a = keep_rows(input_rows(a, use), use.weights)
    return a.reshape(-1, a.shape[-1]), jnp.square(g.astype(use.dtype)).reshape(-1, g.shape[-1])
