"""MKOR's block: inverse factors followed by rank-one updates with mean inputs and mean output
gradients; nothing is ever factorised.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.rank_one.rank_one import Means, rank_one
from kfac_optax.linalg.kronecker_products import sandwich

FORMS = ("exact", "blend", "sum")


class FollowedInverse(NamedTuple):
    """What stands for `A^{-1}` and `G^{-1}`."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]


def mkor_block(
    form: str = "exact",
    *,
    threshold: float | None = 2.0,
    mixing: float = 0.9,
    largest: float = 100.0,
    inverse_dtype: Any = None,
    sharing: str = "expand",
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Inverse factors `J_A`, `J_G` that every statistic changes by a matrix of rank one,
    `V -> J_A V J_G`.

    Both start as `I`. With `a` the mean input of a batch and `b` its mean output gradient, as in
    `rank_one`, `e` the `decay` of the transformation (no shorter average at the start) and
    `u = J a`, the update of `J_A`, and likewise with `b` that of `J_G`, is

    - `"exact"`: `J / e - (1 - e) / e^2 u u^T / (1 + (1 - e) / e a^T u)`, the inverse of
      `A <- e A + (1 - e) a a^T`;
    - `"blend"`: `M - w w^T / (1 + a^T w)` with `M = e J + (1 - e) I`, `w = M a`: the inverse of
      `M^{-1} + a a^T`;
    - `"sum"`: `e J + (1 - e) / (e^2 (1 + e (1 - e) a^T u)) u u^T`, a sum of positive terms, but no
      inverse of an average.

    All three keep `J` symmetric and positive definite, at `O(p^2 + q^2)` and without a solve. In
    directions that no mean has, `"exact"` grows as `e^{-k}`. So wherever an entry of `J` is larger
    than `threshold` afterwards, `J <- mixing J + (1 - mixing) I`.

    The damping has no part in it. Output gradients have to be those of the loss itself, see
    `rank_one`.

    Args:
      form: `"exact"`, `"blend"` or `"sum"`.
      threshold: of the entries of `J`; `None` for no bound.
      mixing: weight of `J` where it is mixed with the identity, in [0, 1].
      largest: entries of the means are cut to this size.
      inverse_dtype: dtype in which `J` is kept, such as `jnp.bfloat16`, whose rounding can cost
        definiteness where `J` is badly conditioned; default that of the statistics. Updates are
        computed in the latter.
      sharing: as for `rank_one`.
      precision: matmul precision of updates and solves.

    Returns:
      A `Block` with `Means` as statistic.

    Raises:
      ValueError: an unknown word, a number out of range; what `rank_one` raises.

    >>> block = mkor_block()
    >>> inverse = block.factorize(Means(jnp.zeros(2), jnp.zeros(1)), 1.0)
    >>> new, average = Means(jnp.array([1.0, 0.0]), jnp.zeros(1)), Average(0.5, 1, 0.5)
    >>> print(block.absorb(inverse, new, None, None, average).inputs)
    [[1. 0.]
     [0. 2.]]

    Reference: Mozaffari, Li, Zhang & Mehri Dehnavi, MKOR: Momentum-Enabled Kronecker-Factor-Based
      Optimizer Using Rank-1 Updates (2023).
    """
    check_choice("mkor_block", "form", form, FORMS)
    check_number("mkor_block", "mixing", mixing, at_least=0, at_most=1)
    check_number("mkor_block", "largest", largest, above=0)
    if threshold is not None:
        check_number("mkor_block", "threshold", threshold, above=0)
    plain = rank_one(sharing=sharing, precision=precision)

    def measure(
        a: Array,
        g: Array | None,
        use: Any,
    ) -> tuple[Means, Means]:
        # the average is for `multiply` alone: inverses follow the means of every batch themselves
        means = plain.measure(a, g, use)
        return means, means

    def factorize(means: Means, damping: Array) -> FollowedInverse:
        return FollowedInverse(*(_identity(x, inverse_dtype) for x in means))

    def refresh(inverse: FollowedInverse, *_: Any) -> FollowedInverse:
        return inverse

    def absorb(
        inverse: FollowedInverse, new: Means, means: Any, damping: Any, average: Average
    ) -> FollowedInverse:
        inputs = step(inverse.inputs, new.inputs, average.decay)
        outputs = step(inverse.outputs, new.outputs, average.decay)
        return FollowedInverse(inputs, outputs)

    def step(kept: Array, mean: Array | None, decay: Any) -> Array:
        assert mean is not None  # both are measured
        # in the dtype of the statistics, whatever J is kept in
        e = jnp.asarray(decay, mean.dtype)
        mean = jnp.clip(mean, -largest, largest)
        j = kept.astype(mean.dtype)
        j = _updated(form, j, mean, e, precision)
        if threshold is not None:
            identity = jnp.eye(len(j), dtype=j.dtype)
            mixed = mixing * j + (1 - mixing) * identity
            too_large = jnp.max(jnp.abs(j)) > threshold
            j = jnp.where(too_large, mixed, j)
        return j.astype(kept.dtype)

    def solve(inverse: FollowedInverse, v: Array, damping: Array) -> Array:
        inputs, outputs = (x.astype(v.dtype) for x in inverse)
        return sandwich(inputs, v, outputs, precision=precision)

    name = "mkor" if form == "exact" else f"mkor ({form})"
    return plain._replace(
        name=name,
        measure=measure,
        factorize=factorize,
        solve=solve,
        refresh=refresh,
        absorb=absorb,
        absorbs="means",
        # those of `rank_one` are of another inverse
        root_solve=None,
        logdet=None,
    )


def _identity(mean: Array | None, dtype: Any) -> Array:
    assert mean is not None  # both are measured
    dtype = mean.dtype if dtype is None else dtype
    return jnp.eye(len(mean), dtype=dtype)


def _updated(
    form: str,
    j: Array,
    mean: Array,
    e: Array,
    precision: Any,
) -> Array:
    if form == "blend":
        # M, a step towards the identity first
        identity = jnp.eye(len(j), dtype=j.dtype)
        j = e * j + (1 - e) * identity
    u = jnp.matmul(j, mean, precision=precision)
    size = jnp.vdot(mean, u, precision=precision)
    size = jnp.maximum(size, 0)  # not negative but for rounding
    square = jnp.outer(u, u)
    if form == "blend":
        # Sherman & Morrison, of M^{-1} + a a^T
        return j - square / (1 + size)
    if form == "sum":
        divisor = e**2 * (1 + e * (1 - e) * size)
        return e * j + (1 - e) / divisor * square
    # Sherman & Morrison, of e A + (1 - e) a a^T
    total = 1 + (1 - e) / e * size
    return j / e - (1 - e) / e**2 / total * square
