"""SKFAC: K-FAC's factors of one batch, inverted in the space of its rows. Tang et al. (2021)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.batch_rows import Columns, fill, of_all_pullbacks, pooled, scaled_rows
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.refusals import without_product
from kfac_optax.blocks.sample_space.sample_side import (
    DenseSide,
    RowSide,
    described,
    side_of_mean,
    side_of_rows,
    solve_sample_side,
)
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.tikhonov import tikhonov_shifts


class Means(NamedTuple):
    """Mean eigenvalues of both factors."""

    inputs: Float[Array, ""]
    outputs: Float[Array, ""]


class SampleInverse(NamedTuple):
    """Both factors of a layer."""

    inputs: RowSide | DenseSide
    outputs: RowSide | DenseSide


def skfac_block(
    shape: tuple[int, int],
    rows: int,
    *,
    sharing: str = "expand",
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block `F ~ A (x) G` of one batch, inverted in the space of its rows.

    With rows `U_A = a / sqrt(N)`, so that `A = U_A^T U_A`, and the shift `s = pi sqrt(damping)` of
    factored Tikhonov damping,

        (A + s I)^{-1} = (I - U_A^T (U_A U_A^T + s I)^{-1} U_A) / s

    and likewise for `G`: matrices of the size of the batch are inverted, and none of the size of the
    layer is formed. Nothing is averaged: every statistic, and the damping of its step, replaces the
    last one. A factor with no more coordinates than rows is inverted as it is.

    Args:
      shape: `[p, q]` of the layers that get it.
      rows: rows that a factor keeps, of a whole batch, all pullbacks and devices; fewer leave zeros,
        more are an error.
      sharing: positions of an example are rows of their own (`"expand"`), or one, inputs averaged
        and output gradients added up (`"reduce"`).
      precision: matmul precision of products.

    Returns:
      A `Block`.

    Raises:
      ValueError: `rows < 1`, unknown `sharing`; at the first update, more rows.

    >>> import kfac_optax as ko
    >>> block = skfac_block((3, 1), rows=2)
    >>> means = block.init(ko.testing.dense_layer(3, 1), jnp.float32)
    >>> inverse = block.factorize(means, jnp.float32(1.0))
    >>> print(inverse.inputs.rows.shape, inverse.outputs.inverse.shape)
    (2, 3) (1, 1)

    Reference: Tang et al., SKFAC: Training Neural Networks with Faster Kronecker-Factored
      Approximate Curvature (2021).
    """
    check_number("skfac_block", "rows", rows, at_least=1)
    check_choice("skfac_block", "sharing", sharing, SHARING)

    def init(layer: Layer, dtype: jnp.dtype) -> Means:
        return Means(jnp.ones((), dtype), jnp.ones((), dtype))

    def measure(
        a: Array,
        g: Array | None,
        use: Use,
    ) -> tuple[Means, Columns]:
        # one row for every example, positions averaged and added up
        if sharing == "reduce":
            a, g, use = pooled(a, g, use)
        a, g = scaled_rows(a, g, use, where="skfac_block")
        # tr(A) / p = sum_rows |a|^2 / p for scaled rows, and likewise of G
        p, q = shape
        means = Means(jnp.sum(a * a) / p, jnp.sum(g * g) / q)
        return means, Columns(a, g)

    def factorize(means: Means, damping: Array) -> SampleInverse:
        """What stands for a factor before its rows are known: its mean eigenvalue."""
        # a factor that is its mean eigenvalue times the identity, damped
        shifts = tikhonov_shifts(*means, damping)
        p, q = shape
        inputs = side_of_mean(means.inputs + shifts[0], p, rows)
        outputs = side_of_mean(means.outputs + shifts[1], q, rows)
        return SampleInverse(inputs, outputs)

    def refresh(inverse: SampleInverse, means: Means, damping: Array, count: Array):
        return inverse  # the last statistic has made it

    def absorb(
        inverse: SampleInverse, new: Columns, means: Means, damping: Array, average: Average
    ) -> SampleInverse:
        # rows of all pullbacks and devices, zeros behind them up to what the state has room for
        a, g = jax.tree.map(lambda x: fill(x, rows, "skfac_block"), of_all_pullbacks(new))
        # of this batch alone: the means in the statistic are averages
        mean_a = jnp.sum(a * a) / a.shape[1]
        mean_g = jnp.sum(g * g) / g.shape[1]
        # pi sqrt(damping) and sqrt(damping) / pi
        shifts = tikhonov_shifts(mean_a, mean_g, damping)
        inputs = side_of_rows(a, shifts[0], precision)
        outputs = side_of_rows(after(g, inputs), shifts[1], precision)
        return SampleInverse(inputs, outputs)

    def solve(inverse: SampleInverse, v: Array, damping: Array) -> Array:
        # A^{-1} V G^{-1}, the second on rows of V
        left = solve_sample_side(inverse.inputs, v, precision)
        return solve_sample_side(inverse.outputs, left.T, precision).T

    sizes = " x ".join(described(rows, d) for d in shape)
    pooling = ", reduce" if sharing == "reduce" else ""
    return Block(
        f"skfac ({sizes}{pooling})",
        init,
        measure,
        factorize,
        solve,
        without_product("skfac_block"),
        rows=sharing == "expand",
        sharing=sharing,
        refresh=refresh,
        absorb=absorb,
        per_example=sharing == "reduce",
    )
