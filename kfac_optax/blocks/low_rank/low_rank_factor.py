"""What is done with one Kronecker factor that is held as a few eigenpairs: sketched, followed online,
damped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.blocks.low_rank.low_rank_side import Side
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import at_least_rounding
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.online import brand_update, correct_directions
from kfac_optax.linalg.randomized import VARIANTS, randomized_eigh
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.truncated_eigen import LowRank, mean_left_out, rank_for

REST = ("mean", "smallest", "zero")
DAMPING = ("tikhonov", "relative")


class Settings(NamedTuple):
    """Numbers and words of a `low_rank`, the same for both factors."""

    rank: int
    correct_every: int | None
    correct_share: float
    oversampling: int
    power_iterations: int
    variant: str
    rest: str
    damping_rule: str
    target_error: float | None
    precision: jax.lax.PrecisionLike


class Rule(NamedTuple):
    """What is done with a factor."""

    online: bool  # new rows go into what is held
    sketches: bool  # a refresh decomposes the average
    corrected: bool  # directions of what is held are brought up to date now and then

    @property
    def dense(self) -> bool:
        """Whether the average is kept; otherwise only its diagonal, for the trace."""
        return self.sketches or self.corrected


def check_settings(where: str, settings: Settings) -> None:
    """Raises where a setting is out of range."""
    check_number(where, "rank", settings.rank, at_least=1)
    check_number(where, "oversampling", settings.oversampling, at_least=0)
    check_number(where, "power_iterations", settings.power_iterations, at_least=0)
    if settings.correct_every is not None:
        check_number(where, "correct_every", settings.correct_every, at_least=1)
    check_number(where, "correct_share", settings.correct_share, at_least=0, at_most=1)
    if settings.target_error is not None:
        check_number(where, "target_error", settings.target_error, at_least=0, at_most=1)
    check_choice(where, "variant", settings.variant, VARIANTS)
    check_choice(where, "rest", settings.rest, REST)
    check_choice(where, "damping_rule", settings.damping_rule, DAMPING)


def start(dimension: int, rule: Rule, dtype: Any) -> Array:
    """The identity, or its diagonal where only that is kept."""
    # a sketch or a correction reads the whole average
    if rule.dense:
        return jnp.eye(dimension, dtype=dtype)
    return jnp.ones(dimension, dtype)


def moment(
    rows: Float[Array, "n d"],
    rule: Rule,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """`U^T U` of scaled rows, or its diagonal where only that is kept."""
    if rule.dense:
        return gram(rows, rows, precision=precision)
    return jnp.sum(rows * rows, 0)


def trace_of(factor: Array) -> Float[Array, ""]:
    """Of a factor, or of the diagonal that is kept of it."""
    return jnp.trace(factor) if factor.ndim == 2 else jnp.sum(factor)


def sketch(
    settings: Settings,
    matrix: Float[Array, "d d"],
    key: Array,
) -> LowRank:
    """The leading eigenpairs of the average, from a random sketch."""
    return randomized_eigh(
        matrix,
        key,
        rank=settings.rank,
        oversampling=settings.oversampling,
        power_iterations=settings.power_iterations,
        variant=settings.variant,
        precision=settings.precision,
    )


def follow(
    settings: Settings,
    low: LowRank,
    rows: Float[Array, "n d"],
    matrix: Array,
    average: Average,
    key: Array,
) -> LowRank:
    """What is held, with the rows of one statistic in it, and corrected where it is time."""
    kept = low.values.shape[0]
    # U D U^T <- decay U D U^T + (1 - decay) sum_rows y y^T, cut off at the same rank
    new = brand_update(
        low,
        rows.T,
        average.weight,
        rank=kept,
        keep=kept,
        precision=settings.precision,
    )
    if settings.correct_every is None:
        return new

    def correct(low: LowRank) -> LowRank:
        count = int(settings.correct_share * low.values.shape[0]) + 1
        return correct_directions(low, matrix, key, count=count, precision=settings.precision)

    # the count is the same for all layers: mapped over them this stays a branch
    now = average.count % settings.correct_every == 0
    return jax.lax.cond(now, correct, lambda low: low, new)


def shifts_of(
    settings: Settings,
    factors: Factors,
    lows: list[LowRank],
    damping: Array,
) -> tuple[Array, Array]:
    """What the damping adds to the eigenvalues of both factors."""
    # pi sqrt(damping) and sqrt(damping) / pi, by mean eigenvalues
    if settings.damping_rule == "tikhonov":
        mean_a, mean_g = (trace_of(x) / len(x) for x in factors)
        return tikhonov_shifts(mean_a, mean_g, damping)
    # or in proportion to the largest eigenvalue of each factor
    top_a, top_g = (positive_or_one(low.values[0]) for low in lows)
    shift_a = at_least_rounding(damping * top_a, top_a)
    shift_g = at_least_rounding(damping * top_g, top_g)
    return shift_a, shift_g


def side_of(
    settings: Settings,
    low: LowRank,
    trace: Array,
    shift: Array,
) -> Side:
    """A factor as it is solved with: its pairs, and what stands for the eigenvalues left out."""
    # all pairs, or the fewest that hold the share of the trace that is asked for
    used = jnp.full((), low.values.shape[0], jnp.int32)
    if settings.target_error is not None:
        used = rank_for(low, trace, settings.target_error)
    smallest = low.values[used - 1]
    # what eigenvalues are taken for that are not in use
    others = {
        "mean": mean_left_out(low, trace, used),
        "smallest": smallest,
        "zero": jnp.zeros_like(smallest),
    }
    return Side(low, trace, used, others[settings.rest], shift)
