"""Kronecker blocks whose factors are held as a few eigenpairs: from random sketches, or followed
online.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kfac_optax._types import Average, Block, Layer, Use
from kfac_optax._validate import check_seed
from kfac_optax.blocks.batch_rows import Columns, of_all_pullbacks, scaled_rows
from kfac_optax.blocks.kronecker.kronecker import Factors, kronecker
from kfac_optax.blocks.low_rank.low_rank_factor import (
    Rule,
    Settings,
    check_settings,
    follow,
    moment,
    shifts_of,
    side_of,
    sketch,
    start,
    trace_of,
)
from kfac_optax.blocks.low_rank.low_rank_side import (
    LowRankInverse,
    logdet_side,
    root_side,
    solve_side,
)
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.truncated_eigen import LowRank, of_diagonal


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
    settings = Settings(
        rank,
        correct_every,
        correct_share,
        oversampling,
        power_iterations,
        variant,
        rest,
        damping_rule,
        target_error,
        precision,
    )
    check_settings("low_rank", settings)
    check_seed("low_rank", seed)
    plain = kronecker("cholesky", sharing=sharing, positions=positions, precision=precision)
    corrected = correct_every is not None
    rules = [Rule(on, overwrite or not on, on and corrected) for on in online]

    def init(layer: Layer, dtype: jnp.dtype) -> Factors:
        return Factors(*(start(d, rule, dtype) for d, rule in zip(layer.shape, rules)))

    def measure(a: Array, g: Array | None, use: Use) -> Any:
        # sketches alone read averages as `kronecker` measures them
        if not any(online):
            return plain.measure(a, g, use)
        rows = scaled_rows(a, g, use, where="low_rank (online)", instead="sketches (rs_kfac)")
        factors = [moment(x, rule, precision) for x, rule in zip(rows, rules)]
        kept = [x if rule.online else None for x, rule in zip(rows, rules)]
        return Factors(*factors), Columns(*kept)

    def draws(count: Array) -> Array:
        # other draws for every statistic and for both factors
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.split(key)

    def inverse_of(
        factors: Factors,
        lows: list[LowRank],
        damping: Array,
    ) -> LowRankInverse:
        # traces of the factors themselves, whatever part of them the pairs hold
        traces = map(trace_of, factors)
        shifts = shifts_of(settings, factors, lows, damping)
        sides = (side_of(settings, *parts) for parts in zip(lows, traces, shifts))
        return LowRankInverse(*sides)

    def refresh(
        old: LowRankInverse | None,
        factors: Factors,
        damping: Array,
        count: Array,
    ) -> LowRankInverse:
        keys = draws(count)
        lows: list[LowRank] = []
        # one factor after another, see `after`
        for i, (factor, rule) in enumerate(zip(factors, rules)):
            if rule.sketches:
                low = sketch(settings, after(factor, lows), keys[i])
            elif old is not None:
                low = old[i].low
            # no rows yet: the diagonal is all there is, that of the identity before any statistic
            else:
                diagonal = jnp.diag(factor) if factor.ndim == 2 else factor
                low = of_diagonal(diagonal, rank)
            lows.append(low)
        return inverse_of(factors, lows, damping)

    def factorize(factors: Factors, damping: Array) -> LowRankInverse:
        return refresh(None, factors, damping, jnp.zeros((), jnp.int32))

    def absorb(
        inverse: LowRankInverse,
        columns: Columns,
        factors: Factors,
        damping: Array,
        average: Average,
    ) -> LowRankInverse:
        keys = draws(average.count)
        lows: list[LowRank] = []
        # what is followed online takes the rows of all pullbacks and devices
        for i, rows in enumerate(of_all_pullbacks(columns)):
            low = inverse[i].low
            if rows is not None:
                low = follow(settings, low, after(rows, lows), factors[i], average, keys[i])
            lows.append(low)
        new = inverse_of(factors, lows, damping)
        # a factor that is decomposed at refreshes keeps its pairs until then; its damping may change
        sides = [
            after_it if rule.online else before._replace(shift=after_it.shift)
            for rule, before, after_it in zip(rules, inverse, new)
        ]
        return LowRankInverse(*sides)

    def solve(inverse: LowRankInverse, v: Array, damping: Array) -> Array:
        # A^{-1} V G^{-1}, the second on rows of V
        left = solve_side(inverse.inputs, v, precision=precision)
        return solve_side(inverse.outputs, left.T, precision=precision).T

    def solve_rows(
        inverse: LowRankInverse,
        a: Array,
        g: Array,
        damping: Array,
    ) -> tuple[Array, tuple[Array, Array]] | None:
        n, p = a.shape
        q = g.shape[1]
        of_a, of_g = (side.low.values.shape[0] for side in inverse)
        # multiplications of both sides, and of a^T g where it does not exist yet
        from_rows = 2 * n * (p * of_a + q * of_g) + n * p * q
        from_gradient = 2 * p * q * (of_a + of_g)
        if from_rows > from_gradient:
            return None
        thin_a = solve_side(inverse.inputs, a.T, precision=precision)
        thin_g = solve_side(inverse.outputs, g.T, precision=precision)
        update = jnp.matmul(thin_a, thin_g.T, precision=precision)
        return update, (thin_a.T, thin_g.T)

    def root_solve(inverse: LowRankInverse, z: Array, damping: Array) -> Array:
        # R_A Z R_G, roots that are symmetric
        left = root_side(inverse.inputs, z, precision=precision)
        return root_side(inverse.outputs, left.T, precision=precision).T

    def logdet(
        inverse: LowRankInverse,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
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
