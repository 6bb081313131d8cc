"""Kronecker blocks whose factors are held as a few eigenpairs: from random sketches, or followed
online.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.batch_rows import Columns, of_all_pullbacks, scaled_rows
from kfac_optax.blocks.kronecker import Factors, kronecker
from kfac_optax.blocks.low_rank_side import (
    LowRankInverse,
    Side,
    logdet_side,
    root_side,
    solve_side,
)
from kfac_optax.linalg.factorize import after, at_least_rounding
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.online import brand_update, correct_directions
from kfac_optax.linalg.randomized import VARIANTS, randomized_eigh
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.truncated_eigen import (
    LowRank,
    mean_left_out,
    of_diagonal,
    rank_for,
)

REST = ("mean", "smallest", "zero")
DAMPING = ("tikhonov", "relative")


class _Rule(NamedTuple):
    """What is done with a factor."""

    online: bool  # new rows go into what is held
    sketches: bool  # a refresh decomposes the average
    corrected: bool  # directions of what is held are brought up to date now and then

    @property
    def dense(self) -> bool:
        """Whether the average is kept; otherwise only its diagonal, for the trace."""
        return self.sketches or self.corrected


def low_rank(
    rank: int,
    *,
    online: tuple[bool, bool] = (False, False),
    overwrite: bool = False,
    correct_every: int | None = None,
    correct_share: float = 0.2,
    oversampling: int = 10,
    power_iterations: int = 1,
    variant: str = "svd",
    rest: str = "mean",
    damping_rule: str = "tikhonov",
    target_error: float | None = None,
    sharing: str = "expand",
    positions: int | None = None,
    seed: int = 0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block `F ~ A (x) G` that holds `rank` eigenpairs `(U, D)` of each factor, and
    solves with them.

    For each factor `X` of dimension `d`, with damping `s` and the eigenvalues that are not held
    taken for `c`,

        X^-1 M ~ U [(D + s)^-1 - (c + s)^-1] U^T M + M / (c + s)        in O(d rank) for every
        column of M.

    A factor that sketches keeps its dense average and decomposes it at random at every refresh, in
    `O(d^2 rank)`. One that is followed online takes the `n` rows of every statistic into `(U, D)`
    at once, in `O(d (rank + n)^2)`: its average is never formed, unless it is to overwrite `(U, D)`
    with a sketch at every refresh, or to correct some of the directions now and then. A factor with
    `d <= rank` is decomposed as a whole.

    Args:
      rank: eigenpairs of each factor.
      online: whether the inputs' and the outputs' factor are followed online; for layers without
        positions, or with few.
      overwrite: sketch such a factor anew at every refresh; keeps its dense average.
      correct_every: statistics between corrections of it; `None` for none. Keeps its dense average
        too.
      correct_share: of a correction: share of the `rank` directions, drawn at random, one more is
        added.
      oversampling: of sketches, see `randomized_eigh`.
      power_iterations: of sketches, see `randomized_eigh`.
      variant: of sketches, `"svd"` or `"symmetric"`, see `randomized_eigh`.
      rest: eigenvalues that are not held are taken for their `"mean"`, known from the trace, for
        the `"smallest"` held, as the reference of online updates does (spectrum continuation), or
        for `"zero"`, as that of sketches does.
      damping_rule: `"tikhonov"`, `s = pi^{+-1} sqrt(damping)` as in `kronecker("cholesky")`; or the
        references' `"relative"`, `s = damping max(D)`.
      target_error: use only as many pairs as hold `1 - target_error` of the factor's trace; `None`
        for all.
      sharing: as in `kronecker`; of blocks without online factor.
      positions: as in `kronecker`; of blocks without online factor.
      seed: of sketches and corrections.
      precision: matmul precision of factor products, decompositions and solves.

    Returns:
      A `Block`.

    Raises:
      ValueError: `rank < 1`, another number out of range, an unknown word.

    >>> block = low_rank(1)
    >>> inverse = block.factorize(Factors(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(1)), jnp.float32(0.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(0.0)).ravel().round(3))
    [0.333 1.   ]

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022); Puiu, Brand New K-FACs: Speeding up K-FAC with Online Decomposition Updates (2022).
    """
    _check(
        rank,
        oversampling,
        power_iterations,
        correct_every,
        correct_share,
        target_error,
        variant,
        rest,
        damping_rule,
    )
    plain = kronecker("cholesky", sharing=sharing, positions=positions, precision=precision)
    rules = tuple(_Rule(on, overwrite or not on, on and correct_every is not None) for on in online)

    def init(layer: Layer, dtype: jnp.dtype) -> Factors:
        p, q = layer.shape
        # the identity, or its diagonal where only that is kept
        starts = (
            jnp.eye(d, dtype=dtype) if rule.dense else jnp.ones(d, dtype)
            for d, rule in zip((p, q), rules)
        )
        return Factors(*starts)

    def measure(a: Array, g: Array | None, use: Use) -> Any:
        # sketches alone read averages as `kronecker` measures them
        if not any(online):
            return plain.measure(a, g, use)
        rows = scaled_rows(a, g, use, where="low_rank (online)", instead="sketches (rs_kfac)")
        # U^T U of the scaled rows, or its diagonal
        factors = [
            gram(y, y, precision=precision) if r.dense else jnp.sum(y * y, 0)
            for y, r in zip(rows, rules)
        ]
        return Factors(*factors), Columns(*(y if r.online else None for y, r in zip(rows, rules)))

    def draws(count: Array) -> Array:
        # other draws for every statistic and for both factors
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), count))

    def sketch(matrix: Array, key: Array) -> LowRank:
        return randomized_eigh(
            matrix,
            key,
            rank=rank,
            oversampling=oversampling,
            power_iterations=power_iterations,
            variant=variant,
            precision=precision,
        )

    def follow(
        low: LowRank, columns: Array, matrix: Array, average: Average, key: Array
    ) -> LowRank:
        # U D U^T <- decay U D U^T + (1 - decay) sum_rows y y^T, cut off at the same rank
        kept = low.values.shape[0]
        new = brand_update(
            low, columns.T, average.weight, rank=kept, keep=kept, precision=precision
        )
        if correct_every is None:
            return new

        def correct(low: LowRank) -> LowRank:
            count = int(correct_share * low.values.shape[0]) + 1
            return correct_directions(low, matrix, key, count=count, precision=precision)

        # the count is the same for all layers: mapped over them this stays a branch
        return jax.lax.cond(average.count % correct_every == 0, correct, lambda low: low, new)

    def shifts(factors: Factors, lows: list[LowRank], damping: Array) -> tuple[Array, Array]:
        # pi sqrt(damping) and sqrt(damping) / pi, by mean eigenvalues
        if damping_rule == "tikhonov":
            mean_a, mean_g = (_trace(x) / len(x) for x in factors)
            return tikhonov_shifts(mean_a, mean_g, damping)
        # or in proportion to the largest eigenvalue of each factor
        top_a, top_g = (low.values[0] for low in lows)
        scales = (jnp.where(top > 0, top, 1) for top in (top_a, top_g))
        shift, output_shift = (at_least_rounding(damping * scale, scale) for scale in scales)
        return shift, output_shift

    def side(low: LowRank, trace: Array, shift: Array) -> Side:
        # all pairs, or the fewest that hold the share of the trace that is asked for
        used = jnp.full((), low.values.shape[0], jnp.int32)
        if target_error is not None:
            used = rank_for(low, trace, target_error)
        smallest = low.values[used - 1]
        # what eigenvalues are taken for that are not in use
        others = {
            "mean": mean_left_out(low, trace, used),
            "smallest": smallest,
            "zero": jnp.zeros_like(smallest),
        }
        return Side(low, trace, used, others[rest], shift)

    def refresh(
        old: LowRankInverse | None, factors: Factors, damping: Array, count: Array
    ) -> LowRankInverse:
        keys, lows = draws(count), []
        # one factor after another, see `after`
        for i, (factor, rule) in enumerate(zip(factors, rules)):
            if rule.sketches:
                lows.append(sketch(after(factor, lows), keys[i]))
            elif old is not None:
                lows.append(old[i].low)
            # no rows yet: the diagonal is all there is, that of the identity before any statistic
            else:
                lows.append(of_diagonal(jnp.diag(factor) if factor.ndim == 2 else factor, rank))
        # traces of the factors themselves, whatever part of them the pairs hold
        traces = map(_trace, factors)
        return LowRankInverse(*map(side, lows, traces, shifts(factors, lows, damping)))

    def factorize(factors: Factors, damping: Array) -> LowRankInverse:
        return refresh(None, factors, damping, jnp.zeros((), jnp.int32))

    def absorb(
        inverse: LowRankInverse,
        columns: Columns,
        factors: Factors,
        damping: Array,
        average: Average,
    ) -> LowRankInverse:
        # what is followed online takes the rows of all pullbacks and devices
        keys, lows = draws(average.count), []
        for i, (old, rows, factor) in enumerate(zip(inverse, of_all_pullbacks(columns), factors)):
            low = old.low
            lows.append(
                low if rows is None else follow(low, after(rows, lows), factor, average, keys[i])
            )
        # a factor that is decomposed at refreshes keeps its pairs until then; its damping may
        # change
        new = []
        for rule, old, low, factor, shift in zip(
            rules, inverse, lows, factors, shifts(factors, lows, damping)
        ):
            new.append(
                side(low, _trace(factor), shift) if rule.online else old._replace(shift=shift)
            )
        return LowRankInverse(*new)

    def solve(inverse: LowRankInverse, v: Array, damping: Array) -> Array:
        # A^{-1} V G^{-1}, the second on rows of V
        left = solve_side(inverse.inputs, v, precision=precision)
        return solve_side(inverse.outputs, left.T, precision=precision).T

    def solve_rows(
        inverse: LowRankInverse,
        a: Array,
        g: Array,
        damping: Array,
    ) -> Array | None:
        # with k and l pairs, 2 n (p k + q l) for the rows and n p q for their product, against 2 p
        # q (k + l)
        p, q, n = a.shape[1], g.shape[1], len(a)
        of_a, of_g = (side.low.values.shape[0] for side in inverse)
        # more than `solve` takes
        if 2 * n * (p * of_a + q * of_g) + n * p * q > 2 * p * q * (of_a + of_g):
            return None
        thin_a, thin_g = (
            solve_side(side, x.T, precision=precision) for side, x in zip(inverse, (a, g))
        )
        return jnp.matmul(thin_a, thin_g.T, precision=precision)

    def root_solve(inverse: LowRankInverse, z: Array, damping: Array) -> Array:
        # R_A Z R_G, roots that are symmetric
        left = root_side(inverse.inputs, z, precision=precision)
        return root_side(inverse.outputs, left.T, precision=precision).T

    def logdet(inverse: LowRankInverse, damping: Array, shape: tuple[int, int]) -> Array:
        p, q = shape
        return q * logdet_side(inverse.inputs) + p * logdet_side(inverse.outputs)

    def multiply(factors: Factors, v: Array) -> Array:
        if factors.inputs.ndim < 2 or factors.outputs.ndim < 2:
            raise ValueError(
                "low_rank: a factor that is only followed online has no average to multiply with. "
                "Ask the exact curvature instead (a trust region in the exact metric), or keep the "
                "average: overwrite=True."
            )
        return sandwich(factors.inputs, v, factors.outputs, precision=precision)

    return Block(
        f"low rank ({rank})",
        init,
        measure,
        factorize,
        solve,
        multiply,
        rows=any(online),
        sharing=sharing,
        positions=positions,
        refresh=refresh,
        absorb=absorb if any(online) else None,
        solve_rows=solve_rows,
        root_solve=root_solve,
        logdet=logdet,
    )


def _check(
    rank,
    oversampling,
    power_iterations,
    correct_every,
    correct_share,
    target_error,
    variant,
    rest,
    damping_rule,
):
    where = "low_rank"
    check_number(where, "rank", rank, at_least=1)
    check_number(where, "oversampling", oversampling, at_least=0)
    check_number(where, "power_iterations", power_iterations, at_least=0)
    if correct_every is not None:
        check_number(where, "correct_every", correct_every, at_least=1)
    check_number(where, "correct_share", correct_share, at_least=0, at_most=1)
    if target_error is not None:
        check_number(where, "target_error", target_error, at_least=0, at_most=1)
    check_choice(where, "variant", variant, VARIANTS)
    check_choice(where, "rest", rest, REST)
    check_choice(where, "damping_rule", damping_rule, DAMPING)


def _trace(factor: Array) -> Array:
    """Of a factor, or of the diagonal that is kept of it."""
    return jnp.trace(factor) if factor.ndim == 2 else jnp.sum(factor)
