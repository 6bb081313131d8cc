"""A Kronecker factor as its leading eigenpairs and what the others are taken for: solves with it,
and how good it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax.linalg.truncated_eigen import (
    LowRank,
    beyond,
    captured_energy,
    low_rank_logdet,
    low_rank_root,
    low_rank_solve,
)


class Side(NamedTuple):
    """One factor as it is held, and what makes an inverse of it."""

    low: LowRank
    trace: Float[Array, ""]  # of the factor
    used: Int[Array, ""]  # how many pairs
    rest: Float[Array, ""]  # what eigenvalues behind those are taken for
    shift: Float[Array, ""]  # damping


class LowRankInverse(NamedTuple):
    """Both factors of a layer."""

    inputs: Side
    outputs: Side


def solve_side(
    side: Side,
    v: Float[Array, "d k"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d k"]:
    """The damped inverse of a factor times `V`, see `low_rank_solve`.

    >>> low = LowRank(jnp.eye(2, 1), jnp.array([3.0]))
    >>> side = Side(low, jnp.float32(4.0), jnp.int32(1), jnp.float32(1.0), jnp.float32(1.0))
    >>> print(solve_side(side, jnp.ones((2, 1))).ravel())
    [0.25 0.5 ]
    """
    kept = beyond(side.low, side.used, side.rest)
    return low_rank_solve(kept, v, side.shift, rest=side.rest, precision=precision)


def root_side(
    side: Side,
    z: Float[Array, "d k"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "d k"]:
    """The square root of what `solve_side` applies, times `Z`, see `low_rank_root`."""
    kept = beyond(side.low, side.used, side.rest)
    return low_rank_root(kept, z, side.shift, rest=side.rest, precision=precision)


def logdet_side(side: Side) -> Float[Array, ""]:
    """`log det` of the damped factor that `solve_side` inverts, see `low_rank_logdet`."""
    kept = beyond(side.low, side.used, side.rest)
    return low_rank_logdet(kept, side.shift, rest=side.rest)


class Quality(NamedTuple):
    """How well a factor is held."""

    energy: Float[Array, ""]  # share of the trace in the pairs in use
    error: Float[Array, ""]  # of the inverse where pairs are left out, an estimate
    used: Int[Array, ""]  # pairs in use


def quality(side: Side) -> Quality:
    """Captured energy, estimated error of the inverse, and pairs in use of one factor.

    Eigenvalues that are left out are thought between zero and `t`, the smallest in use or what is
    left of the trace (those of a factor followed online may be larger). With `c` what they are
    taken for and `s` the damping, the solve is off by the factor `(x + s) / (c + s)` for one that
    is `x`; the error is how far from one that can be, `max(t - c, c) / (c + s)`. Zero where nothing
    is left out.

    >>> low = LowRank(jnp.eye(2, 1), jnp.array([3.0]))
    >>> print(quality(Side(low, jnp.float32(4.0), jnp.int32(1), jnp.float32(0.0), jnp.float32(0.5))))
    Quality(energy=Array(0.75, dtype=float32), error=Array(2., dtype=float32), used=Array(1, dtype=int32))
    """
    in_use = beyond(side.low, side.used, 0)
    left = jnp.maximum(side.trace - jnp.sum(in_use.values), 0)
    smallest = side.low.values[side.used - 1]
    top = jnp.minimum(smallest, left)
    furthest = jnp.maximum(top - side.rest, side.rest)
    error = furthest / (side.rest + side.shift)
    everything = side.used >= side.low.vectors.shape[0]
    energy = captured_energy(in_use, side.trace)
    return Quality(energy, jnp.where(everything, 0, error), side.used)
