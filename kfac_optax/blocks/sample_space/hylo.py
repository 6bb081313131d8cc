"""HyLo: the Fisher matrix of a few examples, inverted in their space. Mu et al. (2022)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice, check_number, check_seed
from kfac_optax.blocks.batch_rows import Columns, pooled, scaled_rows
from kfac_optax.blocks.refusals import without_product
from kfac_optax.blocks.sample_space.example_rows import (
    Chosen,
    ExampleRows,
    all_of_them,
    by_interpolation,
    by_sampling,
    example_rows,
)
from kfac_optax.linalg.factorize import shift_for

SELECTIONS = ("kid", "kis", "switch")
Critical = int | Callable[[Any], Any]


class ExampleInverse(NamedTuple):
    """Rows `u_b = vec(a_b g_b^T)` that stand for the batch, and `C`:
    `(F + damping)^{-1} = (I - U^T C U) / damping`.
    """

    inputs: Float[Array, "r p"]
    outputs: Float[Array, "r q"]
    middle: Float[Array, "r r"]
    damping: Float[Array, ""]


def hylo_block(
    shape: tuple[int, int],
    rank: int = 32,
    *,
    selection: str = "switch",
    critical: Critical = 10,
    seed: int = 0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Block `F ~ (1/N) sum_b vec(D_b) vec(D_b)^T` of one batch, by `rank` of its examples.

    `D_b = a_b g_b^T` with the inputs of an example averaged over its positions and uses of the
    layer, and the output gradients added up. Rows `u_b = vec(D_b) / sqrt(N)` make `F = U^T U` and
    `K = U U^T = (1/N) (a a^T) * (g g^T)`, entry by entry, and with `damping = s`

        (F + s I)^{-1} V = (V - U^T C U V) / s,   C = (K + s I)^{-1}.

    No row is formed, nor a matrix of the layer's size beside `V`. Where the batch has more rows
    than `rank`:

    - `"kid"`, interpolative decomposition: `U ~ P U_S` with the rows `S` of a pivoted Cholesky
      decomposition of `K`; with `E = K - P K_S P^T` and `M = P^T (E + s I)^{-1} P`,
      `C = M - M (K_S^{-1} + M)^{-1} M`, which is exact where `K` has this rank.
    - `"kis"`, importance sampling: rows drawn with probability `p_b` in proportion to `|u_b|^2`,
      with replacement, times `1 / sqrt(rank p_b)`: `U_S^T U_S` is `F` on average.
    - `"switch"`: the first where `critical`, the second elsewhere.

    Nothing is averaged: every statistic, and the damping of its step, replaces the last one.

    Args:
      shape: `[p, q]` of the layers that get it.
      rank: rows that are kept.
      selection: `"kid"`, `"kis"` or `"switch"`.
      critical: of `"switch"`: how many statistics at the start are critical, or a function of their
        number (from 1) that says so.
      seed: of draws.
      precision: matmul precision of products.

    Returns:
      A `Block`.

    Raises:
      ValueError: `rank < 1`, unknown `selection`, `critical` without effect.

    >>> import kfac_optax as ko
    >>> block = hylo_block((2, 1), rank=4)
    >>> inverse = block.factorize(jnp.float32(1.0), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel())
    [0.5 0.5]

    Reference: Mu, Soori, Can, Gürbüzbalaban & Mehri Dehnavi, HyLo: A Hybrid Low-Rank Natural
      Gradient Descent Method (2022).
    """
    _check(rank, selection, critical)
    check_seed("hylo_block", seed)
    p, q = shape

    def init(layer: Layer, dtype: jnp.dtype) -> Array:
        return jnp.ones((), dtype)

    def measure(
        a: Array,
        g: Array | None,
        use: Use,
    ) -> tuple[Array, Columns]:
        a, g, use = pooled(a, g, use)
        # the weight of an example is in g already, as its root: that of u_b
        plain = use
        if use.weights is not None:
            plain = use._replace(weights=_counted(use.weights))
        a, g = scaled_rows(a, g, plain, where="hylo_block")
        # |a_b|^2 |g_b|^2 / N^2, since both rows were divided by the root of N: the trace of F is N
        # times their sum
        lengths = jnp.sum(a * a, -1) * jnp.sum(g * g, -1)
        mean = use.examples * jnp.sum(lengths) / (p * q)
        return mean, Columns(a, g)

    def factorize(mean: Array, damping: Array) -> ExampleInverse:
        """What stands for the block before its rows are known: its mean eigenvalue."""
        inputs = jnp.zeros((rank, p), mean.dtype)
        outputs = jnp.zeros((rank, q), mean.dtype)
        middle = jnp.zeros((rank, rank), mean.dtype)
        return ExampleInverse(inputs, outputs, middle, mean + damping)

    def refresh(inverse: ExampleInverse, mean: Array, damping: Array, count: Array):
        return inverse  # the last statistic has made it

    def absorb(
        inverse: ExampleInverse, new: Columns, mean: Array, damping: Array, average: Average
    ) -> ExampleInverse:
        rows = example_rows(new, precision=precision)
        # one shift for C and for the division by it
        shift = shift_for(damping, jnp.trace(rows.gram))
        return ExampleInverse(*choose(rows, shift, average.count), shift)

    def choose(rows: ExampleRows, shift: Array, count: Array) -> Chosen:
        def sampled() -> Chosen:
            key = jax.random.fold_in(jax.random.key(seed), count)
            return by_sampling(rows, shift, rank, key)

        # shapes are known when tracing: no choice has to be made for a small batch
        if len(rows.inputs) <= rank:
            return all_of_them(rows, shift, rank)
        if selection == "kis":
            return sampled()
        if selection == "kid":
            return by_interpolation(rows, shift, rank)
        # the count is the same for all layers: mapped over them this stays a branch
        now = critical(count) if callable(critical) else count <= critical
        return jax.lax.cond(now, lambda: by_interpolation(rows, shift, rank), sampled)

    def solve(inverse: ExampleInverse, v: Array, damping: Array) -> Array:
        # U V: a_b^T V g_b for every row, [r]
        seen = jnp.matmul(inverse.inputs, v, precision=precision)
        along = jnp.sum(seen * inverse.outputs, -1)
        inside = jnp.matmul(inverse.middle, along, precision=precision)
        # U^T C U V: sum_b c_b a_b g_b^T, [p, q]
        scaled = inside[:, None] * inverse.outputs
        back = jnp.matmul(inverse.inputs.T, scaled, precision=precision)
        return (v - back) / inverse.damping

    return Block(
        f"hylo ({selection}, {rank} rows)",
        init,
        measure,
        factorize,
        solve,
        without_product("hylo_block", "no average"),
        sharing="reduce",
        refresh=refresh,
        absorb=absorb,
        per_example=True,
    )


def _check(rank: int, selection: str, critical: Critical) -> None:
    check_number("hylo_block", "rank", rank, at_least=1)
    check_choice("hylo_block", "selection", selection, SELECTIONS)
    if not callable(critical):
        check_number("hylo_block", "critical", critical, at_least=0)


def _counted(weights: Array) -> Array:
    """One where an example counts at all."""
    return (weights != 0).astype(weights.dtype)
